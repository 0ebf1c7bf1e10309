"""What `tpt inspect` says of a dataset is what was written into it; and each damage that --verify looks for is found."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.datasets import open_dataset, sidecar
from tpt_megatron.errors import DataError, UsageError
from tpt_megatron.files import sha256_of
from tpt_megatron.inspection import summary as summaries
from tpt_megatron.inspection.printing import printable
from tpt_megatron.inspection.show import inspect_path
from tpt_megatron.inspection.summary import histogram, percentiles, summarise
from tpt_megatron.inspection.verify import verify
from tpt_megatron.preprocess.runner import run_preprocess


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Forty documents of three sources and none, with up to two thoughts."""
    with open(tmp_path / "in.jsonl", "w") as file:
        for i in range(40):
            thoughts = [{"text": "hm " * (i % 5 + 1), "generator": "g"}] * (i % 3)
            record = {"text": f"text {i} " * (i + 1), "thoughts": thoughts} | ({"source": f"s{i % 4}"} if i % 4 else {})
            file.write(json.dumps(record) + "\n")
    run_preprocess(PreprocessConfig(input=(str(tmp_path / "in.jsonl"),), output=tmp_path / "out", tokenizer="byte"))
    return tmp_path / "out/append/train"


def shown(path: Path, *, coloured: bool = False, documents: int = 2, plot: Path | None = None, check: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=coloured, color_system="standard" if coloured else None)
    inspect_path(path, console, documents=documents, plot=plot, check=check)
    return out.getvalue()


@pytest.mark.parametrize("block", [7, 1 << 22])
def test_counts_are_those_of_the_files_whatever_the_block(prefix: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(summaries, "TOKENS_AT_ONCE", block)
    dataset = open_dataset(prefix)
    summary = summarise(dataset)
    rows = pq.read_table(sidecar(prefix, "documents.parquet")).to_pylist()
    assert summary.parts is not None and summary.by_source is not None
    assert summary.parts["thinking"].tolist() == [row["tokens_thinking"] for row in rows]
    assert summary.tokens == len(dataset.tokens)
    for source in summary.by_source:
        of_it = [row for row in rows if row["source"] == source.name]
        assert source.sequences == len(of_it) == 10
        assert source.by_part["document"] == sum(row["tokens_document"] for row in of_it)
        assert source.by_part["thinking"] == sum(row["tokens_thinking"] for row in of_it)
    assert {source.name for source in summary.by_source} == {None, "s1", "s2", "s3"}
    totals = [source.tokens for source in summary.by_source]
    assert totals == sorted(totals, reverse=True)


def test_lengths_are_told_right() -> None:
    lengths = np.arange(1, 101, dtype=np.int32)
    told = percentiles(lengths)
    assert (told["min"], told["50 %"], told["90 %"], told["max"], told["mean"]) == (1, 50, 90, 100, 50.5)
    rows = histogram(lengths)
    assert rows[0][0] == 1 and rows[-1][1] == 101
    assert sum(count for _, _, count in rows) == 100
    assert all(count == end - begin for begin, end, count in rows)
    assert histogram(np.array([5, 5], np.int32)) == [(5, 6, 2)]


def test_a_dataset_is_shown_with_its_parts_marked(prefix: Path) -> None:
    text = shown(prefix)
    counts = json.loads(sidecar(prefix, "manifest.json").read_text())["counts"]
    for name in ("sequences", "tokens", "tokens_document", "tokens_thinking"):
        assert f"{counts[name]:,}" in text
    assert "text 1 text 1 ⟦\n<think>\nhm hm \n</think>⟧<|endoftext|>" in text
    assert "\x1b[" not in text
    coloured = shown(prefix, coloured=True)
    assert "⟦" not in coloured
    assert coloured.split("text 1 text 1 ")[1].startswith("\n\x1b[36m<think>")


def test_a_long_document_is_cut_in_its_middle_and_control_characters_are_spelled(prefix: Path) -> None:
    text = shown(prefix, documents=40)
    length = int(open_dataset(prefix).lengths[39])
    assert f"[… {length - 300:,} tokens …]" in text
    assert printable("a\x1b[31mb\u202ec\n\td\x00é😀") == "a\\u{1b}[31mb\\u{202e}c\n\td\\u{0}é😀"


def test_a_plain_megatron_dataset_and_an_output_folder_are_shown(prefix: Path) -> None:
    text = shown(prefix.parent.parent)
    assert "append/train" in text and "vanilla/train" in text
    for path in prefix.parent.iterdir():
        if path.suffix not in (".bin", ".idx") or path.name.count(".") > 1:
            path.unlink()
    text = shown(prefix.with_name("train.bin"))
    assert "a plain Megatron dataset" in text
    assert str(open_dataset(prefix).tokens[0]) in text
    with pytest.raises(UsageError, match="neither a dataset"):
        shown(prefix.with_name("nothing"))
    (prefix.parent / "empty").mkdir()
    with pytest.raises(UsageError, match="no dataset in it"):
        shown(prefix.parent / "empty")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_drawn(prefix: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"lengths.{ending}"
    assert f"picture: {path}" in shown(prefix, plot=path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")


def edited(ending: str, change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    def edit(prefix: Path) -> None:
        path = sidecar(prefix, ending)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return edit


def poked(at: int, value: bytes) -> Callable[[bytearray], None]:
    def poke(data: bytearray) -> None:
        begin = at % len(data)
        data[begin : begin + len(value)] = value

    return poke


def retabled(name: str, row: int, value: object) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = sidecar(prefix, "documents.parquet")
        table = pq.read_table(path)
        values = table.column(name).to_pylist()
        values[row] = value
        at = table.schema.get_field_index(name)
        pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type)), path)

    return change


def recounted(prefix: Path) -> None:
    path = sidecar(prefix, "manifest.json")
    value = json.loads(path.read_text())
    value["counts"]["tokens_thinking"] += 1
    value["counts"]["lines_read"] += 1
    path.write_text(json.dumps(value))


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "id outside": (edited("bin", poked(0, b"\xff\x7f")), ["1 ids are outside the vocabulary of 257"]),
    "end inside": (edited("bin", poked(0, b"\x00\x01")), ["1 end-of-document tokens stand inside a sequence"]),
    "end missing": (edited("bin", poked(-2, b"\x01\x00")), ["1 sequences do not end with the end-of-document token 256"]),
    "unknown part": (edited("parts.bin", poked(0, b"\x07")), ["1 tokens are of no known part"]),
    "end is thinking": (edited("parts.bin", poked(-1, b"\x01")), ["1 end-of-document tokens are not marked", "row 39, tokens_document", "tokens_thinking is"]),
    "source": (edited("sources.bin", poked(0, b"\x01\x00")), ["sources from row 0 on are not those of train.sources.bin"]),
    "no such source": (edited("sources.bin", poked(0, b"\x09\x00")), ["numbers of no source"]),
    "offset": (retabled("offset", 3, 5), ["row 3, offset: not what the dataset holds"]),
    "tokens": (retabled("tokens_thinking", 2, 5), ["row 2, tokens_thinking: not what the dataset holds"]),
    "table": (edited("documents.parquet", lambda data: data.__delitem__(slice(-10, None))), ["not a whole Parquet file"]),
    "counts": (recounted, ["tokens_thinking is", "lines_read is not records + bad_records + blank_lines"]),
    "tokenizer": (edited("tokenizer.json", lambda data: data.__setitem__(slice(None), data.replace(b'"!": 0', b'"!": 300'))), ["tokenizer_fingerprint is"]),
    "index": (edited("idx", poked(34, b"\x01")), ["pointers do not follow from its lengths"]),
}  # fmt: skip


@pytest.mark.parametrize("block", [64, 1 << 22])
@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_and_named(prefix: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int) -> None:
    monkeypatch.setattr(summaries, "TOKENS_AT_ONCE", block)
    findings: list[str] = []
    assert verify(prefix, lambda what, found: findings.extend(found)) == 0
    assert findings == []
    damage, expected = DAMAGES[name]
    damage(prefix)
    if name != "counts":
        # Checksums alone would find it; here they are made to agree, so that the content must tell.
        path = sidecar(prefix, "manifest.json")
        value = json.loads(path.read_text())
        changed = [entry for entry in value["outputs"] if entry["sha256"] != sha256_of(prefix.parent / entry["name"])]
        assert len(changed) == 1
        verify(prefix, lambda what, found: findings.extend(found))
        assert changed[0]["name"] in findings[0]
        changed[0] |= {"sha256": sha256_of(prefix.parent / changed[0]["name"]), "bytes": (prefix.parent / changed[0]["name"]).stat().st_size}
        path.write_text(json.dumps(value))
    findings.clear()
    assert verify(prefix, lambda what, found: findings.extend(found)) == len(findings) > 0
    for part in expected:
        assert any(part in finding for finding in findings), findings


def test_verify_says_every_check_and_fails_at_the_end(prefix: Path) -> None:
    said = shown(prefix, check=True)
    assert said.count(": ok\n") == 7
    edited("parts.bin", poked(0, b"\x07"))(prefix)
    with pytest.raises(DataError, match=r"2 finding\(s\), see above"):
        shown(prefix, check=True)
