"""A writer of token datasets by the format's description alone, so that inspection is not tested against our own writer."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tpt_megatron.tokenizer import load_tokenizer

Sequence = tuple[list[int], list[int], str | None]  # ids of the document, ids of its thinking, source
CODES = {"uint16": 8, "int32": 4}


def write_token_files(prefix: Path, sequences: list[Sequence], dtype: str = "uint16", *, sidecars: bool = True) -> None:
    """Write thinking, document and end-of-document token of each sequence, with all sidecars or none. Tokenizer: bytes, end 256.

    A sequence with neither document nor thinking is wholly empty: no end-of-document token either.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    whole = [[*thinking, *document, 256] if thinking or document else [] for document, thinking, _ in sequences]
    lengths = [len(ids) for ids in whole]
    starts = np.cumsum([0, *lengths])[:-1]
    flat = np.array([token for ids in whole for token in ids], dtype)
    flat.tofile(f"{prefix}.bin")
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], len(whole), len(whole) + 1)
    index += np.array(lengths, "<i4").tobytes() + (starts * flat.itemsize).astype("<i8").tobytes() + np.arange(len(whole) + 1, dtype="<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(index)
    if not sidecars:
        return
    sources = list(dict.fromkeys(source for _, _, source in sequences))
    thinking_lengths = [len(thinking) for _, thinking, _ in sequences]
    document_lengths = [length - thinking for length, thinking in zip(lengths, thinking_lengths, strict=True)]
    parts = [part for i in range(len(whole)) for part in [1] * thinking_lengths[i] + [0] * document_lengths[i]]
    np.array(parts, np.uint8).tofile(f"{prefix}.parts.bin")
    np.array([sources.index(source) for _, _, source in sequences], np.uint16).tofile(f"{prefix}.sources.bin")
    table = {
        "id": pa.array([str(i) for i in range(len(sequences))]),
        "sample": pa.array([0] * len(sequences), pa.int32()),
        "source": pa.array([source for _, _, source in sequences], pa.string()),
        "generator": pa.array(["g" if thinking else None for _, thinking, _ in sequences], pa.string()),
        "tokens_document": pa.array(document_lengths, pa.int32()),
        "tokens_thinking": pa.array(thinking_lengths, pa.int32()),
        "offset": pa.array(starts, pa.int64()),
    }
    pq.write_table(pa.table(table), f"{prefix}.documents.parquet", row_group_size=7)
    tokenizer = load_tokenizer("byte", "<|endoftext|>")
    tokenizer.save(Path(f"{prefix}.tokenizer.json"))
    thinking_tokens = sum(parts)
    manifest: dict[str, Any] = {
        "kind": "token_dataset",
        "manifest_version": 1,
        "tpt_megatron_version": "0",
        "settings": {},
        "inputs": [],
        "outputs": [_entry(prefix, ending) for ending in ("bin", "idx", "parts.bin", "sources.bin", "documents.parquet", "tokenizer.json")],
        "counts": {
            "documents": len(whole), "sequences": len(whole), "tokens": len(flat), "tokens_document": len(flat) - thinking_tokens,
            "tokens_thinking": thinking_tokens, "lines_read": len(whole) + 5, "records": len(whole), "bad_records": 3, "blank_lines": 2,
        },
        "details": {
            "arm": "prepend", "split": "train", "dtype": dtype, "vocabulary_size": 257, "tokenizer_fingerprint": tokenizer.fingerprint,
            "end_of_document": "<|endoftext|>", "eod_id": 256, "sources": sources,
        },
    }  # fmt: skip
    Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))


def _entry(prefix: Path, ending: str) -> dict[str, Any]:
    path = Path(f"{prefix}.{ending}")
    data = path.read_bytes()
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def seal(prefix: Path) -> None:
    """Make sizes and checksums of the manifest agree with the files again, so that only their content can tell of a damage."""
    edit_manifest(prefix, lambda manifest: manifest.update(outputs=[_entry(prefix, e["name"].removeprefix(f"{prefix.name}.")) for e in manifest["outputs"]]))


def edit_manifest(prefix: Path, change: Any) -> None:
    """Apply `change` to the manifest's JSON."""
    path = Path(f"{prefix}.manifest.json")
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
