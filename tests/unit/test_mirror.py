"""The mirror of checkpoints, on a folder of this machine: what is uploaded, fetched, kept, and refused."""

import json
import shutil
from pathlib import Path

import pytest

from tpt_megatron.checkpoints import TRACKER, damages, iteration_folder, read_checksums, write_checksums
from tpt_megatron.config.checkpoint import CheckpointConfig
from tpt_megatron.errors import CheckpointError, ConfigError, TptError
from tpt_megatron.mirror import Mirror, fetch_checkpoint
from tpt_megatron.storage import LocalLocation, locate

ALL = CheckpointConfig()


def save(root: Path, step: int, content: str = "", loss: float | None = None) -> None:
    """A checkpoint that looks like one, made the latest."""
    folder = iteration_folder(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_text(f"weights of step {step} {content}" * 100)
    (folder / ".metadata").write_bytes(b"m")
    (folder / "metadata.json").write_text("{}")
    (folder / "tpt.json").write_text(json.dumps({"step": step, "validation_loss": loss}))
    write_checksums(folder, [])
    (root / TRACKER).write_text(f"{step}\n")


def steps(root: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("iter_")) for path in root.glob("iter_*/checksums.json"))


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != "mirrored.json"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "mirror"


@pytest.fixture
def mirror(root: Path, there: Path) -> Mirror:
    return Mirror(locate(there), root)


def test_what_the_run_has_goes_there_and_comes_back_the_same(root: Path, there: Path, mirror: Mirror) -> None:
    assert mirror.ahead() is None
    mirror.follow(ALL)  # of nothing
    for step in (4, 8):
        save(root, step)
    mirror.follow(ALL)
    assert content(there) == content(root)
    shutil.rmtree(root)
    assert mirror.ahead() == 8
    assert mirror.description(8) == {"step": 8, "validation_loss": None}
    mirror.fetch(8)
    assert steps(root) == [8]
    assert damages(iteration_folder(root, 8), read_checksums(iteration_folder(root, 8)) or []) == []
    assert mirror.ahead() is None
    assert not list(root.glob(".*"))


def test_the_latest_goes_first_its_checksums_after_its_files_and_the_tracker_after_them(
    root: Path, there: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 8):
        save(root, step)
    order: list[str] = []
    upload, write = LocalLocation.upload, LocalLocation.write
    monkeypatch.setattr(LocalLocation, "upload", lambda place, path: (upload(place, path), order.append(str(place.path.relative_to(there)))))
    monkeypatch.setattr(LocalLocation, "write", lambda place, data: (write(place, data), order.append(str(place.path.relative_to(there)))))
    mirror.follow(ALL)
    files = (".metadata", "__0_0.distcp", "metadata.json", "tpt.json")
    assert sorted(order[:4]) == [f"iter_0000008/{name}" for name in files]
    assert order[4:6] == ["iter_0000008/checksums.json", TRACKER]
    assert sorted(order[6:10]) == [f"iter_0000004/{name}" for name in files]
    assert order[10:] == ["iter_0000004/checksums.json"]


def test_an_upload_that_fails_leaves_nothing_that_looks_complete_and_is_done_again(
    root: Path, there: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root, 4)
    mirror.follow(ALL)
    save(root, 8)
    upload = LocalLocation.upload

    def fail(place: LocalLocation, path: Path) -> None:
        if path.name == "metadata.json":
            raise OSError(28, "No space left on device")
        upload(place, path)

    monkeypatch.setattr(LocalLocation, "upload", fail)
    with pytest.raises(OSError, match="No space left"):
        mirror.follow(ALL)
    assert mirror.newest() == 4
    assert not list(root.glob(".*"))
    monkeypatch.undo()
    mirror.follow(ALL)
    assert mirror.newest() == 8
    assert content(there) == content(root)


def test_a_step_that_is_reached_again_replaces_what_was_mirrored_of_the_past_that_was_taken_back(root: Path, there: Path, mirror: Mirror) -> None:
    for step in (4, 8, 12):
        save(root, step)
    mirror.follow(ALL)
    (iteration_folder(there, 8) / "__1_0.distcp").write_text("of a second rank that the run had then")
    (root / TRACKER).write_text("4\n")
    assert mirror.ahead() is None  # it was this folder that left 12 there
    mirror.follow(ALL)
    assert (there / TRACKER).read_text() == "4\n"
    save(root, 8, "anew")
    mirror.follow(ALL)
    assert (there / TRACKER).read_text() == "8\n"
    assert content(there) == content(root)
    assert mirror.newest() == 8, "12 is of the past that was taken back"


def test_a_disk_that_another_machine_has_left_behind_is_stale(root: Path, there: Path, mirror: Mirror, tmp_path: Path) -> None:
    save(root, 4)
    mirror.follow(ALL)
    other_root = tmp_path / "other" / "checkpoints"
    other = Mirror(locate(there), other_root)
    step = other.ahead()
    assert step == 4
    other.fetch(step)
    save(other_root, 8)
    other.follow(ALL)
    assert mirror.ahead() == 8


def test_rules_hold_there_for_all_that_is_there(root: Path, there: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = CheckpointConfig(every_steps=1, keep_last=2, keep_every_steps=4, keep_best=1)
    for step in range(1, 5):
        save(root, step, loss=0.5 if step == 2 else 1.0)
        mirror.follow(rules)
    assert steps(there) == [2, 3, 4]
    shutil.rmtree(root)  # another machine, which knows of the latest only
    mirror.fetch(4)
    for step in range(5, 8):
        save(root, step, loss=0.9 if step == 5 else 1.0)  # the best that this machine knows of
        mirror.follow(rules)
    assert steps(there) == [2, 4, 6, 7]
    assert steps(root) == [4, 5, 6, 7]  # which are the trainer's to delete
    monkeypatch.setattr(LocalLocation, "upload", lambda place, path: pytest.fail(f"{place} is uploaded to be deleted"))
    mirror.follow(rules)


def test_half_an_upload_of_a_lost_machine_is_removed(root: Path, there: Path, mirror: Mirror) -> None:
    half = iteration_folder(there, 3)
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_text("half")
    save(root, 4)
    assert mirror.newest() is None
    mirror.follow(ALL)
    assert not half.exists()
    assert steps(there) == [4]


def test_a_checkpoint_that_the_run_deletes_while_it_is_uploaded_still_comes_there_whole(
    root: Path, there: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root, 4)
    upload = LocalLocation.upload

    def delete_first(place: LocalLocation, path: Path) -> None:
        shutil.rmtree(iteration_folder(root, 4), ignore_errors=True)
        upload(place, path)

    monkeypatch.setattr(LocalLocation, "upload", delete_first)
    mirror.follow(ALL)
    assert mirror.newest() == 4
    monkeypatch.undo()
    fetch_checkpoint(locate(iteration_folder(there, 4)), root / "again")


def test_the_tracker_of_a_half_replaced_checkpoint_leads_to_the_one_before_it(root: Path, there: Path, mirror: Mirror) -> None:
    for step in (4, 8):
        save(root, step)
    mirror.follow(ALL)
    (iteration_folder(there, 8) / "checksums.json").unlink()
    assert mirror.newest() == 4


@pytest.mark.parametrize("name", ["__0_0.distcp", "tpt.json"])
def test_what_was_damaged_there_is_not_fetched(root: Path, there: Path, mirror: Mirror, name: str) -> None:
    for step in (4, 8):
        save(root, step)
    mirror.follow(ALL)
    shutil.rmtree(root)
    path = iteration_folder(there, 8) / name
    path.write_text(path.read_text().replace("8", "9"))
    with pytest.raises(CheckpointError, match=r"is not what checksums.json says.*write 4, the complete one before it, into .*mirror/latest"):
        mirror.description(8) if name == "tpt.json" else mirror.fetch(8)
    assert not steps(root)
    assert not list(root.glob(".*"))


def test_checksums_that_name_files_elsewhere_are_refused(root: Path, there: Path, tmp_path: Path) -> None:
    folder = iteration_folder(there, 4)
    folder.mkdir(parents=True)
    (folder / "checksums.json").write_text(json.dumps([{"name": "../../evil", "bytes": 1, "sha256": "0"}]))
    with pytest.raises(CheckpointError, match=r"it names '../../evil', which is no file of that folder"):
        fetch_checkpoint(locate(folder), iteration_folder(root, 4))
    with pytest.raises(CheckpointError, match="no complete checkpoint is there"):
        fetch_checkpoint(locate(tmp_path / "nowhere"), iteration_folder(root, 4))


def test_a_place_that_cannot_be_used_is_refused(root: Path, tmp_path: Path) -> None:
    root.mkdir(parents=True)
    (tmp_path / "file").write_text("")
    refusals: list[tuple[Path, type[TptError], str]] = [
        (root, ConfigError, "is where the run's own checkpoints are"),
        (root / "below", ConfigError, "is where the run's own checkpoints are"),
        (tmp_path / "file" / "folder", CheckpointError, "cannot be written to .*Not a directory"),
    ]
    for place, kind, says in refusals:
        with pytest.raises(kind, match=says):
            Mirror(locate(place), root).check()
    Mirror(locate(tmp_path / "mirror"), root).check()
    assert not list((tmp_path / "mirror").iterdir())
