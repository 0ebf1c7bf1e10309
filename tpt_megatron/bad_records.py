"""Reading records out of lines, with one policy for those that cannot be used; shared by the stages that read records."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import orjson

from tpt_megatron.errors import RecordError
from tpt_megatron.files import open_atomic
from tpt_megatron.record_files import read_rows
from tpt_megatron.storage import Location

logger = logging.getLogger(__name__)

Policy = Literal["set_aside", "fail"]
WARNINGS_SHOWN = 10
Record = TypeVar("Record")


@dataclass(slots=True)
class LineCounts:
    """What became of the lines of an input: lines_read == records + bad_records + blank_lines."""

    lines_read: int = 0
    records: int = 0
    bad_records: int = 0
    blank_lines: int = 0


class BadRecords:
    """The bad records of one run: raised under `fail`; counted, logged and written to a file under `set_aside`."""

    def __init__(self, policy: Policy) -> None:
        self.count = 0
        self._policy = policy
        self._path: Path | None = None
        self._stack = ExitStack()
        self._file: IO[bytes] | None = None

    @contextmanager
    def kept_in(self, path: Path) -> Iterator[None]:
        """Write the records of this block to `path`, atomically; no file, and no older one, where there were none."""
        self._path, self._file = path, None
        try:
            with ExitStack() as self._stack:
                yield
            if self._file is None:
                path.unlink(missing_ok=True)
        finally:
            self._path, self._file = None, None

    def add(self, line: bytes, error: RecordError) -> None:
        """Take one bad record; raises `error` under the policy `fail`."""
        if self._policy == "fail":
            raise error
        assert self._path is not None
        if self._file is None:
            self._file = self._stack.enter_context(open_atomic(self._path))
        self._file.write(describe_bad_record(line, error))
        self.count += 1
        if self.count <= WARNINGS_SHOWN:
            logger.warning("%s; set aside", error)

    def summarise(self, place: Path) -> None:
        """Log how many records were set aside, and where."""
        if self.count:
            logger.warning("%d bad records were set aside, see %s", self.count, place)


def describe_bad_record(line: bytes, error: RecordError) -> bytes:
    """Return the line of a file of bad records: where, reason, and the record; in base64 too where it is no UTF-8."""
    text = line.decode(errors="replace")
    entry = {"where": error.where, "reason": error.reason, "line": text}
    if text.encode() != line:
        entry["base64"] = base64.b64encode(line).decode()
    return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)


def read_records(
    place: Location,
    read: Callable[[Any, str], Record],
    bad: BadRecords,
    counts: LineCounts,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Record]:
    """Yield `read(parsed value, where)` for each record of a file, and count what became of it.

    Blank lines are skipped; a line that is no JSON, and a record on which `read` raises RecordError, goes to `bad`.
    """
    for row in read_rows(place, progress=progress):
        counts.lines_read += 1
        if row.is_blank:
            counts.blank_lines += 1
            continue
        try:
            record = read(row.parse(), row.where)
        except RecordError as error:
            counts.bad_records += 1
            bad.add(row.line(), error)
            continue
        counts.records += 1
        yield record
