"""Verifying a token dataset: every checksum, bound and count that its files give for each other, a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tpt_megatron.datasets import DOCUMENT_COLUMNS, MANIFEST_KIND, PART_DOCUMENT, PART_THINKING, SOURCE_DTYPE, TokenDataset, open_dataset, sidecar
from tpt_megatron.errors import DataError
from tpt_megatron.files import Manifest, read_manifest, sha256_of
from tpt_megatron.inspection.summary import blocks, thinking_of
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON, load_tokenizer

FINDINGS_SHOWN = 3


def verify(prefix: Path, say: Callable[[str, list[str]], None]) -> int:
    """Check everything; `say(what, findings)` hears of each check, whose findings are empty where all is well. Returns how many there were."""
    found = 0

    def check(what: str, findings: Iterator[str]) -> None:
        nonlocal found
        listed = list(findings)
        found += len(listed)
        say(what, listed)

    manifest = read_manifest(sidecar(prefix, "manifest.json"), MANIFEST_KIND) if sidecar(prefix, "manifest.json").is_file() else None
    if manifest is not None:
        check("sizes and SHA-256 of all files", _checksums(prefix, manifest))
    try:
        dataset = open_dataset(prefix)
    except DataError as error:
        say("index, pointers and boundaries", [str(error)])
        return found + 1
    check("index, pointers and boundaries", iter(()))
    if dataset.details is None or manifest is None:
        return found
    check("ids and end-of-document tokens", _ids(dataset))
    if dataset.parts is not None:
        check("parts", _parts(dataset))
        check("document table and sources", _table(dataset))
    check("counts of the manifest", _counts(dataset, manifest))
    check("tokenizer", _tokenizer(dataset))
    return found


def _checksums(prefix: Path, manifest: Manifest) -> Iterator[str]:
    for entry in manifest.outputs:
        path = prefix.parent / entry.name
        if not path.is_file():
            yield f"{path}: named in the manifest but missing"
        elif path.stat().st_size != entry.bytes:
            yield f"{path}: {path.stat().st_size} bytes, the manifest says {entry.bytes}"
        elif sha256_of(path) != entry.sha256:
            yield f"{path}: its SHA-256 is not the manifest's"


def _ids(dataset: TokenDataset) -> Iterator[str]:
    assert dataset.details is not None
    vocabulary, eod = dataset.details["vocabulary_size"], dataset.details["eod_id"]
    last = dataset.offsets[1:] - 1
    outside = inside = 0
    for _, _, begin, end in blocks(dataset):
        tokens = np.asarray(dataset.tokens[begin:end])
        outside += int(np.count_nonzero((tokens < 0) | (tokens >= vocabulary)))
        ends = np.flatnonzero(tokens == eod) + begin
        inside += int(np.count_nonzero(last[np.minimum(np.searchsorted(last, ends), len(last) - 1)] != ends))
    if outside:
        yield f"{sidecar(dataset.prefix, 'bin')}: {outside} ids are outside the vocabulary of {vocabulary}"
    if inside:
        yield f"{sidecar(dataset.prefix, 'bin')}: {inside} end-of-document tokens stand inside a sequence"
    missing = sum(int(np.count_nonzero(dataset.tokens[last[begin : begin + (1 << 20)]] != eod)) for begin in range(0, len(last), 1 << 20))
    if missing:
        yield f"{sidecar(dataset.prefix, 'bin')}: {missing} sequences do not end with the end-of-document token {eod}"


def _parts(dataset: TokenDataset) -> Iterator[str]:
    assert dataset.parts is not None
    path = sidecar(dataset.prefix, "parts.bin")
    known = np.array([PART_DOCUMENT, PART_THINKING], np.uint8)
    wrong = sum(int(np.count_nonzero(~np.isin(dataset.parts[begin:end], known))) for _, _, begin, end in blocks(dataset))
    if wrong:
        yield f"{path}: {wrong} tokens are of no known part"
    marked = int(np.count_nonzero(dataset.parts[dataset.offsets[1:] - 1] != PART_DOCUMENT))
    if marked:
        yield f"{path}: {marked} end-of-document tokens are not marked as document"


def _table(dataset: TokenDataset) -> Iterator[str]:
    assert dataset.details is not None
    path, sources = sidecar(dataset.prefix, "documents.parquet"), sidecar(dataset.prefix, "sources.bin")
    thinking = thinking_of(dataset)
    numbers = np.fromfile(sources, SOURCE_DTYPE) if sources.is_file() else np.empty(0, SOURCE_DTYPE)
    names = dataset.details.get("sources", [])
    if len(numbers) != len(thinking) or (len(numbers) and int(numbers.max()) >= len(names)):
        yield f"{sources}: {len(numbers)} numbers of sources for {len(thinking)} sequences, or numbers of no source"
        return
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        yield f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})"
        return
    with file:
        if tuple(file.schema_arrow.names) != DOCUMENT_COLUMNS or file.metadata.num_rows != len(thinking):
            yield f"{path}: {file.metadata.num_rows} rows of {file.schema_arrow.names}, for {len(thinking)} sequences"
            return
        at = 0
        for i in range(file.metadata.num_row_groups):
            rows = file.read_row_group(i, ["source", "tokens_document", "tokens_thinking", "offset"])
            span = slice(at, at + rows.num_rows)
            expected = {"tokens_document": dataset.lengths[span] - thinking[span], "tokens_thinking": thinking[span], "offset": dataset.offsets[:-1][span]}
            for name, values in expected.items():
                wrong = np.flatnonzero(rows.column(name).to_numpy() != values)
                if len(wrong):
                    yield f"{path}: row {at + int(wrong[0])}, {name}: not what the dataset holds ({len(wrong)} such rows in this row group)"
            if rows.column("source").to_pylist() != [names[number] for number in numbers[span]]:
                yield f"{path}: sources from row {at} on are not those of {sources.name}"
            at += rows.num_rows


def _counts(dataset: TokenDataset, manifest: Manifest) -> Iterator[str]:
    counts = manifest.counts
    found = {"sequences": len(dataset.lengths), "tokens": int(dataset.offsets[-1])}
    if dataset.parts is not None:
        found["tokens_thinking"] = int(thinking_of(dataset).sum())
        found["tokens_document"] = found["tokens"] - found["tokens_thinking"]
    for name, value in found.items():
        if counts.get(name) != value:
            yield f"{sidecar(dataset.prefix, 'manifest.json')}: {name} is {counts.get(name)}, the dataset holds {value}"
    if counts["lines_read"] != counts["records"] + counts["bad_records"] + counts["blank_lines"]:
        yield f"{sidecar(dataset.prefix, 'manifest.json')}: lines_read is not records + bad_records + blank_lines"


def _tokenizer(dataset: TokenDataset) -> Iterator[str]:
    assert dataset.details is not None
    for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL):
        path = sidecar(dataset.prefix, name)
        if path.is_file():
            tokenizer = load_tokenizer(str(path), dataset.details["end_of_document"])
            for key, value in (("tokenizer_fingerprint", tokenizer.fingerprint), ("vocabulary_size", tokenizer.vocabulary_size), ("eod_id", tokenizer.eod_id)):
                if dataset.details[key] != value:
                    yield f"{path}: its {key} is {value}, the manifest says {dataset.details[key]}"
            return
    yield f"{dataset.prefix}: has no tokenizer"
