import os
import shutil
from pathlib import Path

import pytest

from tpt_megatron.checkpoints import (
    CHECKSUMS,
    TRACKER,
    damages,
    discard,
    finished_steps,
    iteration_folder,
    latest_step,
    read_checksums,
    remove_leftovers,
    to_discard,
    way_out,
    write_checksums,
)
from tpt_megatron.config.checkpoint import CheckpointConfig
from tpt_megatron.errors import CheckpointError
from tpt_megatron.files import describe_file

FILES = {"tpt.json": b"{}", "metadata.json": b"{}", "__0_0.distcp": b"0123456789" * 100, "__0_1.distcp": b"9876543210" * 50}


def write_folder(root: Path, step: int) -> Path:
    folder = iteration_folder(root, step)
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    write_checksums(folder, [])
    return folder


def test_checksums_name_every_file_and_take_what_is_known(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, 2)
    entries = read_checksums(folder)
    assert entries == [describe_file(folder / name) for name in sorted(FILES)]
    (folder / CHECKSUMS).unlink()
    known = entries[0].model_copy(update={"sha256": "known already"})
    write_checksums(folder, [known])
    assert read_checksums(folder) == [known, *entries[1:]]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "says"), [(flip, "SHA-256"), (cut, "bytes"), (Path.unlink, "missing")])
def test_every_damage_to_every_file_is_found_by_exactly_one_rank(tmp_path: Path, name: str, damage: object, says: str) -> None:
    folder = write_folder(tmp_path, 2)
    entries = read_checksums(folder)
    assert entries is not None
    assert damages(folder, entries) == []
    damage(folder / name)  # type: ignore[operator]
    found = [said for rank in range(3) for said in damages(folder, entries, rank, 3)]
    assert len(found) == 1
    assert found[0].startswith(f"{folder / name}: ")
    assert says in found[0]


@pytest.mark.parametrize("content", [b"", b"not JSON", b'{"a": 1}', b'[{"name": "x"}]', b"\xff"])
def test_damaged_checksums_are_an_error_and_none_are_none(tmp_path: Path, content: bytes) -> None:
    assert read_checksums(tmp_path) is None
    (tmp_path / CHECKSUMS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksums\.json: not a list of files"):
        read_checksums(tmp_path)


def test_the_way_out_is_the_last_complete_one_before(tmp_path: Path) -> None:
    folders = [write_folder(tmp_path, step) for step in (2, 4, 6, 8)]
    cut(folders[2] / "__0_1.distcp")
    assert way_out(folders[3], resuming=True) == f"the complete one before it is of step 4: write 4 into {tmp_path / TRACKER} to continue from there"
    assert way_out(folders[3], resuming=False) == f"the complete one before it is {folders[1]}: give that as checkpoint.load_from"
    assert way_out(folders[0], resuming=True) == f"no complete one is left before it; remove {tmp_path / TRACKER} to start anew"
    assert way_out(tmp_path / "elsewhere", resuming=False) == "load another one"


def test_a_deletion_that_is_cut_short_leaves_no_finished_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path, 2)
    real = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, **_: (path / "tpt.json").unlink())
        discard(folder)
    assert not finished_steps(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert shutil.rmtree is real
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


def test_leftovers_are_all_that_remove_leftovers_removes(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    (tmp_path / TRACKER).write_text("2\n")
    for name in (".iter_0000004.tmp", ".iter_0000004.0123abcd.tmp"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "not there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000002", TRACKER]
    assert latest_step(tmp_path) == 2


STEPS = [2, 4, 6, 8, 10]
LOSSES = {2: 3.0, 4: 1.5, 6: 1.5, 8: 2.0}


@pytest.mark.parametrize(
    ("rules", "discarded"),
    [
        ({}, []),
        ({"keep_last": 2}, [2, 4, 6]),
        ({"keep_last": 4}, [2]),
        ({"keep_last": 9}, []),
        ({"keep_last": 2, "keep_every_steps": 4}, [2, 6]),
        ({"keep_last": 2, "keep_best": 1}, [2, 6]),
        ({"keep_last": 2, "keep_best": 2}, [2]),
        ({"keep_last": 2, "keep_best": 9}, []),
        ({"keep_last": 2, "keep_best": 1, "keep_every_steps": 6}, [2]),
    ],
)
def test_retention(rules: dict[str, int], discarded: list[int]) -> None:
    assert to_discard(STEPS, LOSSES, CheckpointConfig(every_steps=2, **rules)) == discarded


def test_the_best_so_far_survives_whatever_comes_and_the_two_latest_too() -> None:
    rules = CheckpointConfig(keep_last=2, keep_best=1)
    losses = {step: 1 + abs(step - 7) for step in range(1, 40)}
    kept: list[int] = []
    for step in range(1, 40):
        kept.append(step)
        gone = to_discard(kept, losses, rules)
        assert not {step, step - 1} & set(gone)
        kept = [one for one in kept if one not in gone]
        assert min(kept, key=losses.__getitem__) == min(step, 7)
    assert kept == [7, 38, 39]


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"keep_last": 1}, "keep_last=1 would delete"),
        ({"keep_best": 1}, "keep_best=1 has no effect"),
        ({"keep_every_steps": 100}, "keep_every_steps=100 has no effect"),
        ({"every_steps": 30, "keep_last": 2, "keep_every_steps": 100}, "keep_every_steps=100 is not a multiple of checkpoint.every_steps=30"),
        ({"keep_last": 2, "keep_every_steps": 100}, "keep_every_steps=100 is not a multiple of checkpoint.every_steps=0"),
        ({"load": "weights"}, "load_from names no checkpoint"),
    ],
)
def test_rules_without_effect_are_refused(rules: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CheckpointConfig.model_validate(rules)
