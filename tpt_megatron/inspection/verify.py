"""Verifying a token dataset: every checksum, bound and count that its files give for each other, a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tpt_megatron.datasets import CHAT_PARTS, MANIFEST_KIND, PART_DOCUMENT, SOURCE_DTYPE, TokenDataset, document_columns, open_dataset, sidecar
from tpt_megatron.errors import DataError, TptError
from tpt_megatron.files import Manifest, read_manifest, sha256_of
from tpt_megatron.inspection.documents import tokenizer_file
from tpt_megatron.inspection.summary import blocks, part_lengths
from tpt_megatron.tokenizer import load_tokenizer

ROWS_AT_ONCE = 1 << 16
NEEDED_DETAILS = ("vocabulary_size", "eod_id", "end_of_document", "tokenizer_fingerprint", "sources")


def verify(prefix: Path, say: Callable[[str, list[str]], None]) -> int:
    """Check everything; `say(what, findings)` hears of each check, whose findings are empty where all is well. Returns how many there were.

    Without a manifest only the index can be checked: nothing tells the vocabulary or the end-of-document token. Raises
    DataError when the manifest itself cannot be read.
    """
    found = 0

    def check(what: str, findings: Iterator[str]) -> list[str]:
        nonlocal found
        listed = list(findings)
        found += len(listed)
        say(what, listed)
        return listed

    manifest = read_manifest(sidecar(prefix, "manifest.json"), MANIFEST_KIND) if sidecar(prefix, "manifest.json").is_file() else None
    if manifest is not None:
        check("sizes and SHA-256 of all files", _checksums(prefix, manifest))
    try:
        dataset = open_dataset(prefix)
    except DataError as error:
        check("index, pointers and boundaries", iter([f"{error}; the dataset cannot be opened, so its tokens and tables were not checked"]))
        if manifest is not None:
            check("tokenizer", _tokenizer(prefix, manifest.details))
        return found
    check("index, pointers and boundaries", _lengths(dataset))
    if manifest is None:
        return found
    lacking = [name for name in NEEDED_DETAILS if name not in manifest.details]
    if lacking:
        check("details of the manifest", iter([f"{sidecar(prefix, 'manifest.json')}: its details lack {', '.join(lacking)}; nothing more can be checked"]))
        return found
    check("ids and end-of-document tokens", _ids(dataset, manifest.details))
    lengths: dict[str, npt.NDArray[np.int32]] = {}
    if dataset.parts is not None:
        lengths = part_lengths(dataset)
        check("parts", _parts(dataset))
        check("document table and sources", _table(dataset, lengths, manifest.details["sources"]))
    check("counts of the manifest", _counts(dataset, lengths, manifest))
    check("tokenizer", _tokenizer(prefix, manifest.details))
    return found


def _checksums(prefix: Path, manifest: Manifest) -> Iterator[str]:
    named = {entry.name for entry in manifest.outputs}
    for ending in ("bin", "idx"):
        if f"{prefix.name}.{ending}" not in named:
            yield f"{sidecar(prefix, 'manifest.json')}: does not name {prefix.name}.{ending} among its outputs"
    for entry in manifest.outputs:
        path = prefix.parent / entry.name
        if not path.is_file():
            yield f"{path}: named in the manifest but missing"
        elif path.stat().st_size != entry.bytes:
            yield f"{path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}"
        elif sha256_of(path) != entry.sha256:
            yield f"{path}: its SHA-256 is not the manifest's"


def _lengths(dataset: TokenDataset) -> Iterator[str]:
    """Find what `open_dataset` lets pass: a sequence without any token, which cannot hold its end-of-document token."""
    empty = np.flatnonzero(dataset.lengths == 0)
    if len(empty) and dataset.details is not None:
        yield f"{sidecar(dataset.prefix, 'idx')}: {len(empty)} sequences are empty, the first is {int(empty[0])}"


def _ids(dataset: TokenDataset, details: dict[str, Any]) -> Iterator[str]:
    vocabulary, eod = details["vocabulary_size"], details["eod_id"]
    outside, inside, missing = _Places(), _Places(), _Places()
    for first, last, begin, end in blocks(dataset):
        tokens = np.asarray(dataset.tokens[begin:end])
        is_last = np.zeros(end - begin, np.bool_)
        is_last[_last_tokens(dataset, first, last, begin, end)] = True
        is_end = tokens == eod
        outside.add((tokens < 0) | (tokens >= vocabulary), begin)
        inside.add(is_end & ~is_last, begin)
        missing.add(is_last & ~is_end, begin)
    path = sidecar(dataset.prefix, "bin")
    if outside.count:
        yield f"{path}: {outside.count} ids are outside the vocabulary of {vocabulary}, the first {outside.where(dataset)}"
    if inside.count and dataset.part_codes != CHAT_PARTS:  # a chat template may end every turn with it
        yield f"{path}: {inside.count} end-of-document tokens stand inside a sequence, the first {inside.where(dataset)}"
    if missing.count:
        yield f"{path}: {missing.count} sequences do not end with the end-of-document token {eod}, the first {missing.where(dataset)}"


def _parts(dataset: TokenDataset) -> Iterator[str]:
    assert dataset.parts is not None
    path = sidecar(dataset.prefix, "parts.bin")
    unknown, marked = _Places(), _Places()
    for first, last, begin, end in blocks(dataset):
        parts = np.asarray(dataset.parts[begin:end])
        is_last = np.zeros(end - begin, np.bool_)
        is_last[_last_tokens(dataset, first, last, begin, end)] = True
        unknown.add(~np.isin(parts, dataset.part_codes), begin)
        marked.add(is_last & (parts != PART_DOCUMENT), begin)
    if unknown.count:
        yield f"{path}: {unknown.count} tokens are of no known part, the first {unknown.where(dataset)}"
    if marked.count and dataset.part_codes != CHAT_PARTS:  # of a chat it is whatever ends the last turn
        yield f"{path}: {marked.count} end-of-document tokens are not marked as document, the first {marked.where(dataset)}"


class _Places:
    """How many tokens a check has found, and which was the first, as blocks go by."""

    def __init__(self) -> None:
        self.count = 0
        self._first = -1

    def add(self, found: npt.NDArray[np.bool_], begin: int) -> None:
        """Take in the findings of the block that begins at token `begin`."""
        if self._first < 0 and found.any():
            self._first = begin + int(found.argmax())
        self.count += int(np.count_nonzero(found))

    def where(self, dataset: TokenDataset) -> str:
        """Say where the first is."""
        sequence = int(np.searchsorted(dataset.offsets, self._first, side="right")) - 1
        return f"at token {self._first - int(dataset.offsets[sequence])} of sequence {sequence}"


def _last_tokens(dataset: TokenDataset, first: int, last: int, begin: int, end: int) -> npt.NDArray[np.int64]:
    """Return where in the block the last tokens of sequences stand; an empty one's is that of the sequence before."""
    places = dataset.offsets[first + 1 : last + 1] - 1 - begin
    return places[places < end - begin]


def _table(dataset: TokenDataset, lengths: dict[str, npt.NDArray[np.int32]], names: list[str | None]) -> Iterator[str]:
    path, sources = sidecar(dataset.prefix, "documents.parquet"), sidecar(dataset.prefix, "sources.bin")
    count, columns = len(dataset.lengths), document_columns(dataset.part_codes)
    size = sources.stat().st_size if sources.is_file() else 0
    if size != count * SOURCE_DTYPE.itemsize:
        yield f"{sources}: {size} bytes, not one number of a source for each of {count} sequences"
        return
    numbers = np.memmap(sources, SOURCE_DTYPE, mode="r")
    if int(numbers.max()) >= len(names):
        yield f"{sources}: {np.count_nonzero(numbers >= len(names))} sequences have numbers of no source (the manifest names {len(names)})"
        return
    try:
        with pq.ParquetFile(path) as file:
            if tuple(file.schema_arrow.names) != columns:
                yield f"{path}: its columns are {', '.join(file.schema_arrow.names)}; expected {', '.join(columns)}"
            elif file.metadata.num_rows != count:
                yield f"{path}: {file.metadata.num_rows} rows for {count} sequences"
            else:
                yield from _rows(file, path, dataset, lengths, pa.array(names, pa.string()), numbers)
    except (OSError, ValueError, pa.ArrowException) as error:
        yield f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})"


def _rows(
    file: pq.ParquetFile, path: Path, dataset: TokenDataset, lengths: dict[str, npt.NDArray[np.int32]], names: pa.Array, numbers: npt.NDArray[np.uint16]
) -> Iterator[str]:
    wrong: dict[str, list[int]] = {}  # column: [rows that are wrong, the first of them]
    at = 0
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=["source", *(f"tokens_{name}" for name in lengths), "offset"]):
        span = slice(at, at + batch.num_rows)
        expected = {**{f"tokens_{name}": values[span] for name, values in lengths.items()}, "offset": dataset.offsets[:-1][span]}
        differ = {name: pc.fill_null(batch.column(name).cast(pa.int64()), -1).to_numpy(zero_copy_only=False) != held for name, held in expected.items()}
        source, held = batch.column("source").cast(pa.string()), names.take(pa.array(numbers[span]))
        agree = pc.or_(pc.fill_null(pc.equal(source, held), False), pc.and_(pc.is_null(source), pc.is_null(held)))
        differ["source"] = ~agree.to_numpy(zero_copy_only=False)
        for name, rows in differ.items():
            if rows.any():
                seen = wrong.setdefault(name, [0, at + int(rows.argmax())])
                seen[0] += int(np.count_nonzero(rows))
        at += batch.num_rows
    for name, (count, first) in wrong.items():
        if name == "source":
            yield f"{path}: sources from row {first} on are not those of {sidecar(dataset.prefix, 'sources.bin').name} ({count} such rows)"
        else:
            yield f"{path}: row {first}, {name}: not what the dataset holds ({count} such rows)"


def _counts(dataset: TokenDataset, lengths: dict[str, npt.NDArray[np.int32]], manifest: Manifest) -> Iterator[str]:
    path, counts = sidecar(dataset.prefix, "manifest.json"), manifest.counts
    found = {"sequences": len(dataset.lengths), "tokens": int(dataset.offsets[-1])}
    found |= {f"tokens_{name}": int(values.sum(dtype=np.int64)) for name, values in lengths.items()}
    for name, value in found.items():
        if counts.get(name) != value:
            yield f"{path}: {name} is {counts.get(name)}, the dataset holds {value}"
    lines = [counts.get(name) for name in ("lines_read", "records", "bad_records", "blank_lines")]
    if None in lines or lines[0] != sum(value for value in lines[1:] if value is not None):
        yield f"{path}: lines_read is not records + bad_records + blank_lines ({', '.join(map(str, lines))})"


def _tokenizer(prefix: Path, details: dict[str, Any]) -> Iterator[str]:
    path = tokenizer_file(prefix)
    if path is None:
        yield f"{prefix}: has no tokenizer"
        return
    try:
        tokenizer = load_tokenizer(str(path), details.get("end_of_document", ""))
    except TptError as error:
        yield str(error)
        return
    for key, value in (("tokenizer_fingerprint", tokenizer.fingerprint), ("vocabulary_size", tokenizer.vocabulary_size), ("eod_id", tokenizer.eod_id)):
        if details.get(key) != value:
            yield f"{path}: its {key} is {value}, the manifest says {details.get(key)}"
