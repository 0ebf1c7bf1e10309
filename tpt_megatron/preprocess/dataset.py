"""Writing token datasets: parts of them piece by piece, and then whole ones by copying the parts' bytes.

A part is what one piece of the input gives to one arm and split: STEM.bin, .parts.bin, .lengths.bin (int32 a sequence), .sources.bin
(the part's own numbers), .documents.parquet (without offsets), and .ordinals.bin (uint32 a sequence: the document's number in the
piece) where duplicates are to be left out. See `tpt_megatron.datasets` for whole datasets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tpt_megatron.datasets import (
    INDEX_HEADER,
    INDEX_MAGIC,
    INDEX_VERSION,
    PART_DOCUMENT,
    PART_THINKING,
    SOURCE_DTYPE,
    dtype_code,
    sidecar,
)
from tpt_megatron.errors import DataError
from tpt_megatron.files import FileEntry, temporary_neighbour
from tpt_megatron.storage import sync_folder

ROWS_PER_GROUP = 20_000
COPIED_AT_ONCE = 4 << 20  # bytes
NUMBERS_AT_ONCE = 1 << 20
_COLUMNS = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("sample", pa.int32(), nullable=False),
    pa.field("source", pa.string()),
    pa.field("generator", pa.string()),
    pa.field("tokens_document", pa.int32(), nullable=False),
    pa.field("tokens_thinking", pa.int32(), nullable=False),
]
_PART_SCHEMA = pa.schema(_COLUMNS)
_SCHEMA = pa.schema([*_COLUMNS, pa.field("offset", pa.int64(), nullable=False)])
PART_ENDINGS = ("bin", "parts.bin", "lengths.bin", "sources.bin", "ordinals.bin", "documents.parquet")
_MOST_SOURCES = np.iinfo(SOURCE_DTYPE).max + 1
_LONGEST_SEQUENCE = np.iinfo(np.int32).max

Segments = Sequence[tuple[int, Any]]
"""(part, ids) of one sequence; ids are an array of uint32, or have `blocks()` that yields such."""


@dataclass(slots=True)
class TokenCounts:
    """What was written: tokens == tokens_document + tokens_thinking; the end-of-document token counts as document."""

    sequences: int = 0
    tokens_document: int = 0
    tokens_thinking: int = 0

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.tokens_document + self.tokens_thinking


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
    """Writes one part of a dataset. Sequences are gathered by `add` and written by `flush`. Memory: one batch, and a row group of the table."""

    def __init__(self, stem: Path, dtype: np.dtype[Any], eod_id: int, sources: SourceNumbers, *, ordinals: bool) -> None:
        self._stem, self._dtype, self._sources = stem, dtype, sources
        self._end = np.array([eod_id], np.uint32)
        self._batch = _Batch()
        self._columns: list[list[Any]] = [[] for _ in _COLUMNS]
        self._with_ordinals = ordinals
        self._files: dict[str, IO[bytes]] = {}
        self._table: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for ending in PART_ENDINGS:
            if ending != "documents.parquet" and (ending != "ordinals.bin" or self._with_ordinals):
                self._files[ending] = self._stack.enter_context(open(sidecar(self._stem, ending), "wb"))
        self._table = pq.ParquetWriter(sidecar(self._stem, "documents.parquet"), _PART_SCHEMA)
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

    def add(self, segments: Segments, row: Row) -> None:
        """Take one sequence; the end-of-document token is added."""
        batch = self._batch
        for part, ids in segments:
            batch.segments.append(ids)
            batch.parts.append(part)
        batch.segments.append(self._end)
        batch.parts.append(PART_DOCUMENT)
        batch.segments_of.append(len(segments) + 1)
        batch.rows.append(row)

    def add_long(self, segments: Segments, row: Row) -> None:
        """Write one sequence whose segments are too long to be held at once. Call `flush` before."""
        assert not self._batch.rows
        thinking = total = 0
        for part, ids in [*segments, (PART_DOCUMENT, self._end)]:
            for block in ids.blocks() if hasattr(ids, "blocks") else [ids]:
                self._files["bin"].write(block.astype(self._dtype).data)
                self._files["parts.bin"].write(np.full(len(block), part, np.uint8).data)
                total += len(block)
                thinking += len(block) if part == PART_THINKING else 0
        self._write_sequences(np.array([total]), np.array([thinking]), [row])

    def flush(self) -> None:
        """Write the sequences that `add` took."""
        batch, self._batch = self._batch, _Batch()
        if not batch.rows:
            return
        lengths = np.fromiter(map(len, batch.segments), np.int64, len(batch.segments))
        parts = np.array(batch.parts, np.uint8)
        first = np.zeros(len(batch.rows), np.int64)
        np.cumsum(batch.segments_of[:-1], out=first[1:])
        self._files["bin"].write(np.concatenate(batch.segments).astype(self._dtype).data)
        self._files["parts.bin"].write(np.repeat(parts, lengths).data)
        thinking = np.add.reduceat(np.where(parts == PART_THINKING, lengths, 0), first)
        self._write_sequences(np.add.reduceat(lengths, first), thinking, batch.rows)

    def _write_sequences(self, lengths: npt.NDArray[np.int64], thinking: npt.NDArray[np.int64], rows: list[Row]) -> None:
        if lengths.max() > _LONGEST_SEQUENCE:
            raise DataError(f"document {rows[int(lengths.argmax())].id!r} has {lengths.max():,} tokens; Megatron's format holds {_LONGEST_SEQUENCE:,} at most")
        self._files["lengths.bin"].write(lengths.astype(np.int32).data)
        self._files["sources.bin"].write(np.array([self._sources.number(row.source) for row in rows], SOURCE_DTYPE).data)
        if self._with_ordinals:
            self._files["ordinals.bin"].write(np.array([row.ordinal for row in rows], np.uint32).data)
        values = ([row.id for row in rows], [row.sample for row in rows], [row.source for row in rows], [row.generator for row in rows])
        for column, more in zip(self._columns, (*values, (lengths - thinking).tolist(), thinking.tolist()), strict=True):
            column.extend(more)
        if len(self._columns[0]) >= ROWS_PER_GROUP:
            self._write_rows()

    def _write_rows(self) -> None:
        if self._columns[0]:
            arrays = [pa.array(column, entry.type) for column, entry in zip(self._columns, _COLUMNS, strict=True)]
            self._table.write_table(pa.Table.from_arrays(arrays, schema=_PART_SCHEMA))
            self._columns = [[] for _ in _COLUMNS]


@dataclass(frozen=True, slots=True)
class Part:
    """One part to be joined: where it is, its sources' names by its own numbers, and which documents of its piece stay (None: all)."""

    stem: Path
    sources: Sequence[str | None]
    kept: npt.NDArray[np.bool_] | None = None

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Return which sequences stay; None for all."""
        if self.kept is None:
            return None
        return self.kept[np.fromfile(sidecar(self.stem, "ordinals.bin"), np.uint32)]


@dataclass(slots=True)
class JoinedDataset:
    """A dataset under temporary names: `rename` gives it its own. `outputs` has a checksum for each file."""

    prefix: Path
    counts: TokenCounts
    sources: list[str | None]
    outputs: list[FileEntry]
    temporary: dict[Path, Path]

    def rename(self) -> None:
        """Give all files their names; the manifest, which makes it a dataset, is still to come."""
        for path, temporary in self.temporary.items():
            temporary.replace(path)
            temporary.unlink(missing_ok=True)  # stays where both were names of one file already
        sync_folder(self.prefix.parent)

    def discard(self) -> None:
        """Remove what has no name yet."""
        for temporary in self.temporary.values():
            temporary.unlink(missing_ok=True)


class _Hashed:
    """A file that is hashed while it is written, under a temporary name, and synced when it is closed.

    With `link`, it is that file under another name, where the file system can do so; then nothing is copied.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, temporary_neighbour(path)
        self._file: IO[bytes] = self.temporary.open("wb")
        self._digest = hashlib.sha256()
        self.bytes = 0

    def link(self, other: Path) -> bool:
        """Become a second name of `other`, which is read once to be hashed; False where that cannot be done."""
        beside = self.temporary.with_suffix(".link.tmp")
        try:
            os.link(other, beside)
        except OSError:
            return False
        beside.replace(self.temporary)
        self._file.close()
        self._file = self.temporary.open("rb")
        while block := self._file.read(COPIED_AT_ONCE):
            self._digest.update(block)
            self.bytes += len(block)
        return True

    def write(self, data: Any) -> int:
        """Write and hash."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._digest.update(view)
        self.bytes += len(view)
        return len(view)

    def close(self) -> FileEntry:
        """Sync, close, and return what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(name=self.path.name, bytes=self.bytes, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close and remove."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)


def join(parts: Sequence[Part], prefix: Path, dtype: np.dtype[Any], tokenizer_file: str, tokenizer_bytes: bytes) -> JoinedDataset:
    """Write the dataset that the parts make in their order, by copying: neither tokens nor index are held in memory.

    Raises OSError (a full disk), after which nothing remains.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    files = {ending: _Hashed(sidecar(prefix, ending)) for ending in ("bin", "parts.bin", "sources.bin", "documents.parquet", "idx", tokenizer_file)}
    try:
        names = SourceNumbers()
        counts = TokenCounts()
        with _Table(files["documents.parquet"], counts) as table:
            for part in parts:
                mask = part.mask()
                tokens = _kept_ranges(part.stem, mask)
                for ending, itemsize in (("bin", dtype.itemsize), ("parts.bin", 1)):
                    if len(parts) > 1 or mask is not None or not files[ending].link(sidecar(part.stem, ending)):
                        _copy(sidecar(part.stem, ending), files[ending], tokens, itemsize)
                _copy_sources(part, mask, names, files["sources.bin"])
                table.copy(part.stem, mask)
        _write_index(parts, dtype, counts.sequences, files["idx"])
        files[tokenizer_file].write(tokenizer_bytes)
        outputs = [file.close() for file in files.values()]
    except BaseException:
        for file in files.values():
            file.abandon()
        raise
    assert files["bin"].bytes == counts.tokens * dtype.itemsize and files["parts.bin"].bytes == counts.tokens
    return JoinedDataset(prefix, counts, names.names, outputs, {file.path: file.temporary for file in files.values()})


class _AsFile:
    """What pyarrow needs of a file that it writes to."""

    closed = False

    def __init__(self, file: _Hashed) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """Write."""
        return self._file.write(data)

    def flush(self) -> None:
        """Do nothing: closing syncs."""

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._file.bytes

    def close(self) -> None:
        """Do nothing: the writer's owner closes it."""


def _kept_ranges(stem: Path, mask: npt.NDArray[np.bool_] | None) -> list[tuple[int, int]] | None:
    """Return the runs of tokens [from, to) of the sequences that stay; None for all."""
    if mask is None:
        return None
    ends = np.cumsum(np.fromfile(sidecar(stem, "lengths.bin"), np.int32), dtype=np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    bounds = np.concatenate(([0], ends))[edges]
    return list(zip(bounds[::2].tolist(), bounds[1::2].tolist(), strict=True))


def _copy(source: Path, target: _Hashed, ranges: list[tuple[int, int]] | None, itemsize: int) -> None:
    with open(source, "rb", buffering=0) as file:
        for begin, end in [(0, source.stat().st_size // itemsize)] if ranges is None else ranges:
            file.seek(begin * itemsize)
            left = (end - begin) * itemsize
            while left:
                block = file.read(min(left, COPIED_AT_ONCE))
                if not block:
                    raise DataError(f"{source}: ends early; remove the folder of this piece and run the same command again")
                target.write(block)
                left -= len(block)


def _copy_sources(part: Part, mask: npt.NDArray[np.bool_] | None, names: SourceNumbers, target: _Hashed) -> None:
    own = np.fromfile(sidecar(part.stem, "sources.bin"), SOURCE_DTYPE)
    own = own if mask is None else own[mask]
    numbers = np.zeros(max(1, len(part.sources)), SOURCE_DTYPE)
    used, first = np.unique(own, return_index=True)
    for number in used[np.argsort(first)]:  # in the order of the sequences that stay
        numbers[number] = names.number(part.sources[number])
    target.write(numbers[own])


class _Table:
    """The document table being written: rows of all parts with their offsets, in row groups of one size wherever the parts were cut."""

    def __init__(self, target: _Hashed, counts: TokenCounts) -> None:
        self._writer = pq.ParquetWriter(pa.PythonFile(_AsFile(target), "w"), _SCHEMA)
        self._counts = counts
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._write(final=True)
        self._writer.close()

    def copy(self, stem: Path, mask: npt.NDArray[np.bool_] | None) -> None:
        """Append a part's rows, and count them."""
        with pq.ParquetFile(sidecar(stem, "documents.parquet")) as file:
            at = 0
            for i in range(file.metadata.num_row_groups):
                rows = file.read_row_group(i)
                if mask is not None:
                    chosen = mask[at : at + rows.num_rows]
                    at += rows.num_rows
                    rows = rows.filter(pa.array(chosen))
                if rows.num_rows:
                    self._waiting.append(self._with_offsets(rows))
                    self._write(final=False)

    def _with_offsets(self, rows: pa.Table) -> pa.Table:
        counts = self._counts
        document, thinking = (rows.column(name).to_numpy().astype(np.int64) for name in ("tokens_document", "tokens_thinking"))
        offsets = counts.tokens + np.cumsum(document + thinking) - (document + thinking)
        counts.sequences += rows.num_rows
        counts.tokens_document += int(document.sum())
        counts.tokens_thinking += int(thinking.sum())
        return rows.append_column(_SCHEMA.field("offset"), [pa.array(offsets)]).cast(_SCHEMA)

    def _write(self, *, final: bool) -> None:
        rows = sum(table.num_rows for table in self._waiting)
        while rows >= ROWS_PER_GROUP or (final and rows):
            table = pa.concat_tables(self._waiting).combine_chunks()
            self._writer.write_table(table.slice(0, ROWS_PER_GROUP), row_group_size=ROWS_PER_GROUP)
            self._waiting = [table.slice(ROWS_PER_GROUP)]
            rows -= min(rows, ROWS_PER_GROUP)


def _lengths(parts: Iterable[Part]) -> Iterator[npt.NDArray[np.int32]]:
    for part in parts:
        mask = part.mask()
        lengths = np.memmap(path, np.int32, mode="r") if (path := sidecar(part.stem, "lengths.bin")).stat().st_size else np.empty(0, np.int32)
        for begin in range(0, len(lengths), NUMBERS_AT_ONCE):
            block = np.asarray(lengths[begin : begin + NUMBERS_AT_ONCE])
            yield block if mask is None else block[mask[begin : begin + NUMBERS_AT_ONCE]]


def _write_index(parts: Sequence[Part], dtype: np.dtype[Any], sequences: int, target: _Hashed) -> None:
    target.write(INDEX_HEADER.pack(INDEX_MAGIC, INDEX_VERSION, dtype_code(dtype), sequences, sequences + 1))
    for lengths in _lengths(parts):
        target.write(lengths)
    at = 0
    for lengths in _lengths(parts):
        ends = at + np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        target.write(ends - lengths.astype(np.int64) * dtype.itemsize)
        at = int(ends[-1]) if len(ends) else at
    for begin in range(0, sequences + 1, NUMBERS_AT_ONCE):
        target.write(np.arange(begin, min(sequences + 1, begin + NUMBERS_AT_ONCE), dtype=np.int64))
