"""Token datasets in Megatron's own format, memory-mapped for reading.

`PREFIX.bin` holds the tokens of all documents end to end; `PREFIX.idx` says where each begins, in the layout of
`megatron.core.datasets.indexed_dataset` (megatron-core 0.16, index version 1), little-endian:

    9 bytes   MMIDIDX and two NUL          8 bytes  version, 1        1 byte  code of the tokens' dtype
    8 bytes   number n of sequences        8 bytes  number m of document boundaries
    n int32   tokens of each sequence      n int64  byte at which each begins in .bin
    m int64   boundaries of documents, counted in sequences: 0, ..., n

Datasets made by `tpt preprocess` have one sequence a document (or one a thought, where thoughts are samples), and sidecars:

    PREFIX.parts.bin          one uint8 a token: PART_DOCUMENT or PART_THINKING; of chats PART_PROMPT or PART_ASSISTANT
    PREFIX.sources.bin        one uint16 a sequence: which of the manifest's `details.sources` it came from
    PREFIX.documents.parquet  one row a sequence, see `document_columns`
    PREFIX.tokenizer.json     the tokenizer (PREFIX.tokenizer.model for SentencePiece)
    PREFIX.manifest.json      settings, inputs, counts, checksums; written last
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpt_megatron.errors import DataError
from tpt_megatron.files import check_outputs, read_manifest

MANIFEST_KIND = "token_dataset"
PART_DOCUMENT, PART_THINKING, PART_PROMPT, PART_ASSISTANT = range(4)
PART_NAMES = {PART_DOCUMENT: "document", PART_THINKING: "thinking", PART_PROMPT: "prompt", PART_ASSISTANT: "assistant"}
DOCUMENT_PARTS = (PART_DOCUMENT, PART_THINKING)
CHAT_PARTS = (PART_PROMPT, PART_ASSISTANT)
"""What the tokens of a dataset can be: of documents, or of chats."""

SOURCE_DTYPE = np.dtype(np.uint16)
_BLOCK = 1 << 20
"""Entries of a file that are looked at together."""

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
INDEX_HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, npt.DTypeLike] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """Return the dtype that Megatron's `DType.optimal_dtype` chooses for ids below `vocabulary_size`."""
    return np.dtype(np.uint16 if vocabulary_size < 65500 else np.int32)


def dtype_code(dtype: np.dtype[Any]) -> int:
    """Return the code that stands for a token dtype in an index."""
    return next(code for code, known in DTYPE_CODES.items() if np.dtype(known) == dtype)


def document_columns(parts: Sequence[int]) -> tuple[str, ...]:
    """Return the columns of the document table of a dataset of these parts.

    id; which of the document's samples (0 but where thoughts are samples); source and generator (null where none); tokens by part, the
    end-of-document token among the document's; offset: the token of the whole dataset at which the sequence begins.
    """
    return ("id", "sample", "source", "generator", *(f"tokens_{PART_NAMES[part]}" for part in parts), "offset")


def sidecar(prefix: Path, ending: str) -> Path:
    """Return `PREFIX.ending`; a dot in the prefix's own name stays."""
    return prefix.with_name(f"{prefix.name}.{ending}")


@dataclass(frozen=True)
class TokenDataset:
    """A dataset, mapped and not loaded. Megatron's sequences are called documents here, since ours are one a document.

    tokens    [tokens] in the file's dtype, all documents end to end
    parts     [tokens] uint8, PART_*: see `part_codes`; None where there is no sidecar
    lengths   [documents] int32, tokens of each document
    pointers  [documents] int64, the byte of .bin at which each document begins
    details   of the manifest that `tpt preprocess` wrote; None where there is no manifest
    """

    prefix: Path
    tokens: npt.NDArray[Any]
    parts: npt.NDArray[np.uint8] | None
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    details: dict[str, Any] | None

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """[documents + 1], the token at which each document begins, and the number of tokens at the end: in memory, 8 bytes a document."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    @property
    def part_codes(self) -> tuple[int, ...]:
        """What its tokens can be: CHAT_PARTS where its manifest says so, else DOCUMENT_PARTS."""
        names = (self.details or {}).get("parts")
        return CHAT_PARTS if names == [PART_NAMES[part] for part in CHAT_PARTS] else DOCUMENT_PARTS

    def begin(self, document: int) -> int:
        """Return the token at which a document begins."""
        return int(self.pointers[document]) // self.tokens.dtype.itemsize

    def largest_token(self) -> int:
        """Return the largest id in the dataset; reads all of it, a block at a time."""
        return max(int(self.tokens[start : start + _BLOCK].max()) for start in range(0, len(self.tokens), _BLOCK))


def open_dataset(prefix: str | Path) -> TokenDataset:
    """Map the dataset PREFIX.bin, PREFIX.idx, with its sidecars where it has them.

    Raises DataError, in one line, when a file is missing or damaged, when files do not belong together, or when the
    dataset is empty.
    """
    prefix = Path(prefix)
    index, data = sidecar(prefix, "idx"), sidecar(prefix, "bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(f"{path}: no such file; a dataset is named without its ending, for example data/append/train")
    details = None
    manifest_path = sidecar(prefix, "manifest.json")
    if sidecar(prefix, "parts.bin").is_file() and not manifest_path.is_file():
        raise DataError(f"{prefix}: sidecars without {manifest_path.name}: tpt preprocess did not finish; run it again")
    if manifest_path.is_file():
        manifest = read_manifest(manifest_path, MANIFEST_KIND)
        check_outputs(manifest, prefix.parent, checksums=False)
        details = dict(manifest.details)
    dtype, lengths, pointers = _map_index(index)
    total = _check_pointers(index, dtype, lengths, pointers)
    if total == 0:
        raise DataError(f"{prefix}: the dataset holds no token")
    if data.stat().st_size != total * dtype.itemsize:
        raise DataError(f"{data}: {data.stat().st_size} bytes, the index says {total * dtype.itemsize}; the files do not belong together or were cut off")
    return TokenDataset(prefix, np.memmap(data, dtype, mode="r"), _map_parts(prefix, total), lengths, pointers, details)


def open_sources(dataset: TokenDataset) -> tuple[list[str | None], npt.NDArray[np.uint16] | None]:
    """Return the names of a dataset's sources and [documents] the number of each document's; without that sidecar, one source, None, and None.

    Raises DataError when the numbers do not belong to the dataset.
    """
    path, names = sidecar(dataset.prefix, "sources.bin"), (dataset.details or {}).get("sources")
    if not path.is_file() or names is None:
        return [None], None
    count = len(dataset.lengths)
    if path.stat().st_size != count * SOURCE_DTYPE.itemsize:
        raise DataError(f"{path}: {path.stat().st_size} bytes, not one number of a source for each of {count} sequences; the files do not belong together")
    numbers = np.memmap(path, SOURCE_DTYPE, mode="r")
    if max(int(numbers[begin : begin + _BLOCK].max()) for begin in range(0, count, _BLOCK)) >= len(names):
        raise DataError(f"{path}: numbers of sources beyond the {len(names)} that the manifest names; the file is damaged, make the dataset again")
    return list(names), numbers


def _map_parts(prefix: Path, total: int) -> npt.NDArray[np.uint8] | None:
    path = sidecar(prefix, "parts.bin")
    if not path.is_file():
        return None
    if path.stat().st_size != total:
        raise DataError(f"{path}: {path.stat().st_size} bytes, but the dataset has {total} tokens; the files do not belong together")
    return np.memmap(path, np.uint8, mode="r")


def _map_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the tokens' dtype, and length and byte offset of each sequence, mapped."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or not header.startswith(INDEX_MAGIC):
        raise DataError(f"{path}: not a Megatron index (the file does not begin with MMIDIDX)")
    _, version, code, sequences, boundaries = INDEX_HEADER.unpack(header)
    if version != INDEX_VERSION:
        raise DataError(f"{path}: index version {version}; this release reads version {INDEX_VERSION}")
    if code not in DTYPE_CODES:
        raise DataError(f"{path}: dtype code {code} is none that tokens can have; the index is damaged")
    expected = INDEX_HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):  # one more byte a sequence where a multimodal index keeps modes
        raise DataError(f"{path}: {size} bytes, its header says {expected}; the file is cut off or damaged")
    content: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    lengths_end = INDEX_HEADER.size + 4 * sequences
    pointers_end = lengths_end + 8 * sequences
    documents = content[pointers_end : pointers_end + 8 * boundaries].view("<i8")
    falls = any((np.diff(documents[begin : begin + _BLOCK + 1]) < 0).any() for begin in range(0, boundaries, _BLOCK))
    if boundaries < 1 or documents[0] != 0 or documents[-1] != sequences or falls:
        raise DataError(f"{path}: its document boundaries do not run from 0 to {sequences}; the index is damaged")
    return np.dtype(DTYPE_CODES[code]), content[INDEX_HEADER.size : lengths_end].view("<i4"), content[lengths_end:pointers_end].view("<i8")


def _check_pointers(path: Path, dtype: np.dtype[Any], lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64]) -> int:
    """Return the number of tokens of all documents; DataError when a length is negative, or documents do not lie end to end."""
    total = 0
    for begin in range(0, len(lengths), _BLOCK):
        of = lengths[begin : begin + _BLOCK]
        if (of < 0).any():
            raise DataError(f"{path}: a sequence has a negative length; the index is damaged")
        ends = total + np.cumsum(of, dtype=np.int64)
        if not np.array_equal(pointers[begin : begin + _BLOCK], (ends - of) * dtype.itemsize):
            raise DataError(f"{path}: its pointers do not follow from its lengths; the index is damaged, make the dataset again")
        total = int(ends[-1])
    return total
