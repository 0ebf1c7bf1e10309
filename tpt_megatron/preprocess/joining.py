"""Joining the parts of a token dataset, by copying their bytes in order: a block at a time, and a few numbers a sequence of one part at most."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tpt_megatron.datasets import DOCUMENT_PARTS, INDEX_HEADER, INDEX_MAGIC, INDEX_VERSION, PART_NAMES, SOURCE_DTYPE, dtype_code, sidecar
from tpt_megatron.errors import DataError
from tpt_megatron.files import FileEntry, temporary_neighbour
from tpt_megatron.preprocess.dataset import ROWS_PER_GROUP, RUN, SourceNumbers, TokenCounts, columns
from tpt_megatron.storage import sync_folder

logger = logging.getLogger(__name__)
COPIED_AT_ONCE = 4 << 20  # bytes
SENT_AT_ONCE = 32 << 20  # bytes
NUMBERS_AT_ONCE = 1 << 20
RUNS_AT_ONCE = 1 << 16
_MARKS = {part: memoryview(bytes([part]) * NUMBERS_AT_ONCE) for part in PART_NAMES}


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


class _Hashed:
    """A file that is hashed while it is written, under a temporary name, and synced when it is closed.

    With `link`, it is that file under another name, where the file system can do so; then nothing is copied.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, temporary_neighbour(path)
        self._file: IO[bytes] = self.temporary.open("wb")
        self._digest = hashlib.sha256()
        self.bytes = self._sent = 0

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
        if self.bytes - self._sent >= SENT_AT_ONCE:
            # The system is asked to begin writing to the disk, so that there is little left to wait for at the end.
            _forget_cached(self._file, self._sent, self.bytes)
            self._sent = self.bytes
        return len(view)

    def close(self) -> FileEntry:
        """Sync, close, and return what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileEntry(name=self.path.name, bytes=self.bytes, sha256=self._digest.hexdigest())

    def is_closed(self) -> bool:
        """Say whether nothing more can be written."""
        return self._file.closed

    def abandon(self) -> None:
        """Close and remove, unless it has its name already."""
        try:
            self._file.close()
        except OSError:  # on a full disk what is buffered cannot be written
            logger.debug("%s: abandoned with data that could not be written", self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


class DatasetJoin:
    """A dataset in the making, under temporary names. `steps` for each part in order, then `close`; or `discard`.

    What is to be copied is hashed and counted on the way; OSError (a full disk) leaves it to be discarded. token_parts: what tokens can be.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any], tokenizer_file: str, tokenizer_bytes: bytes, token_parts: Sequence[int] = DOCUMENT_PARTS) -> None:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._prefix, self._dtype = prefix, dtype
        self._parts: list[Part] = []
        self._names, self._counts = SourceNumbers(), TokenCounts()
        self._files: dict[str, _Hashed] = {}
        try:
            for ending in ("bin", "parts.bin", "sources.bin", "documents.parquet", "idx", tokenizer_file):
                self._files[ending] = _Hashed(sidecar(prefix, ending))
            self._files[tokenizer_file].write(tokenizer_bytes)
        except BaseException:
            for file in self._files.values():
                file.abandon()
            raise
        self._table = _Table(self._files["documents.parquet"], self._counts, token_parts)

    def steps(self, part: Part, *, is_only: bool) -> list[Callable[[], None]]:
        """Return what appends a part: calls that may run side by side, all of which must be done before the next part's.

        `is_only`: no other part comes, so that its tokens need not be copied.
        """
        self._parts.append(part)
        mask = part.mask()

        def tokens() -> None:
            source, target = sidecar(part.stem, "bin"), self._files["bin"]
            if not (is_only and mask is None and target.link(source)):
                _copy(source, target, _kept_ranges(part.stem, mask), self._dtype.itemsize)

        def others() -> None:
            for runs in _kept_runs(part.stem, mask):
                for marks in _marks(runs):
                    self._files["parts.bin"].write(marks)
            _copy_sources(part, mask, self._names, self._files["sources.bin"])
            self._table.copy(part.stem, mask)

        return [tokens, others]

    def close(self) -> JoinedDataset:
        """Write what can only be written at the end, and sync."""
        self._table.close()
        _write_index(self._parts, self._dtype, self._counts.sequences, self._files["idx"])
        outputs = [file.close() for file in self._files.values()]
        assert self._files["bin"].bytes == self._counts.tokens * self._dtype.itemsize and self._files["parts.bin"].bytes == self._counts.tokens
        temporary = {file.path: file.temporary for file in self._files.values()}
        return JoinedDataset(self._prefix, self._counts, self._names.names, outputs, temporary)

    def discard(self) -> None:
        """Remove all that has no name yet."""
        for file in self._files.values():
            file.abandon()
        self._table.abandon()


class _AsFile:
    """What pyarrow needs of a file that it writes to."""

    closed = False

    def __init__(self, file: _Hashed) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        """Write; into nothing where the file was abandoned, since the writer always ends with a footer."""
        return len(data) if self._file.is_closed() else self._file.write(data)

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
    block = memoryview(bytearray(COPIED_AT_ONCE))
    with open(source, "rb", buffering=0) as file:
        for begin, end in [(0, source.stat().st_size // itemsize)] if ranges is None else ranges:
            file.seek(begin * itemsize)
            left = (end - begin) * itemsize
            while left:
                count = file.readinto(block[:left])
                if not count:
                    raise DataError(f"{source}: ends early; remove the folder of this piece and run the same command again")
                target.write(block[:count])
                left -= count
        _forget_cached(file, 0, file.tell())


def _forget_cached(file: IO[bytes], begin: int, end: int) -> None:
    """Tell the system that nobody reads these bytes soon: it drops those that are on the disk, and begins to write those that are not."""
    with suppress(AttributeError, OSError):  # advice: where nobody takes it, nothing is lost
        os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_DONTNEED)


def _kept_runs(stem: Path, mask: npt.NDArray[np.bool_] | None) -> Iterator[npt.NDArray[Any]]:
    """Yield the runs (RUN) of the sequences that stay, in blocks."""
    sequence_ends = None if mask is None else np.cumsum(np.fromfile(sidecar(stem, "lengths.bin"), np.int32), dtype=np.int64)
    at = 0
    with open(sidecar(stem, "runs.bin"), "rb") as file:
        while len(runs := np.fromfile(file, RUN, RUNS_AT_ONCE)):
            if mask is not None:
                assert sequence_ends is not None
                ends = at + np.cumsum(runs["tokens"], dtype=np.int64)
                at = int(ends[-1])
                runs = runs[mask[np.searchsorted(sequence_ends, ends)]]
            if len(runs):
                yield runs


def _marks(runs: npt.NDArray[Any]) -> Iterator[memoryview]:
    """Yield the bytes of PREFIX.parts.bin, the part of each token, in blocks."""
    parts, ends = runs["part"], np.cumsum(runs["tokens"], dtype=np.int64)
    is_one_part = bool((parts == parts[0]).all())
    for begin in range(0, int(ends[-1]), NUMBERS_AT_ONCE):
        stop = min(begin + NUMBERS_AT_ONCE, int(ends[-1]))
        if is_one_part:
            yield _MARKS[int(parts[0])][: stop - begin]
            continue
        first, last = int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, stop))
        bounds = np.concatenate(([begin], np.clip(ends[first : last + 1], begin, stop)))
        yield np.repeat(parts[first : last + 1], bounds[1:] - bounds[:-1]).data


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

    def __init__(self, target: _Hashed, counts: TokenCounts, token_parts: Sequence[int]) -> None:
        self._schema = pa.schema([*columns(token_parts), pa.field("offset", pa.int64(), nullable=False)])
        self._writer = pq.ParquetWriter(pa.PythonFile(_AsFile(target), "w"), self._schema)
        self._counts, self._token_parts = counts, token_parts
        self._waiting: list[pa.Table] = []

    def close(self) -> None:
        """Write what is left, and the footer."""
        self._write(final=True)
        self._writer.close()

    def abandon(self) -> None:
        """Close what is open, writing nothing any more."""
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
        by_part = {part: rows.column(f"tokens_{PART_NAMES[part]}").to_numpy().astype(np.int64) for part in self._token_parts}
        lengths = np.sum(list(by_part.values()), axis=0)
        offsets = counts.tokens + np.cumsum(lengths) - lengths
        counts.sequences += rows.num_rows
        counts.by_part.update({part: int(tokens.sum()) for part, tokens in by_part.items()})
        return rows.append_column(self._schema.field("offset"), [pa.array(offsets)]).cast(self._schema)

    def _write(self, *, final: bool) -> None:
        rows = sum(table.num_rows for table in self._waiting)
        while rows >= ROWS_PER_GROUP or (final and rows):
            table = pa.concat_tables(self._waiting).combine_chunks()
            self._writer.write_table(table.slice(0, ROWS_PER_GROUP), row_group_size=ROWS_PER_GROUP)
            self._waiting = [table.slice(ROWS_PER_GROUP)]
            rows -= min(rows, ROWS_PER_GROUP)


def _lengths(parts: Sequence[Part]) -> Iterator[npt.NDArray[np.int32]]:
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
