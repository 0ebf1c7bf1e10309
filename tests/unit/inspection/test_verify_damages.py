"""--verify against datasets written by the format's description: whole ones pass, and each damage is named with its place."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.token_files import Sequence, edit_manifest, seal, write_token_files
from tpt_megatron.inspection import summary as summaries
from tpt_megatron.inspection import verify as verifying
from tpt_megatron.inspection.verify import verify

# Lengths 6, 5, 4, 6, 5, 4, ...: sequence 2 is tokens 11 to 14.
SEQUENCES: list[Sequence] = [([1, 2, 3], [4, 5][: 2 - i % 3], ["web", None, "code"][i % 3]) for i in range(30)]


def poke(ending: str, dtype: str, values: dict[int, int]) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        data = np.fromfile(f"{prefix}.{ending}", dtype)
        for at, value in values.items():
            data[at] = value
        data.tofile(f"{prefix}.{ending}")

    return damage


def retable(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda prefix: pq.write_table(change(pq.read_table(f"{prefix}.documents.parquet")), f"{prefix}.documents.parquet", row_group_size=7)


def column(name: str, row: int, value: object) -> Callable[[Path], None]:
    def change(table: pa.Table) -> pa.Table:
        values = table.column(name).to_pylist()
        values[row] = value
        return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type))

    return retable(change)


def two_wrong_offsets(table: pa.Table) -> pa.Table:
    values = table.column("offset").to_pylist()
    values[3] = values[28] = 1
    return table.set_column(6, "offset", pa.array(values, pa.int64()))


def without_bad_records(value: dict[str, Any]) -> None:
    del value["counts"]["bad_records"]
    value["counts"]["lines_read"] = 32


def empty_sequence(prefix: Path) -> None:
    """Give sequence 2's tokens to sequence 1, in the index: all of it holds together, but sequence 2 has nothing."""
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    lengths = np.frombuffer(data, "<i4", 30, 34).copy()
    lengths[1], lengths[2] = lengths[1] + lengths[2], 0
    data[34 : 34 + 120] = lengths.tobytes()
    data[154 : 154 + 240] = (np.cumsum([0, *lengths[:-1]]) * 2).astype("<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(data)


def header(at: int, form: str, value: object) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        data = bytearray(Path(f"{prefix}.idx").read_bytes())
        struct.pack_into(form, data, at, value)
        Path(f"{prefix}.idx").write_bytes(data)

    return damage


def damaged_page(prefix: Path) -> None:
    """Overwrite the table's pages; its footer stays."""
    path = Path(f"{prefix}.documents.parquet")
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)


def cut(ending: str) -> Callable[[Path], None]:
    return lambda prefix: Path(f"{prefix}.{ending}").write_bytes(Path(f"{prefix}.{ending}").read_bytes()[:-2])


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda prefix: edit_manifest(prefix, change)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "id outside": (poke("bin", "u2", {12: 999}), "train.bin: 1 ids are outside the vocabulary of 257, the first at token 1 of sequence 2"),
    "ids outside": (poke("bin", "u2", {12: 999, 0: 257}), "2 ids are outside the vocabulary of 257, the first at token 0 of sequence 0"),
    "end inside": (poke("bin", "u2", {7: 256}), "1 end-of-document tokens stand inside a sequence, the first at token 1 of sequence 1"),
    "end missing": (poke("bin", "u2", {14: 9}), "1 sequences do not end with the end-of-document token 256, the first at token 3 of sequence 2"),
    "last end missing": (poke("bin", "u2", {-1: 9}), "of sequence 29"),
    "empty sequence": (empty_sequence, "train.idx: 1 sequences are empty, the first is 2"),
    "part": (poke("parts.bin", "u1", {5: 3}), "1 tokens are of no known part, the first at token 5 of sequence 0"),
    "end is thinking": (poke("parts.bin", "u1", {5: 1}), "1 end-of-document tokens are not marked as document, the first at token 5 of sequence 0"),
    "thinking moved": (poke("parts.bin", "u1", {0: 0}), "row 0, tokens_thinking: not what the dataset holds (1 such rows)"),
    "source number": (poke("sources.bin", "u2", {4: 2}), "sources from row 4 on are not those of train.sources.bin (1 such rows)"),
    "no such source": (poke("sources.bin", "u2", {4: 3}), "train.sources.bin: 1 sequences have numbers of no source"),
    "sources cut": (cut("sources.bin"), "train.sources.bin: 58 bytes"),
    "table source": (column("source", 29, "other"), "sources from row 29 on"),
    "table source null": (column("source", 0, None), "sources from row 0 on"),
    "table offset": (column("offset", 20, 1), "row 20, offset: not what the dataset holds"),
    "table null": (column("tokens_document", 20, None), "row 20, tokens_document: not what the dataset holds"),
    "table thinking": (column("tokens_thinking", 8, 9), "row 8, tokens_thinking: not what the dataset holds"),
    "two rows": (retable(two_wrong_offsets), "row 3, offset: not what the dataset holds (2 such rows)"),
    "table rows": (retable(lambda table: table.slice(1)), "train.documents.parquet: 29 rows for 30 sequences"),
    "table columns": (retable(lambda table: table.drop_columns(["id"])), "its columns are sample, source"),
    "table cut": (cut("documents.parquet"), "not a whole Parquet file"),
    "table page": (damaged_page, "not a whole Parquet file"),
    "count of sequences": (manifest(lambda value: value["counts"].update(sequences=1)), "sequences is 1, the dataset holds 30"),
    "count of thinking": (manifest(lambda value: value["counts"].update(tokens_thinking=1)), "tokens_thinking is 1, the dataset holds 30"),
    "count is missing": (manifest(lambda value: value["counts"].pop("records")), "lines_read is not records + bad_records + blank_lines"),
    "count of nothing is missing": (manifest(without_bad_records), "lines_read is not records + bad_records + blank_lines (32, 30, None, 2)"),
    "details": (manifest(lambda value: value["details"].pop("eod_id")), "its details lack eod_id"),
    "fingerprint": (manifest(lambda value: value["details"].update(tokenizer_fingerprint="0")), "the manifest says 0"),
    "tokenizer": (lambda prefix: Path(f"{prefix}.tokenizer.json").write_text("{}"), "not a tokenizer.json"),
    "end of document": (manifest(lambda value: value["details"].update(end_of_document="</s>")), "is not a token of this tokenizer"),
    "magic": (header(0, "<B", 0), "not a Megatron index"),
    "version": (header(9, "<Q", 2), "index version 2"),
    "dtype": (header(17, "<B", 99), "dtype code 99"),
    "number of sequences": (header(18, "<Q", 31), "its header says"),
    "pointer": (header(34 + 120 + 8, "<q", 0), "its pointers do not follow from its lengths"),
    "boundary": (header(34 + 120 + 240 + 8, "<q", 40), "its document boundaries do not run from 0 to 30"),
    "bin cut": (cut("bin"), "the files do not belong together or were cut off"),
}


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_token_files(tmp_path / "train", SEQUENCES)
    return tmp_path / "train"


def findings_of(prefix: Path) -> list[str]:
    findings: list[str] = []
    assert verify(prefix, lambda what, found: findings.extend(found)) == len(findings)
    return findings


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
@pytest.mark.parametrize("block", [1, 4, 1 << 22])
def test_a_whole_dataset_has_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int) -> None:
    monkeypatch.setattr(summaries, "TOKENS_AT_ONCE", block)
    monkeypatch.setattr(verifying, "ROWS_AT_ONCE", 4)
    write_token_files(tmp_path / "train", SEQUENCES, dtype)
    assert findings_of(tmp_path / "train") == []


@pytest.mark.parametrize("block", [4, 1 << 22])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_that_checksums_do_not_tell_is_named(prefix: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int) -> None:
    monkeypatch.setattr(summaries, "TOKENS_AT_ONCE", block)
    monkeypatch.setattr(verifying, "ROWS_AT_ONCE", 4)
    damage, expected = DAMAGES[name]
    damage(prefix)
    seal(prefix)
    findings = findings_of(prefix)
    assert any(expected in finding for finding in findings), findings


@pytest.mark.parametrize("ending", ["bin", "idx", "parts.bin", "sources.bin", "documents.parquet", "tokenizer.json"])
@pytest.mark.parametrize("change", ["byte", "cut", "gone"])
def test_every_file_of_the_manifest_is_checked(prefix: Path, ending: str, change: str) -> None:
    path = Path(f"{prefix}.{ending}")
    data = path.read_bytes()
    path.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if change == "byte" else b""))
    if change == "gone":
        path.unlink()
    message = {"byte": "its SHA-256 is not the manifest's", "cut": "bytes, the manifest says", "gone": "named in the manifest but missing"}[change]
    assert f"{path}: " in findings_of(prefix)[0]
    assert message in findings_of(prefix)[0]


@pytest.mark.parametrize("block", [1, 4, 1 << 22])
@pytest.mark.parametrize("at", [0, 2, 29])
def test_an_empty_sequence_of_which_all_files_agree_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, block: int) -> None:
    monkeypatch.setattr(summaries, "TOKENS_AT_ONCE", block)
    sequences = [([], [], source) if i == at else (document, thinking, source) for i, (document, thinking, source) in enumerate(SEQUENCES)]
    write_token_files(tmp_path / "train", sequences)
    assert findings_of(tmp_path / "train") == [f"{tmp_path}/train.idx: 1 sequences are empty, the first is {at}"]


def test_a_manifest_that_names_no_bin_is_a_finding(prefix: Path) -> None:
    edit_manifest(prefix, lambda value: value["outputs"].pop(0))
    assert "does not name train.bin among its outputs" in findings_of(prefix)[0]
