"""Writing one token dataset with its sidecars, document by document; see `tpt_megatron.datasets` for the format."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tpt_megatron.datasets import INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION, PART_DOCUMENT, PART_THINKING, dtype_code, sidecar, token_dtype
from tpt_megatron.files import temporary_neighbour
from tpt_megatron.storage import sync_folder
from tpt_megatron.tokenizer import Tokenizer

ROWS_PER_GROUP = 50_000
_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("generator", pa.string()),
        pa.field("tokens_document", pa.int32(), nullable=False),
        pa.field("tokens_thinking", pa.int32(), nullable=False),
    ]
)
_ENDINGS = ("bin", "parts.bin", "documents.parquet", "tokenizer.json", "idx")


@dataclass(slots=True)
class TokenCounts:
    """What was written: tokens == tokens_document + tokens_thinking; the end-of-document token counts as document."""

    documents: int = 0
    tokens_document: int = 0
    tokens_thinking: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.tokens_document + self.tokens_thinking


class DatasetWriter:
    """Writes PREFIX.bin, .idx, .parts.bin, .documents.parquet and .tokenizer.json under temporary names.

    `finish` gives them their names; when the block ends without it, or with an error, nothing remains. Memory: four bytes a document, and
    the rows of one Parquet row group.
    """

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self.prefix, self.counts = prefix, TokenCounts()
        self.dtype = token_dtype(tokenizer.vocabulary_size)
        self._tokenizer = tokenizer
        self._end = np.array([tokenizer.eod_id], np.int32)
        self._lengths = array("i")
        self._rows: list[tuple[str, str | None, str | None, int, int]] = []
        self._paths = {ending: sidecar(prefix, ending) for ending in _ENDINGS}
        self._named: list[Path] = []
        self._temporary = {ending: temporary_neighbour(path) for ending, path in self._paths.items()}
        self._tokens: IO[bytes]
        self._parts: IO[bytes]
        self._table: Any

    def __enter__(self) -> Self:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._tokens = open(self._temporary["bin"], "wb")
        self._parts = open(self._temporary["parts.bin"], "wb")
        self._table = pq.ParquetWriter(self._temporary["documents.parquet"], _SCHEMA)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()
        for path in (*self._temporary.values(), *(self._named if error is not None else ())):
            path.unlink(missing_ok=True)

    def add(self, segments: Sequence[tuple[int, npt.NDArray[np.int32]]], identity: str, source: str | None, generator: str | None) -> None:
        """Append one document, given as (part, ids) segments; the end-of-document token is added."""
        tokens = np.concatenate([*(ids for _, ids in segments), self._end]).astype(self.dtype)
        parts = np.repeat(
            np.array([*(part for part, _ in segments), PART_DOCUMENT], np.uint8),
            [*(len(ids) for _, ids in segments), 1],
        )
        self._tokens.write(tokens.data)
        self._parts.write(parts.data)
        self._lengths.append(len(tokens))
        thinking = int(np.count_nonzero(parts == PART_THINKING))
        self._rows.append((identity, source, generator, len(tokens) - thinking, thinking))
        self.counts.documents += 1
        self.counts.tokens_document += len(tokens) - thinking
        self.counts.tokens_thinking += thinking
        if len(self._rows) == ROWS_PER_GROUP:
            self._write_rows()

    def finish(self) -> list[Path]:
        """Write the index, sync everything, and rename it into place; returns the files made."""
        self._write_rows()
        self._write_index(self._temporary["idx"])
        self._tokenizer.save(self._temporary["tokenizer.json"])
        self._close()
        for temporary in self._temporary.values():
            _sync(temporary)
        for ending, path in self._paths.items():
            self._temporary[ending].replace(path)
            self._named.append(path)
        sync_folder(self.prefix.parent)
        return list(self._named)

    def _close(self) -> None:
        self._tokens.close()
        self._parts.close()
        with suppress(OSError):  # on a full disk the footer cannot be written; the error that matters is on its way already
            self._table.close()

    def _write_rows(self) -> None:
        if self._rows:
            columns = [pa.array(column, field.type) for column, field in zip(zip(*self._rows, strict=True), _SCHEMA, strict=True)]
            self._table.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA))
            self._rows.clear()

    def _write_index(self, path: Path) -> None:
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self.dtype.itemsize
        with open(path, "wb") as file:
            file.write(INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, dtype_code(self.dtype), len(lengths), len(lengths) + 1))
            file.write(lengths.data)
            file.write(pointers.data)
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).data)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
