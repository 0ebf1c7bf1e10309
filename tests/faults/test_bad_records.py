"""Broken input through both stages: every line is accounted for, and nothing half-written carries a finished name."""

from __future__ import annotations

import base64
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tpt_megatron.augment import shards
from tpt_megatron.augment.runner import run_augment
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.datasets import open_dataset
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.preprocess import joining
from tpt_megatron.preprocess.runner import run_preprocess
from tpt_megatron.records import text_id

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
    """What a stage says is done: all files, but for the plan, the claims of an augmentation, and a preprocessing's notes on itself."""
    if not folder.exists():
        return {}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "plan.json" and path.parent.name not in ("claims", "pieces"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def counts_of(config: AugmentConfig) -> dict[str, int]:
    manifest = run_augment(config)
    assert manifest is not None
    return manifest.counts


@pytest.mark.parametrize("line", BAD, ids=lambda line: repr(line[:24]))
def test_a_bad_record_is_set_aside_with_its_place_and_its_bytes(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"\n\n" + line + b"\n \t\n" + GOOD)
    counts = counts_of(augment(tmp_path))
    assert (counts["documents"], counts["thoughts"], counts["bad_records"], counts["blank_lines"], counts["lines_read"]) == (2, 2, 1, 2, 5)
    (aside,) = (tmp_path / "out/bad").iterdir()
    (entry,) = (json.loads(text) for text in aside.read_text(encoding="utf-8").splitlines())
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
    counts = counts_of(augment(tmp_path, format="jsonl"))
    assert (counts["documents"], counts["bad_records"]) == (2, 0)
    run_preprocess(preprocess(tmp_path, output=tmp_path / "data"))
    assert counts_of(augment(tmp_path, format="jsonl")) == counts
    assert not (tmp_path / "data/bad_records.jsonl").exists()
    (shard,) = (tmp_path / "out/shards").glob("00000-*")
    assert json.loads(shard.read_bytes().splitlines()[1])["text"] == "a\x00b\r\n"


def test_an_input_without_a_document_is_an_error_and_one_such_file_among_others_is_none(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"none of the 2 lines of .*in\.jsonl gave a document"):
        run_augment(augment(tmp_path))
    assert not (tmp_path / "out/manifest.json").exists()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    assert counts_of(augment(tmp_path, input=[str(tmp_path / "empty.jsonl"), str(tmp_path / "good.jsonl")], output=tmp_path / "more"))["documents"] == 1


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_cut_off_compressed_input_stops_the_run_and_nothing_is_finished(tmp_path: Path, ending: str) -> None:
    data = b"".join(b'{"text": "document %d", "mind": "m"}\n' % i for i in range(3000))
    compressed = gzip.compress(data) if ending == "gz" else zstandard.compress(data)
    path = tmp_path / f"in.jsonl.{ending}"
    path.write_bytes(compressed[:-30])
    for run in (lambda: run_augment(augment(tmp_path, input=str(path))), lambda: run_preprocess(preprocess(tmp_path, input=str(path)))):
        with pytest.raises(DataError, match="damaged or cut off after line"):
            run()
        assert not [name for name in finished(tmp_path / "out") if not name.startswith("pieces/")]


def test_ten_bad_records_are_named_and_the_rest_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"{\n" * 25 + GOOD)
    with caplog.at_level(logging.WARNING, "tpt_megatron"):
        run_augment(augment(tmp_path))
    assert sum("set aside" in message and "in.jsonl:" in message for message in caplog.messages) == 10
    assert f"25 bad records were set aside, see {tmp_path / 'out/bad'}" in caplog.messages


@pytest.mark.parametrize("policy", ["set_aside", "fail"])
def test_one_malformed_record_in_ten_thousand_is_reported_and_the_rest_goes_on(tmp_path: Path, policy: str) -> None:
    """Every kind of malformed record, each amid 10,000 good ones, a 10 MB line among them."""
    malformed = {**BAD, b'{"text": "' + b"x" * 10_000_000 + b'"}': "the record has 10,000,0"}
    for number, (line, reason) in enumerate(malformed.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "in.jsonl").write_bytes((GOOD + b"\n") * 4999 + line + b"\n" + (GOOD + b"\n") * 5000)
        if policy == "fail":
            with pytest.raises(RecordError, match=r"in\.jsonl:5000: ") as caught:
                run_augment(augment(folder, on_bad_record="fail"))
            assert reason in caught.value.reason
            assert not (folder / "out/manifest.json").exists()
            continue
        counts = counts_of(augment(folder))
        assert (counts["documents"], counts["bad_records"], counts["lines_read"]) == (9999, 1, 10_000)
        (aside,) = (folder / "out/bad").iterdir()
        (entry,) = (json.loads(text) for text in aside.read_text(encoding="utf-8").splitlines())
        assert entry["where"] == f"{folder / 'in.jsonl'}:5000"
        assert reason in entry["reason"]
        assert aside.stat().st_size < 20_000


def test_after_fail_the_same_command_with_set_aside_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes((GOOD + b"\n") * 50 + b"{\n" + (GOOD + b"\n") * 50)
    with pytest.raises(RecordError):
        run_augment(augment(tmp_path, on_bad_record="fail", shard={"documents": 10}))
    kept = len(list((tmp_path / "out/shards").glob("*.manifest.json")))
    assert 0 < kept < 11
    assert counts_of(augment(tmp_path, shard={"documents": 10}))["documents"] == 100


def test_parquet_rows_that_cannot_be_used_are_set_aside_by_row(tmp_path: Path) -> None:
    texts = pa.array(["good", None, "", "good", "good"])
    binary = pa.array([b"good", b"good", b"good", b"\xff\xfe", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts, "mind": binary}), tmp_path / "in.parquet")
    counts = counts_of(augment(tmp_path, input=str(tmp_path / "in.parquet")))
    assert (counts["documents"], counts["bad_records"], counts["lines_read"]) == (2, 3, 5)
    (aside,) = (tmp_path / "out/bad").iterdir()
    entries = [json.loads(text) for text in aside.read_text(encoding="utf-8").splitlines()]
    assert [entry["where"].rsplit(":", 1)[1] for entry in entries] == ["row 2", "row 3", "row 4"]
    assert "not valid UTF-8" in entries[2]["reason"]


@pytest.mark.parametrize(
    ("thought", "reason"),
    [
        ({"text": "x", "generator": "g", "sample": 2**63}, "field 'sample' must be a number of 64 bits"),
        ({"text": "x", "generator": "g", "tokens": 2**64 - 1}, "field 'tokens' must be a number of 64 bits"),
        ({"text": "x"}, "field 'generator' is missing"),
        ("x", "a thought must be a JSON object"),
    ],
)
def test_a_thought_that_the_record_brought_and_no_output_can_hold_is_set_aside(tmp_path: Path, thought: Any, reason: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(json.dumps({"text": "a", "mind": "m", "thoughts": [thought]}).encode() + b"\n" + GOOD)
    counts = counts_of(augment(tmp_path))
    assert (counts["documents"], counts["bad_records"]) == (1, 1)
    (aside,) = (tmp_path / "out/bad").iterdir()
    assert reason in json.loads(aside.read_text(encoding="utf-8"))["reason"]


def test_parquet_values_that_python_cannot_hold_spoil_their_row_only(tmp_path: Path) -> None:
    """Whether or not pandas, whose times have nanoseconds, is installed."""
    times = pa.array([0, 1_000_000_001, 2**62 // 1000 * 1000], pa.timestamp("ns"))
    inside = pa.array([[{"at": time}] for time in times], pa.list_(pa.struct({"at": pa.timestamp("ns")})))
    binary = pa.array([[{"text": "x", "generator": "g", "b": b"1"}], None, None])
    for name, values in (("time", times), ("seen", inside), ("thoughts", binary)):
        pq.write_table(pa.table({"text": ["a", "b", "c"], "mind": ["m"] * 3, name: values}), tmp_path / f"{name}.parquet")
    counts = counts_of(augment(tmp_path, input=[str(tmp_path / f"{name}.parquet") for name in ("time", "seen", "thoughts")]))
    assert (counts["lines_read"], counts["documents"], counts["bad_records"]) == (9, 6, 3)


def test_our_own_parquet_with_columns_taken_away_is_read_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    run_augment(augment(tmp_path))
    (shard,) = (tmp_path / "out/shards").glob("*.parquet")
    pq.write_table(pq.read_table(shard).drop_columns(["extra"]).append_column("mind", pa.array(["m"])), tmp_path / "fewer.parquet")
    assert counts_of(augment(tmp_path, input=str(tmp_path / "fewer.parquet"), output=tmp_path / "again"))["documents"] == 1


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("more", [-1, 0, 1, 2, 3, 5])
def test_the_largest_record_is_known_to_the_byte(tmp_path: Path, ending: bytes, more: int) -> None:
    line = b'{"text": "' + b"x" * (1000 + more - len(GOOD) + 4) + b'", "mind": "m"}'
    (tmp_path / "in.jsonl").write_bytes(GOOD + b"\n" + line + ending)
    counts = counts_of(augment(tmp_path, max_record_megabytes=0.001))
    assert len(line) == 1000 + more
    assert counts["bad_records"] == (more > 0)
    if more > 0:
        (aside,) = (tmp_path / "out/bad").iterdir()
        assert "more than max_record_megabytes allows" in json.loads(aside.read_text(encoding="utf-8"))["reason"]


def test_two_fields_that_would_be_kept_under_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"k": "9", "id": 1, "input_id": 2, "text": "a", "mind": "m"}\n' + GOOD)
    counts = counts_of(augment(tmp_path, fields={"id": "k"}))
    assert (counts["documents"], counts["bad_records"]) == (1, 1)


def test_a_cut_off_parquet_stops_the_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 1000, "mind": ["m"] * 1000}), tmp_path / "in.parquet")
    (tmp_path / "in.parquet").write_bytes((tmp_path / "in.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"in\.parquet: not a whole Parquet file"):
        run_augment(augment(tmp_path, input=str(tmp_path / "in.parquet")))
    assert finished(tmp_path / "out") == {}


def test_an_error_in_the_middle_keeps_finished_shards_and_leaves_no_half_written_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.jsonl").write_bytes(b"{\n" + GOOD.replace(b"good", name.encode()) + b"\n")
    config = augment(tmp_path, input=str(tmp_path / "in"))
    original = shards.ShardWriter.commit

    def commit(self: shards.ShardWriter, opened: shards.OpenShard) -> bool:
        if opened.shard.number == 1:
            raise OSError(28, "No space left on device")
        return original(self, opened)

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "commit", commit)
        with pytest.raises(OSError, match="No space left"):
            run_augment(config)
    assert not [name for name in finished(tmp_path / "out") if "00001" in name and not name.startswith("journal")]
    with pytest.raises(DataError, match="unfinished output"):
        run_preprocess(preprocess(tmp_path, input=str(tmp_path / "out"), output=tmp_path / "data"))
    assert counts_of(config)["documents"] == 2


def test_an_error_while_datasets_are_joined_names_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    original = joining.DatasetJoin.close

    def close(join: joining.DatasetJoin) -> Any:
        if join._prefix.parent.name == "append":
            raise OSError(28, "No space left on device")
        return original(join)

    with monkeypatch.context() as patch:
        patch.setattr(joining.DatasetJoin, "close", close)
        with pytest.raises(OSError, match="No space left"):
            run_preprocess(preprocess(tmp_path))
    assert not [name for name in finished(tmp_path / "out") if not name.startswith("pieces/")]
    assert run_preprocess(preprocess(tmp_path))["append/train"].counts["documents"] == 1


PREPROCESS_BAD = {line: reason for line, reason in BAD.items() if reason != AUGMENT_ONLY} | {
    b'{"text": "a", "text": "b"}': "the key 'text' stands twice",
    b'{"text": "a", "source": 7}': "field 'source' must be a string, found int",
    b'{"text": " \\n\\t "}': "field 'text' is empty",
    b'{"text": "a", "thoughts": "b"}': "field 'thoughts' must be a list",
    b'{"text": "a"} {"text": "b"}': "not valid JSON",
    b"\xff\xfe{\x00": "not valid UTF-8",
    b'{"text": "' + b"x" * 3_000_000 + b'"}': "the record has 3,000,012 bytes",
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_what_went_in_came_out_or_was_set_aside_and_the_manifest_proves_it(tmp_path: Path, ending: str, workers: int) -> None:
    """Every kind of malformed line, each among hundreds of good ones, blank lines and CRLF, cut into pieces, in every kind of file."""
    lines: list[bytes] = []
    for line in PREPROCESS_BAD:
        lines += [b'{"text": "good %d"}%s' % (len(lines) + i, b"\r" if i % 2 else b"") for i in range(300)] + [b"", line]
    data = b"\xef\xbb\xbf" + b"\n".join(lines)
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[ending]
    path = tmp_path / f"in.{ending}"
    path.write_bytes(pack(data))
    (tmp_path / "empty.jsonl").touch()
    given = {"input": [str(path), str(tmp_path / "empty.jsonl")], "piece_megabytes": 0.01, "workers": workers, "max_record_megabytes": 2}
    counts = run_preprocess(preprocess(tmp_path, **given))["append/train"].counts
    assert counts["lines_read"] == len(lines) == counts["documents"] + counts["bad_records"] + counts["blank_lines"]
    assert (counts["bad_records"], counts["blank_lines"]) == (len(PREPROCESS_BAD), len(PREPROCESS_BAD))
    entries = [json.loads(entry) for entry in (tmp_path / "out/bad_records.jsonl").read_text().splitlines()]
    for entry, (line, reason) in zip(entries, PREPROCESS_BAD.items(), strict=True):
        assert entry["where"] == f"{path}:{lines.index(line) + 1}"
        assert reason in entry["reason"]
        set_aside = base64.b64decode(entry["base64"]) if "base64" in entry else entry["line"].encode()
        assert set_aside == (line if len(line) < 2_000_000 else line[:4096])
    ids = [row["id"] for row in pq.read_table(tmp_path / "out/append/train.documents.parquet").to_pylist()]
    assert ids == [text_id(json.loads(line)["text"]) for line in lines if line.startswith(b'{"text": "good')]


@pytest.mark.parametrize("line", PREPROCESS_BAD, ids=lambda line: repr(line[:24]))
def test_under_fail_preprocess_names_file_and_line_in_any_piece(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes((GOOD + b"\n") * 500 + line + b"\n" + GOOD)
    with pytest.raises(RecordError, match=r"in\.jsonl:501: ") as caught:
        run_preprocess(preprocess(tmp_path, on_bad_record="fail", piece_megabytes=0.002, max_record_megabytes=2))
    assert PREPROCESS_BAD[line] in caught.value.reason
    assert not list((tmp_path / "out").glob("*/*.manifest.json"))


def test_parquet_rows_that_preprocess_cannot_use_are_set_aside_by_row_and_damaged_files_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": pa.array(["good", None, "", "good", "good"] * 40)}), path, row_group_size=20)
    counts = run_preprocess(preprocess(tmp_path, input=str(path), piece_megabytes=0.0001, workers=2))["vanilla/train"].counts
    assert (counts["lines_read"], counts["documents"], counts["bad_records"]) == (200, 120, 80)
    places = [json.loads(entry)["where"] for entry in (tmp_path / "out/bad_records.jsonl").read_text().splitlines()]
    assert places == [f"{path}:row {row}" for row in range(1, 201) if row % 5 in (2, 3)]
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"in\.parquet: not a whole Parquet file"):
        run_preprocess(preprocess(tmp_path, input=str(path), output=tmp_path / "cut"))
    path.write_bytes(data[:60] + bytes(100) + data[160:])
    with pytest.raises(DataError, match=r"in\.parquet: damaged after row \d+"):
        run_preprocess(preprocess(tmp_path, input=str(path), output=tmp_path / "damaged"))
