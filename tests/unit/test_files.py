from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.files import Manifest, check_outputs, describe_file, open_atomic, parse_json_line, read_lines, read_manifest, whole_folder
from tpt_megatron.record_files import expand_inputs


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def write() -> None:
        with open_atomic(path) as file:
            file.write(b"half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(fail: bool) -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "x").write_text("1")
            assert not (tmp_path / "out").exists()
            if fail:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fill(True)
    assert os.listdir(tmp_path) == []
    fill(False)
    assert (tmp_path / "out" / "x").read_text() == "1"


LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(2000))


def _compress(kind: str, data: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(data)
    return zstandard.compress(data) if kind == "zst" else data


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst"])
def test_lines_and_progress_are_complete_over_several_compressed_members(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(_compress(kind, LINES[:10000]) + _compress(kind, LINES[10000:]))
    heard: list[int] = []
    lines = list(read_lines(path, heard.append))
    assert b"".join(line + b"\n" for _, line in lines) == LINES
    assert [number for number, _ in lines] == list(range(1, 2001))
    assert 0 < sum(heard) <= path.stat().st_size


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_cut_off_compressed_file_is_an_error_and_not_an_end(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.jsonl.{kind}"
    whole = _compress(kind, LINES)
    path.write_bytes(whole[: len(whole) - 20])
    with pytest.raises(DataError, match=r"damaged or cut off after line"):
        list(read_lines(path))


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_file_that_only_claims_to_be_compressed_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(LINES)
    with pytest.raises(DataError, match=str(path)):
        list(read_lines(path))


def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}')
    assert [line for _, line in read_lines(path)] == [b'{"a": 1}', b'{"a": 2}']


def test_json_errors_say_whether_it_is_the_encoding_or_the_json() -> None:
    with pytest.raises(RecordError, match="f:3: not valid UTF-8 at byte 10"):
        parse_json_line(b'{"text": "\xff"}', "f:3")
    with pytest.raises(RecordError, match="f:3: not valid JSON"):
        parse_json_line(b"{", "f:3")


def test_inputs_expand_in_a_stable_order_each_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).touch()
    assert [path.name for path in expand_inputs((str(tmp_path / "b.jsonl"), str(tmp_path)))] == ["b.jsonl", "a.jsonl.gz"]
    assert [path.name for path in expand_inputs((str(tmp_path / "*.gz"),))] == ["a.jsonl.gz"]
    with pytest.raises(DataError, match="no input file matches"):
        expand_inputs((str(tmp_path / "*.zst"),))


def _augmented(folder: Path) -> Manifest:
    (folder / "shards").mkdir(parents=True)
    (folder / "shards/00000.jsonl").write_text("{}\n")
    (folder / "shards/stray.jsonl").write_text("{}\n")
    entry = describe_file(folder / "shards/00000.jsonl", "shards/00000.jsonl")
    return Manifest(kind="augmented", settings={}, inputs=(), outputs=(entry,), counts={})


def test_an_augment_output_stands_for_exactly_its_shards(tmp_path: Path) -> None:
    manifest = _augmented(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="unfinished output of tpt augment"):
        expand_inputs((str(tmp_path),))
    manifest.write(tmp_path / "manifest.json")
    assert [str(place) for place in expand_inputs((str(tmp_path),))] == [str(tmp_path / "shards/00000.jsonl")]
    (tmp_path / "shards/00000.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match="the manifest says 3"):
        expand_inputs((str(tmp_path),))


def test_manifests_are_checked_for_kind_version_size_and_bytes(tmp_path: Path) -> None:
    manifest = _augmented(tmp_path)
    manifest.write(tmp_path / "manifest.json")
    assert read_manifest(tmp_path / "manifest.json", "augmented") == manifest
    with pytest.raises(DataError, match="expected a manifest of kind 'token_dataset'"):
        read_manifest(tmp_path / "manifest.json", "token_dataset")
    (tmp_path / "shards/00000.jsonl").write_text("[]\n")
    check_outputs(manifest, tmp_path, checksums=False)
    with pytest.raises(DataError, match="SHA-256"):
        check_outputs(manifest, tmp_path, checksums=True)
    manifest.model_copy(update={"manifest_version": 99}).write(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="manifest version 99"):
        read_manifest(tmp_path / "manifest.json", "augmented")


def test_a_zstd_file_that_compresses_very_well_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.zst"
    path.write_bytes(zstandard.compress(b"x" * 200_000_000))
    assert path.stat().st_size < 100_000
    code = "import sys; from pathlib import Path; from tpt_megatron.files import stream_lines\n"
    code += "assert [length for _, length in stream_lines(Path(sys.argv[1]), longest=1000)] == [200_000_000]\n"
    code += "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) < 200_000, "kilobytes"
