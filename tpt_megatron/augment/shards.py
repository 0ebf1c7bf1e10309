"""One shard at work and its files: reading its records, journalling what is finished of it, committing it whole.

    OUTPUT/shards/00012-3f9a1c2e.parquet       augmented documents, in the input's order; named by a hash of its bytes
    OUTPUT/shards/00012.manifest.json          names the files of the shard: with it, and only with it, the shard exists
    OUTPUT/bad/00012-....jsonl                 records that could not be used, if any
    OUTPUT/rejected/00012-....jsonl.zst        thoughts that the checks refused, if any, with reasons
    OUTPUT/journal/00012/WORKER-0000.jsonl.zst what is finished of an unfinished shard

The manifest is created exclusively. Two workers that both believe to hold a shard write different data files, and one
manifest: the loser's files are removed. So a finished shard never changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson
import zstandard

from tpt_megatron.augment.claims import Claim
from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.plan import Plan, Shard
from tpt_megatron.augment.statistics import Statistics
from tpt_megatron.bad_records import describe_bad_record
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.files import FileEntry, Manifest, read_manifest
from tpt_megatron.record_files import Format, Row, encode_json, encode_records, read_rows, starts_anywhere
from tpt_megatron.records import AugmentedDocument, Document, FieldNames, read_augmented, read_thought, text_id, thought_to_record
from tpt_megatron.storage import Location, locate

SHARD_KIND = "augmented_shard"


@dataclass(slots=True)
class Work:
    """One document of an open shard: the row it stood in, what it is with the thoughts it brought along, and what came of it."""

    row: Row
    given: AugmentedDocument
    outcome: Outcome | None = None


@dataclass(slots=True)
class OpenShard:
    """A claimed shard in memory, of about `size` bytes: its documents in order, its bad records, and what is not journalled yet."""

    shard: Shard
    claim: Claim
    works: list[Work]
    bad: list[tuple[bytes, RecordError]]
    blank_lines: int
    restored: int = 0
    settled: int = 0
    unsaved: list[int] = field(default_factory=list)
    parts: int = 0
    size: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    began: float = field(default_factory=time.time)

    @property
    def is_complete(self) -> bool:
        """Whether every document has its outcome, or was found unusable."""
        return self.settled == len(self.works)

    def finish(self, number: int, outcome: Outcome) -> None:
        """Take what came of document `number`."""
        self.works[number].outcome = outcome
        self.unsaved.append(number)
        self.settled += 1

    def restore(self, number: int, outcome: Outcome) -> None:
        """Take what an earlier worker saved of document `number`."""
        self.works[number].outcome = outcome
        self.restored += 1
        self.settled += 1

    def set_aside(self, number: int, error: RecordError) -> None:
        """Take document `number` for unusable."""
        self.bad.append((self.works[number].row.line(), error))
        self.settled += 1

    def pending(self) -> list[int]:
        """Return the numbers of the documents that have nothing yet."""
        return [number for number, work in enumerate(self.works) if work.outcome is None]


class ShardReader:
    """Reads shards' rows. A compressed file is read on from where the last shard of it ended, not from its start."""

    def __init__(self, plan: Plan, longest: int) -> None:
        self._plan = plan
        self._longest = longest
        self._at: tuple[int, int] | None = None  # file and next row of the iterator
        self._rows: Generator[Row] | None = None

    def close(self) -> None:
        """Close the file that was read last."""
        if self._rows is not None:
            self._rows.close()
            self._rows = self._at = None

    def read(self, shard: Shard) -> list[Row]:
        """Return the shard's rows; DataError when the input cannot be read or ends before the shard does."""
        place = locate(self._plan.inputs[shard.file].name)
        if starts_anywhere(place):
            with closing(read_rows(place, first=shard.first, offset=shard.offset, longest=self._longest)) as source:
                rows = list(islice(source, shard.count))
        else:
            if self._at is None or self._at[0] != shard.file or self._at[1] > shard.first:
                self.close()
                self._rows, self._at = read_rows(place, longest=self._longest), (shard.file, 0)
            assert self._rows is not None
            rows = list(islice(self._rows, shard.first - self._at[1], shard.first - self._at[1] + shard.count))
            self._at = (shard.file, shard.first + shard.count)
        if len(rows) != shard.count:
            raise DataError(f"{place}: has changed since the output was planned: {shard.count - len(rows)} records of shard {shard.name} are missing")
        return rows


def open_shard(shard: Shard, claim: Claim, rows: list[Row], names: FieldNames) -> OpenShard:
    """Look into the rows of a shard: documents, blank lines, and records that cannot be used."""
    opened = OpenShard(shard, claim, [], [], 0)
    for row in rows:
        if row.is_blank:
            opened.blank_lines += 1
            continue
        try:
            given = read_augmented(row.parse(), row.where, names)
            try:
                encode_json((given.document.extra, [thought_to_record(thought) for thought in given.thoughts]))
            except TypeError as error:  # what orjson raises, for depth too
                raise RecordError(row.where, f"cannot be written as JSON: {error}") from None
        except RecordError as error:
            opened.bad.append((row.line(), error))
        else:
            opened.works.append(Work(row, given))
            opened.size += sys.getsizeof(row.content) + sys.getsizeof(given.document.text)
    return opened


class Journal:
    """What is finished of unfinished shards: small files, each written once, so that any store will do."""

    def __init__(self, folder: Location, plan: Plan, worker: str) -> None:
        self._folder = folder
        self._plan = plan.fingerprint()
        self._worker = worker

    def save(self, opened: OpenShard) -> None:
        """Write what was finished since the last time. What could not be written is tried again the next time."""
        numbers = list(opened.unsaved)
        if not numbers:
            return
        lines = b"".join(encode_json(_to_entry(number, opened.works[number])) + b"\n" for number in numbers)
        place = self._folder / opened.shard.name / f"{self._plan}-{self._worker}-{opened.parts:04d}.jsonl.zst"
        place.write(zstandard.ZstdCompressor(level=1).compress(lines))
        opened.parts += 1
        del opened.unsaved[: len(numbers)]

    def restore(self, opened: OpenShard) -> None:
        """Fill in what earlier workers finished of this shard. An entry of another plan or document, or a damaged one, is left out."""
        folder = self._folder / opened.shard.name
        for name in folder.names():
            if not name.startswith(f"{self._plan}-"):
                continue
            try:
                lines = zstandard.ZstdDecompressor().decompress((folder / name).read_bytes(), max_output_size=1 << 31).splitlines()
                entries = [orjson.loads(line) for line in lines]
            except (DataError, zstandard.ZstdError, orjson.JSONDecodeError):
                continue
            for entry in entries:
                self._restore(opened, entry)

    def _restore(self, opened: OpenShard, entry: dict[str, Any]) -> None:
        number = entry["number"]
        if number >= len(opened.works) or opened.works[number].outcome is not None:
            return
        if entry["document_hash"] == _document_hash(opened.works[number].given.document):
            opened.restore(number, _from_entry(entry))

    def forget(self, shard: Shard) -> None:
        """Remove what was kept of a shard that is finished."""
        (self._folder / shard.name).remove()


def _document_hash(document: Document) -> str:
    return text_id(document.text)[:16]


def _to_entry(number: int, work: Work) -> dict[str, Any]:
    outcome = work.outcome
    assert outcome is not None
    return {
        "number": number,
        "document_hash": _document_hash(work.given.document),
        "thoughts": [thought_to_record(thought) for thought in outcome.thoughts],
        "rejections": [_rejection_to_record(rejection) for rejection in outcome.rejections],
        "requests": outcome.requests,
        "prompt_tokens": outcome.prompt_tokens,
        "generated_tokens": outcome.generated_tokens,
    }


def _rejection_to_record(rejection: Rejection) -> dict[str, Any]:
    return {"reason": rejection.reason, "detail": rejection.detail, "thought": thought_to_record(rejection.thought)}


def _from_entry(entry: dict[str, Any]) -> Outcome:
    return Outcome(
        thoughts=tuple(read_thought(thought, "journal") for thought in entry["thoughts"]),
        rejections=tuple(Rejection(value["reason"], value["detail"], read_thought(value["thought"], "journal")) for value in entry["rejections"]),
        requests=entry["requests"],
        prompt_tokens=entry["prompt_tokens"],
        generated_tokens=entry["generated_tokens"],
    )


class ShardWriter:
    """Commits complete shards to an output."""

    def __init__(self, output: Location, plan: Plan, worker: str, *, kind: Format, keep_rejected: bool, difficulty_field: str | None) -> None:
        self._output = output
        self._worker = worker
        self._plan = plan
        self._fingerprint = plan.fingerprint()
        self._kind: Format = kind
        self._keep_rejected = keep_rejected
        self._difficulty_field = difficulty_field

    def commit(self, opened: OpenShard) -> bool:
        """Write the shard's files and then its manifest; False when another worker's manifest was there first."""
        finished = [(work.given, work.outcome) for work in opened.works if work.outcome is not None]
        records = [AugmentedDocument(given.document, given.thoughts + outcome.thoughts) for given, outcome in finished]
        entries = [self._write(f"shards/{opened.shard.name}", self._kind, encode_records(records, self._kind))]
        if opened.bad:
            opened.bad.sort(key=lambda bad: _place_in_file(bad[1].where))
            entries.append(self._write(f"bad/{opened.shard.name}", "jsonl", b"".join(describe_bad_record(line, error) for line, error in opened.bad)))
        rejected = [(given.document, rejection) for given, outcome in finished for rejection in outcome.rejections]
        if rejected and self._keep_rejected:
            lines = b"".join(encode_json({"id": document.id} | _rejection_to_record(rejection)) + b"\n" for document, rejection in rejected)
            entries.append(self._write(f"rejected/{opened.shard.name}", "jsonl.zst", zstandard.ZstdCompressor(level=3).compress(lines)))
        manifest = self._manifest(opened, tuple(entries), records, len(rejected))
        if manifest_place(self._output, opened.shard).create(manifest.to_bytes()):
            return True
        kept = {entry.name for entry in read_shard_manifest(self._output, opened.shard).outputs}
        for entry in entries:
            if entry.name not in kept:
                (self._output / entry.name).remove()
        return False

    def _write(self, stem: str, ending: str, data: bytes) -> FileEntry:
        checksum = hashlib.sha256(data).hexdigest()
        name = f"{stem}-{checksum[:8]}.{ending}"
        (self._output / name).write(data)
        return FileEntry(name=name, bytes=len(data), sha256=checksum)

    def _manifest(self, opened: OpenShard, entries: tuple[FileEntry, ...], records: list[AugmentedDocument], rejected: int) -> Manifest:
        statistics = Statistics()
        for work in opened.works:
            if work.outcome is not None:
                document = work.given.document
                difficulty = None if self._difficulty_field is None else document.extra.get(self._difficulty_field)
                statistics.add(document, work.outcome, difficulty=None if difficulty is None else str(difficulty), document_tokens=None)
        shard = opened.shard
        span = {"plan": self._fingerprint, "worker": self._worker, "began": opened.began, "ended": time.time()}
        return Manifest(
            kind=SHARD_KIND,
            settings={},
            inputs=(self._plan.inputs[shard.file],),
            outputs=entries,
            counts={
                "documents": len(records),
                "thoughts": sum(len(record.thoughts) for record in records),
                "rejected_thoughts": rejected,
                "documents_without_thoughts": sum(not record.thoughts for record in records),
                "bad_records": len(opened.bad),
                "blank_lines": opened.blank_lines,
                "lines_read": shard.count,
            },
            details={"first": shard.first, "statistics": statistics.to_json()} | span,
        )


def _place_in_file(where: str) -> int:
    """Return the line or row number of FILE:LINE or FILE:row N."""
    return int(where.rsplit(":", 1)[1].removeprefix("row "))


def manifest_place(output: Location, shard: Shard) -> Location:
    """Return where a shard's manifest is."""
    return output / f"shards/{shard.name}.manifest.json"


def finished_shards(output: Location) -> set[int]:
    """Return the numbers of the shards that have their manifest."""
    ending = ".manifest.json"
    numbers = (name.removesuffix(ending) for name in (output / "shards").names() if name.endswith(ending))
    return {int(number) for number in numbers if number.isdigit()}


def read_shard_manifest(output: Location, shard: Shard) -> Manifest:
    """Read a finished shard's manifest."""
    return read_manifest(manifest_place(output, shard), SHARD_KIND)


def read_shard_manifests(output: Location, shards: Sequence[Shard]) -> dict[int, Manifest]:
    """Read the manifests of finished shards, by number, many at once, since a store takes its time for each; without those that are damaged."""

    def read(shard: Shard) -> Manifest | None:
        try:
            return read_shard_manifest(output, shard)
        except DataError:
            return None

    with ThreadPoolExecutor(16) as pool:
        read_ones = zip(shards, pool.map(read, shards), strict=True)
        return {shard.number: manifest for shard, manifest in read_ones if manifest is not None}
