from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.storage import LocalLocation, Location, locate, remove_unfinished


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "local":
        yield locate(tmp_path / "folder")
    else:
        yield locate("memory://folder")
        fsspec.filesystem("memory").rm("/", recursive=True)


def test_files_are_written_read_listed_and_removed_alike_everywhere(folder: Location) -> None:
    place = folder / "a/b.txt"
    assert not place.is_file()
    assert folder.names() == []
    with pytest.raises(DataError, match=r"b\.txt: no such file"):
        place.read_bytes()
    place.write(b"one")
    first = place.stamp()
    assert (place.read_bytes(), place.size(), place.name, place.is_file()) == (b"one", 3, "b.txt", True)
    place.write(b"other")
    assert place.read_bytes() == b"other"
    assert place.stamp() != first
    with place.open() as file:
        assert file.read(2) == b"ot"
        file.seek(3)
        assert file.read() == b"er"
    (folder / "a/c.txt").write(b"")
    assert (folder / "a").names() == ["b.txt", "c.txt"]
    assert folder.names() == ["a"]
    assert [str(found) for found in (folder / "a/*.txt").glob()] == [str(folder / "a/b.txt"), str(folder / "a/c.txt")]
    assert (folder / "a").is_dir()
    place.remove()
    place.remove()
    assert (folder / "a").names() == ["c.txt"]
    (folder / "a").remove()
    assert not (folder / "a").is_dir()


def test_one_creates_and_the_others_are_told(folder: Location) -> None:
    place = folder / "once"
    assert place.create(b"first")
    assert not place.create(b"second")
    assert place.read_bytes() == b"first"


def test_of_many_threads_that_create_a_local_file_one_wins_and_nothing_is_left_over(tmp_path: Path) -> None:
    won: list[int] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        if locate(tmp_path / "once").create(f"{number}".encode() * 100_000):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "once").read_bytes() == f"{won[0]}".encode() * 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = locate(tmp_path / "a")
    place.write(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (place.write, (tmp_path / "b" and locate(tmp_path / "b")).create):
        with pytest.raises(OSError, match="No space left"):
            write(b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


def test_unfinished_files_are_no_files_and_can_be_swept(tmp_path: Path) -> None:
    (tmp_path / ".a.jsonl.0123.tmp").write_bytes(b"half")
    (tmp_path / "a.jsonl").write_bytes(b"whole")
    assert locate(tmp_path).names() == ["a.jsonl"]
    remove_unfinished(locate(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_places_below_a_folder_are_known_links_and_all(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert locate(tmp_path / "real").contains(locate(tmp_path / "link/in"))
    assert not locate(tmp_path / "real").contains(locate(tmp_path / "real2"))
    assert locate("memory://a").contains(locate("memory://a/b"))
    assert not locate("memory://a").contains(locate("memory://ab"))
    assert not locate("memory://a").contains(locate(tmp_path))


def test_names_are_read_as_paths_or_urls() -> None:
    assert isinstance(locate("a/b"), LocalLocation)
    assert str(locate("file:///tmp/x")) == "/tmp/x"
    with pytest.raises(ConfigError, match=r"nosuch://a: .*give a local path"):
        locate("nosuch://a")
