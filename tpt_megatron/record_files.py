"""Files of records, local or remote: JSON lines (plain, gzip, zstd) and Parquet; reading them row by row, and writing shards.

In Parquet a record's own fields (`id`, `text`, `source`, `thoughts`) have columns of one schema, whatever corpus they come
from; a record's other fields stand as JSON in the column `extra`, so that shards of any corpora can be read together.
"""

from __future__ import annotations

import bisect
import decimal
import io
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from tpt_megatron.errors import ConfigError, DataError, RecordError
from tpt_megatron.files import AUGMENTED, check_outputs, is_compressed, parse_json_line, read_json, read_manifest, stream_lines
from tpt_megatron.records import AugmentedDocument, augmented_to_record
from tpt_megatron.storage import Location, locate

LINE_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
ROWS_PER_BATCH, BYTES_PER_BATCH = 256, 16_000_000
Format = Literal["parquet", "jsonl", "jsonl.zst"]

_THOUGHT = pa.struct(
    [
        ("text", pa.string()),
        ("generator", pa.string()),
        ("revision", pa.string()),
        ("prompt", pa.string()),
        ("prompt_hash", pa.string()),
        ("sample", pa.int64()),
        ("seed", pa.int64()),
        ("sampling", pa.string()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("document_hash", pa.string()),
        ("seen_start", pa.int64()),
        ("seen_end", pa.int64()),
        ("created", pa.string()),
        ("extra", pa.string()),
    ]
)
_THOUGHT_COLUMNS = frozenset(field.name for field in _THOUGHT) - {"extra"}
AUGMENTED_SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.large_string()), ("source", pa.string()), ("thoughts", pa.list_(_THOUGHT)), ("extra", pa.string())],
    metadata={"tpt_megatron": "augmented-1"},
)


def is_record_file(name: str) -> bool:
    """Say whether a file's name is one of a record file that can be read."""
    return name.endswith((*LINE_ENDINGS, ".parquet")) and not name.startswith((".", "_"))


def expand_inputs(patterns: tuple[str, ...]) -> list[Location]:
    """Return the files that names, folders, globs and URLs stand for, each once, in sorted order within a pattern.

    A folder stands for the record files in it; an output folder of `tpt augment` or `tpt value` stands for its shards, whose sizes are
    checked. Raises DataError when a pattern matches nothing, or when such an output is incomplete.
    """
    found: dict[str, Location] = {}
    for pattern in patterns:
        base = locate(pattern)
        if base.is_file():
            matches = [base]
        elif base.is_dir():
            matches = _augmented_shards(base) or [base / name for name in base.names() if is_record_file(name) and (base / name).is_file()]
        else:
            matches = base.glob()
        if not matches:
            raise DataError(f"{pattern}: no input file matches; give a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of them, or a glob")
        for match in matches:
            if not is_record_file(match.name):
                raise DataError(f"{match}: not a record file by its name; the endings are {', '.join(LINE_ENDINGS)} and .parquet")
        for match in matches:
            found.setdefault(match.resolved(), match)
    return list(found.values())


def refuse_inputs_in_output(patterns: tuple[str, ...], output: Location) -> None:
    """Raise ConfigError when a stage would read what it writes: on the next run its output would be its input."""
    for pattern in patterns:
        place = locate(pattern)
        if output.contains(place):
            raise ConfigError(f"input={pattern} lies in output={output}; give an output folder apart from the input")


def _augmented_shards(folder: Location) -> list[Location]:
    """Return the shards of an output of augmented documents; none where the folder is something else."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        if (folder / "plan.json").is_file() and (folder / "shards").is_dir():
            raise DataError(
                f"{folder}: an unfinished output of tpt augment or tpt value (shards without manifest.json); run it again, it goes on where it stopped"
            )
        return []
    value = read_json(manifest_path)
    if not isinstance(value, dict) or value.get("kind") != AUGMENTED:
        return []
    manifest = read_manifest(manifest_path, AUGMENTED)
    check_outputs(manifest, folder, checksums=False)
    return [folder / entry.name for entry in manifest.outputs if entry.name.startswith("shards/")]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file before anybody has looked into it.

    where    FILE:LINE, or FILE:row N in Parquet, from 1
    content  the line's bytes, or the row's values
    fault    why it cannot be looked into at all, if so; `content` is then what can be shown of it
    """

    where: str
    content: bytes | Mapping[str, Any]
    fault: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether it is an empty line, which is no record."""
        return isinstance(self.content, bytes) and not self.content.strip() and self.fault is None

    def parse(self) -> Any:
        """Return the JSON value, or the row's values; RecordError when it is not JSON, not UTF-8, or too large."""
        if self.fault is not None:
            raise RecordError(self.where, self.fault)
        return parse_json_line(self.content, self.where) if isinstance(self.content, bytes) else dict(self.content)

    def line(self) -> bytes:
        """Return the record as a line, to be set aside."""
        return self.content if isinstance(self.content, bytes) else orjson.dumps(self.content, default=str)


def read_rows(
    place: Location, *, first: int = 0, offset: int = 0, longest: int | None = None, progress: Callable[[int], object] | None = None
) -> Generator[Row]:
    """Yield the rows of a file from row `first` (0-based) on; `offset` is where it begins in a plain file, 0 if not known.

    A record of more than `longest` bytes comes with a fault and its first 4,096 bytes. Raises DataError when the file
    cannot be read or is damaged.
    """
    if place.name.endswith(".parquet"):
        yield from _parquet_rows(place, first, longest, progress)
        return
    skipped = first if offset == 0 else 0
    for number, (line, length) in enumerate(stream_lines(place, offset=offset, longest=longest, progress=progress), first - skipped + 1):
        if number <= first:
            continue
        where = f"{place}:{number}"
        if longest is not None and len(line) > longest:
            yield Row(where, line[:4096], too_long(length, longest))
        else:
            yield Row(where, line)


def too_long(length: int, longest: int) -> str:
    """Say that a record of `length` bytes is too long."""
    return f"the record has {length:,} bytes, more than max_record_megabytes allows ({longest:,} bytes)"


@contextmanager
def open_parquet(place: Location) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for a block; DataError when it is missing, cut off or none."""
    try:
        source = place.open()
    except FileNotFoundError:
        raise DataError(f"{place}: no such file") from None
    with source:
        try:
            file = pq.ParquetFile(source)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{place}: not a whole Parquet file ({str(error).splitlines()[0]})") from None
        with file:
            yield file


def _parquet_rows(place: Location, first: int, longest: int | None, progress: Callable[[int], object] | None) -> Iterator[Row]:
    with open_parquet(place) as file:
        ends = _row_group_ends(file)
        group = bisect.bisect_right(ends, first)
        number = ends[group - 1] if group else 0
        # pyarrow keeps a schema's metadata when columns are dropped, so the names must agree too.
        marked = (file.schema_arrow.metadata or {}).get(b"tpt_megatron") == b"augmented-1"
        ours = marked and file.schema_arrow.names == AUGMENTED_SCHEMA.names
        size, rows = place.size(), max(1, file.metadata.num_rows)
        batches = file.iter_batches(_rows_per_batch(file), row_groups=list(range(group, file.metadata.num_row_groups)))
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{place}: damaged after row {number} ({str(error).splitlines()[0]})") from None
            if batch is None:
                return
            passed = min(batch.num_rows, max(0, first - number))
            number += passed
            for values in _python_rows(batch.slice(passed)):
                number += 1
                yield _row(f"{place}:row {number}", values, ours, longest)
            if progress is not None:
                progress(size * batch.num_rows // rows)


def _rows_per_batch(file: pq.ParquetFile) -> int:
    """Return how many rows to read at once, fewer where they are large."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0.0)
    return max(1, min(ROWS_PER_BATCH, int(BYTES_PER_BATCH / max(1.0, largest))))


def _row_group_ends(file: pq.ParquetFile) -> list[int]:
    """Return, for each row group, the number of rows up to and including it."""
    ends, total = [], 0
    for i in range(file.metadata.num_row_groups):
        total += file.metadata.row_group(i).num_rows
        ends.append(total)
    return ends


def _python_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """Yield each row's values, or, for a row that Python cannot hold (no UTF-8, a date out of range), what is wrong with it."""
    unreadable = (ValueError, OverflowError, pa.ArrowException)  # a UnicodeDecodeError is a ValueError
    # Python's times have no nanoseconds. pyarrow gives pandas' own where that is installed, which are no values of a record.
    schema = pa.schema([field.with_type(_in_microseconds(field.type)) for field in batch.schema])
    try:
        rows = batch.cast(schema).to_pylist()
    except unreadable:
        for i in range(batch.num_rows):
            try:
                yield from batch.take([i]).cast(schema).to_pylist()  # a slice would have the lists of all rows cast
            except UnicodeDecodeError as error:
                yield f"not valid UTF-8 at byte {error.start}"
            except unreadable as error:
                yield f"a value cannot be read: {' '.join(str(error).split())}"
    else:
        yield from rows


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    """Return the type of the same values with times in microseconds, inside of lists and structures, too."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_in_microseconds(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_in_microseconds(kind.value_type))
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) and kind.unit == "ns" else kind


def _row(where: str, values: dict[str, Any] | str, ours: bool, longest: int | None) -> Row:
    if isinstance(values, str):
        return Row(where, b"", values)
    if longest is not None:
        length = sum(len(value) for value in values.values() if isinstance(value, (str, bytes)))
        if length > longest:
            return Row(where, repr(values)[:4096].encode(errors="replace"), too_long(length, longest))
    if not ours:
        return Row(where, values)
    try:
        return Row(where, _from_columns(values))
    except orjson.JSONDecodeError as error:
        return Row(where, repr(values)[:4096].encode(errors="replace"), f"a column that holds JSON does not: {error}")


def _from_columns(values: dict[str, Any]) -> dict[str, Any]:
    """Return the record that `encode_records` wrote as a row."""
    extra, thoughts = values.pop("extra"), values.pop("thoughts") or []
    record = {key: value for key, value in values.items() if value is not None}
    record.update(orjson.loads(extra) if extra else {})
    record["thoughts"] = [_thought_from_column(thought) for thought in thoughts]
    return record


def _thought_from_column(values: dict[str, Any]) -> dict[str, Any]:
    extra, sampling = values.pop("extra"), values.pop("sampling")
    record = {key: value for key, value in values.items() if value is not None}
    if sampling is not None:
        record["sampling"] = orjson.loads(sampling)
    return record | (orjson.loads(extra) if extra else {})


def encode_json(value: Any) -> bytes:
    """Return JSON for a record; decimals become text. Raises TypeError for what JSON cannot hold (bytes, NaN is null)."""
    return orjson.dumps(value, default=_as_json)


def _as_json(value: Any) -> str:
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} has no place in JSON")


def encode_records(records: Sequence[AugmentedDocument], kind: Format) -> bytes:
    """Return the bytes of a file that holds `records`. `read_rows` gives them back; equal records make equal bytes."""
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(_to_table(records), sink, compression="zstd", compression_level=3)
        return sink.getvalue()
    lines = _to_lines(records)
    return zstandard.ZstdCompressor(level=3).compress(lines) if kind == "jsonl.zst" else lines


class RecordWriter:
    """Writes a file of records of any number, some at a time, for a `with` block; equal records, some at a time alike, make equal bytes."""

    def __init__(self, path: Path, kind: Format) -> None:
        self._path, self._kind, self._stack = path, kind, ExitStack()

    def __enter__(self) -> Self:
        if self._kind == "parquet":
            self._table = self._stack.enter_context(pq.ParquetWriter(self._path, AUGMENTED_SCHEMA, compression="zstd", compression_level=3))
        else:
            self._file: IO[bytes] = self._stack.enter_context(open(self._path, "wb"))
            if self._kind == "jsonl.zst":
                self._file = self._stack.enter_context(zstandard.ZstdCompressor(level=3).stream_writer(self._file, closefd=False))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def write(self, records: Sequence[AugmentedDocument]) -> None:
        """Write some records; in Parquet they are a row group."""
        if self._kind == "parquet":
            self._table.write_table(_to_table(records))
        else:
            self._file.write(_to_lines(records))


def _to_table(records: Sequence[AugmentedDocument]) -> pa.Table:
    return pa.Table.from_pylist([_to_columns(augmented_to_record(record)) for record in records], schema=AUGMENTED_SCHEMA)


def _to_lines(records: Sequence[AugmentedDocument]) -> bytes:
    return b"".join(encode_json(augmented_to_record(record)) + b"\n" for record in records)


def _to_columns(record: dict[str, Any]) -> dict[str, Any]:
    known = {"id": record.pop("id"), "text": record.pop("text"), "source": record.pop("source", None)}
    thoughts = [_thought_to_column(thought) for thought in record.pop("thoughts")]
    return known | {"thoughts": thoughts, "extra": encode_json(record).decode() if record else None}


def _thought_to_column(thought: dict[str, Any]) -> dict[str, Any]:
    values = {key: value for key, value in thought.items() if key in _THOUGHT_COLUMNS}
    if "sampling" in values:
        values["sampling"] = encode_json(values["sampling"]).decode()
    extra = {key: value for key, value in thought.items() if key not in _THOUGHT_COLUMNS}
    return values | {"extra": encode_json(extra).decode() if extra else None}


def starts_anywhere(place: Location) -> bool:
    """Say whether reading can begin in the middle of a file without passing over what comes before."""
    return not is_compressed(place.name)
