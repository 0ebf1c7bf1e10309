"""Broken input through both stages: every line is accounted for, and nothing half-written carries a finished name."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tpt_megatron.augment import generators
from tpt_megatron.augment.runner import run_augment
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.datasets import open_dataset
from tpt_megatron.demo.corpus import write_corpus
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.preprocess.dataset import DatasetWriter
from tpt_megatron.preprocess.runner import run_preprocess

GOOD = b'{"text": "good", "mind": "m"}'
BAD = {
    b'{"text": "cut': "not valid JSON",
    b'{"text": "\xff\xfe", "mind": "m"}': "not valid UTF-8 at byte 10",
    b'{"text": "", "mind": "m"}': "field 'text' is empty",
    b'{"txt": "a", "mind": "m"}': "field 'text' is missing",
    b'{"text": null, "mind": "m"}': "found null",
    b'{"text": 12, "mind": "m"}': "found int",
    b'{"text": "a\\ud800", "mind": "m"}': "not valid JSON",
    b'{"text": NaN}': "not valid JSON",
    b'"text"': "a record must be a JSON object, found str",
    b"\x00\x00": "not valid JSON",
    b'{"text": "a", "mind": "m", "deep": ' + b"[" * 500 + b"]" * 500 + b"}": "cannot be written as JSON",
}
AUGMENT_ONLY = "cannot be written as JSON"


def augment(folder: Path, **changes: Any) -> AugmentConfig:
    return AugmentConfig.model_validate(
        {"input": str(folder / "in.jsonl"), "output": folder / "out", "generator": {"kind": "field", "field": "mind"}} | changes
    )


def preprocess(folder: Path, **changes: Any) -> PreprocessConfig:
    return PreprocessConfig.model_validate({"input": str(folder / "in.jsonl"), "output": folder / "out", "tokenizer": "byte"} | changes)


def finished(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} if folder.exists() else {}


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line[:24]))
def test_a_bad_record_is_set_aside_with_its_place_and_its_bytes(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"\n\n" + line + b"\n \t\n" + GOOD)
    counts = run_augment(augment(tmp_path)).counts
    assert counts == {"documents": 2, "thoughts": 2, "bad_records": 1, "blank_lines": 2, "lines_read": 5}
    (entry,) = (json.loads(text) for text in (tmp_path / "out/bad/00000.jsonl").read_text(encoding="utf-8").splitlines())
    assert entry["where"] == f"{tmp_path / 'in.jsonl'}:3"
    assert BAD[line] in entry["reason"]
    assert (base64.b64decode(entry["base64"]) if "base64" in entry else entry["line"].encode()) == line
    if BAD[line] != AUGMENT_ONLY:
        manifest = run_preprocess(preprocess(tmp_path, output=tmp_path / "data"))["vanilla/train"]
        assert (manifest.counts["documents"], manifest.counts["bad_records"], manifest.counts["blank_lines"]) == (2, 1, 2)
        assert json.loads((tmp_path / "data/bad_records.jsonl").read_text(encoding="utf-8")) == entry
        assert len(open_dataset(tmp_path / "data/vanilla/train").lengths) == 2


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line[:24]))
def test_under_fail_the_first_bad_record_stops_the_run_and_nothing_is_finished(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    with pytest.raises(RecordError, match=r"in\.jsonl:2: ") as caught:
        run_augment(augment(tmp_path, on_bad_record="fail"))
    assert BAD[line] in caught.value.reason
    assert finished(tmp_path / "out") == {}
    if BAD[line] != AUGMENT_ONLY:
        with pytest.raises(RecordError, match=r"in\.jsonl:2: "):
            run_preprocess(preprocess(tmp_path, on_bad_record="fail", output=tmp_path / "data"))
        assert finished(tmp_path / "data") == {}


def test_byte_order_mark_carriage_returns_and_nul_inside_a_string_are_no_faults(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + b'{"text": "a\\u0000b\\r\\n", "mind": "m"}' + b"\r\n")
    counts = run_augment(augment(tmp_path)).counts
    assert (counts["documents"], counts["bad_records"]) == (2, 0)
    run_preprocess(preprocess(tmp_path, output=tmp_path / "data"))
    assert run_augment(augment(tmp_path)).counts == counts
    assert not (tmp_path / "data/bad_records.jsonl").exists()
    assert json.loads((tmp_path / "out/shards/00000.jsonl").read_bytes().splitlines()[1])["text"] == "a\x00b\r\n"


def test_an_empty_file_is_an_empty_shard_but_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    assert run_augment(augment(tmp_path)).counts["lines_read"] == 0
    with pytest.raises(DataError, match="no document for train"):
        run_preprocess(preprocess(tmp_path, input=str(tmp_path / "out"), output=tmp_path / "data"))
    assert finished(tmp_path / "data") == {}


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_cut_off_compressed_input_stops_the_run_and_nothing_is_finished(tmp_path: Path, ending: str) -> None:
    data = b"".join(b'{"text": "document %d", "mind": "m"}\n' % i for i in range(3000))
    compressed = gzip.compress(data) if ending == "gz" else zstandard.compress(data)
    path = tmp_path / f"in.jsonl.{ending}"
    path.write_bytes(compressed[:-30])
    for run in (lambda: run_augment(augment(tmp_path, input=str(path))), lambda: run_preprocess(preprocess(tmp_path, input=str(path)))):
        with pytest.raises(DataError, match="damaged or cut off after line"):
            run()
        assert finished(tmp_path / "out") == {}


def test_ten_bad_records_are_named_and_the_rest_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"{\n" * 25 + GOOD)
    with caplog.at_level(logging.WARNING, "tpt_megatron"):
        run_augment(augment(tmp_path))
    assert sum("set aside" in message and "in.jsonl:" in message for message in caplog.messages) == 10
    assert f"25 bad records were set aside, see {tmp_path / 'out/bad'}" in caplog.messages


def test_an_error_in_the_middle_keeps_finished_shards_and_leaves_no_half_written_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.jsonl").write_bytes(b"{\n" + GOOD.replace(b"good", name.encode()) + b"\n")
    config = augment(tmp_path, input=str(tmp_path / "in"))
    original = generators.FieldThoughts.think

    def think(self: generators.FieldThoughts, document: Any, where: str) -> Any:
        if document.text == "b":
            raise RuntimeError("the machine caught fire")
        return original(self, document, where)

    with monkeypatch.context() as patch:
        patch.setattr(generators.FieldThoughts, "think", think)
        with pytest.raises(RuntimeError, match="caught fire"):
            run_augment(config)
    assert sorted(finished(tmp_path / "out")) == ["bad/00000.jsonl", "shards/00000.jsonl", "shards/00000.manifest.json"]
    with pytest.raises(DataError, match="unfinished output"):
        run_preprocess(preprocess(tmp_path, input=str(tmp_path / "out"), output=tmp_path / "data"))
    assert run_augment(config).counts["documents"] == 2


def test_an_error_while_datasets_are_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    original = DatasetWriter.finish

    def finish(self: DatasetWriter) -> list[Path]:
        if self.prefix.parent.name == "append":
            raise OSError(28, "No space left on device")
        return original(self)

    monkeypatch.setattr(DatasetWriter, "finish", finish)
    with pytest.raises(OSError, match="No space left"):
        run_preprocess(preprocess(tmp_path))
    assert finished(tmp_path / "out") == {}


SLOW_RUN = """
import sys, time
from tpt_megatron.augment import worked
from tpt_megatron.augment.runner import run_augment
from tpt_megatron.config.augment import AugmentConfig
think = worked.WorkedThoughts.think
def slowly(self, document, where):
    time.sleep(0.002)
    return think(self, document, where)
worked.WorkedThoughts.think = slowly
run_augment(AugmentConfig(input=sys.argv[1], output=sys.argv[2], generator={"kind": "worked"}))
"""


def test_a_killed_augment_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for number in range(3):
        write_corpus(tmp_path / f"in/{number}.jsonl", 300, seed=number, held_out=set())
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(tmp_path / "in"), str(output)])
    try:
        deadline = time.monotonic() + 120
        while not (output / "shards/00000.manifest.json").exists() or not list(output.glob("shards/.00001.jsonl.*.tmp")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    assert not (output / "shards/00001.jsonl").exists()
    kept = (output / "shards/00000.jsonl").stat()
    with pytest.raises(DataError, match="unfinished output"):
        run_preprocess(preprocess(tmp_path, input=str(output), output=tmp_path / "data"))

    config = {"input": str(tmp_path / "in"), "generator": {"kind": "worked"}}
    run_augment(AugmentConfig.model_validate(config | {"output": output}))
    run_augment(AugmentConfig.model_validate(config | {"output": tmp_path / "undisturbed"}))
    assert finished(output) == finished(tmp_path / "undisturbed")
    after = (output / "shards/00000.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
