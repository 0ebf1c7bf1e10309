"""Writing parts of token datasets, which `joining.py` makes whole.

A part is what one piece of the input gives to one arm and split: STEM.bin, .runs.bin (RUN: so many tokens that are all document, or all
thinking, ..., within one sequence), .lengths.bin (int32 a sequence), .sources.bin (the part's own numbers), .documents.parquet (without offsets), and
.ordinals.bin (uint32 a sequence: the document's number in the piece) where duplicates are to be left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tpt_megatron.datasets import DOCUMENT_PARTS, PART_DOCUMENT, PART_NAMES, SOURCE_DTYPE, sidecar
from tpt_megatron.errors import DataError

ROWS_PER_GROUP = 20_000
RUN = np.dtype([("part", np.uint8), ("tokens", np.uint32)])
PART_ENDINGS = ("bin", "runs.bin", "lengths.bin", "sources.bin", "ordinals.bin", "documents.parquet")
_MOST_SOURCES = np.iinfo(SOURCE_DTYPE).max + 1
_LONGEST_SEQUENCE = np.iinfo(np.int32).max

Segments = Sequence[tuple[int, Any]]
"""(part, ids) of one sequence; ids are an array of uint32, or have `blocks()` that yields such."""


def columns(parts: Sequence[int]) -> list[pa.Field]:
    """Return the columns of the document table without offsets; `parts`: what tokens can be."""
    return [
        pa.field("id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("generator", pa.string()),
        *(pa.field(f"tokens_{PART_NAMES[part]}", pa.int32(), nullable=False) for part in parts),
    ]


@dataclass(slots=True)
class TokenCounts:
    """What was written: sequences, and tokens by part."""

    sequences: int = 0
    by_part: Counter[int] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.by_part.total()


class SourceNumbers:
    """Numbers for the names of sources, in the order in which they come. None, for a document without one, is a name too."""

    def __init__(self) -> None:
        self._numbers: dict[str | None, int] = {}

    @property
    def names(self) -> list[str | None]:
        """The names by number."""
        return list(self._numbers)

    def number(self, name: str | None) -> int:
        """Return the name's number; DataError when there are more names than a sidecar can tell apart."""
        number = self._numbers.setdefault(name, len(self._numbers))
        if number >= _MOST_SOURCES:
            raise DataError(
                f"more than {_MOST_SOURCES:,} different sources ({name!r} is one too many): a source names a corpus or a domain; "
                "name another field by fields.source, or one that no record has"
            )
        return number


@dataclass(slots=True)
class Row:
    """What the document table says of a sequence, but for its tokens. `ordinal`: of the document in its piece."""

    id: str
    sample: int
    source: str | None
    generator: str | None
    ordinal: int


@dataclass(slots=True)
class _Batch:
    segments: list[npt.NDArray[np.uint32]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    segments_of: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class PartWriter:
    """Writes one part of a dataset. Sequences are gathered by `add` and written by `flush`. Memory: one batch, and a row group of the table.

    parts: what tokens can be, DOCUMENT_PARTS or CHAT_PARTS.
    """

    def __init__(self, stem: Path, dtype: np.dtype[Any], eod_id: int, sources: SourceNumbers, *, ordinals: bool, parts: Sequence[int] = DOCUMENT_PARTS) -> None:
        self._stem, self._dtype, self._sources = stem, dtype, sources
        self._end = np.array([eod_id], np.uint32)
        self._batch = _Batch()
        self._parts, self._schema = parts, pa.schema(columns(parts))
        self._columns: list[list[Any]] = [[] for _ in self._schema]
        self._with_ordinals = ordinals
        self._files: dict[str, IO[bytes]] = {}
        self._table: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for ending in PART_ENDINGS:
            if ending != "documents.parquet" and (ending != "ordinals.bin" or self._with_ordinals):
                self._files[ending] = self._stack.enter_context(open(sidecar(self._stem, ending), "wb"))
        self._table = pq.ParquetWriter(sidecar(self._stem, "documents.parquet"), self._schema)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if error is None:
                self.flush()
                self._write_rows()
                self._table.close()
            else:
                with suppress(OSError):  # on a full disk the footer cannot be written; the error that matters is on its way already
                    self._table.close()

    def add(self, segments: Segments, row: Row, end: int = PART_DOCUMENT) -> None:
        """Take one sequence; the end-of-document token is added, of part `end`."""
        batch = self._batch
        for part, ids in segments:
            batch.segments.append(ids)
            batch.parts.append(part)
        batch.segments.append(self._end)
        batch.parts.append(end)
        batch.segments_of.append(len(segments) + 1)
        batch.rows.append(row)

    def add_long(self, segments: Segments, row: Row) -> None:
        """Write one sequence whose segments are too long to be held at once. Call `flush` before."""
        assert not self._batch.rows
        segments = [*segments, (PART_DOCUMENT, self._end)]
        for _, ids in segments:
            for block in ids.blocks() if hasattr(ids, "blocks") else [ids]:
                self._files["bin"].write(block.astype(self._dtype).data)
        self._write_sequences([part for part, _ in segments], [len(ids) for _, ids in segments], [len(segments)], [row])

    def flush(self) -> None:
        """Write the sequences that `add` took."""
        batch, self._batch = self._batch, _Batch()
        if not batch.rows:
            return
        self._files["bin"].write(np.concatenate(batch.segments, dtype=self._dtype, casting="unsafe").data)
        self._write_sequences(batch.parts, list(map(len, batch.segments)), batch.segments_of, batch.rows)

    def _write_sequences(self, parts: list[int], tokens: list[int], segments_of: list[int], rows: list[Row]) -> None:
        """Write all but the tokens: `parts` and `tokens` of each segment, and how many segments each sequence has."""
        first = np.zeros(len(rows), np.int64)
        np.cumsum(segments_of[:-1], out=first[1:])
        counted = np.array(tokens, np.int64)
        lengths = np.add.reduceat(counted, first)
        by_part = [np.add.reduceat(np.where(np.array(parts) == part, counted, 0), first).tolist() for part in self._parts]
        if lengths.max() > _LONGEST_SEQUENCE:
            raise DataError(f"document {rows[int(lengths.argmax())].id!r} has {lengths.max():,} tokens; Megatron's format holds {_LONGEST_SEQUENCE:,} at most")
        runs = np.empty(len(parts), RUN)
        runs["part"], runs["tokens"] = parts, tokens
        self._files["runs.bin"].write(runs.data)
        self._files["lengths.bin"].write(lengths.astype(np.int32).data)
        self._files["sources.bin"].write(np.array([self._sources.number(row.source) for row in rows], SOURCE_DTYPE).data)
        if self._with_ordinals:
            self._files["ordinals.bin"].write(np.array([row.ordinal for row in rows], np.uint32).data)
        values = ([row.id for row in rows], [row.sample for row in rows], [row.source for row in rows], [row.generator for row in rows])
        for column, more in zip(self._columns, (*values, *by_part), strict=True):
            column.extend(more)
        if len(self._columns[0]) >= ROWS_PER_GROUP:
            self._write_rows()

    def _write_rows(self) -> None:
        if self._columns[0]:
            arrays = [pa.array(column, entry.type) for column, entry in zip(self._columns, self._schema, strict=True)]
            self._table.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
            self._columns = [[] for _ in self._schema]
