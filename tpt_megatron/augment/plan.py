"""Cutting the inputs into shards, once: `OUTPUT/plan.json` says what every worker of every run takes a shard to be.

A shard is a run of records of one input file. The plan is made by reading all inputs (counting lines, hashing bytes) and is
created exclusively, so that workers that start at once agree on one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from tpt_megatron.config.augment import AugmentConfig, ShardSize
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.files import FileEntry, read_json, sha256_of, stream_lines
from tpt_megatron.log import progress_bar
from tpt_megatron.record_files import expand_inputs, open_parquet, starts_anywhere
from tpt_megatron.storage import Location

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """`count` rows (blank lines included) of input `file` from row `first` on, at byte `offset` where that is known (else 0)."""

    number: int
    file: int
    first: int
    count: int
    offset: int

    @property
    def name(self) -> str:
        """The number as file names have it."""
        return f"{self.number:05d}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What an output is made of: the settings its thoughts depend on, the inputs, and the shards, in the inputs' order.

    `stamps` tell cheaply whether an input is still the file that was planned. `records` are the rows that are not blank.
    """

    settings: dict[str, Any]
    inputs: tuple[FileEntry, ...]
    stamps: tuple[str, ...]
    shards: tuple[Shard, ...]
    records: int

    def fingerprint(self) -> str:
        """Return 16 hex digits of the plan's SHA-256: what was made by another plan does not belong to this one."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]

    def to_bytes(self) -> bytes:
        """Return the plan as JSON."""
        return orjson.dumps(
            {
                "plan_version": PLAN_VERSION,
                "settings": self.settings,
                "inputs": [entry.model_dump() for entry in self.inputs],
                "stamps": self.stamps,
                "records": self.records,
                "shards": [(shard.file, shard.first, shard.count, shard.offset) for shard in self.shards],
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )

    @classmethod
    def read(cls, place: Location) -> Plan:
        """Read a plan; DataError when it is damaged or of another version."""
        value = read_json(place)
        if not isinstance(value, dict) or value.get("plan_version") != PLAN_VERSION:
            raise DataError(f"{place}: not a plan of this release; give another output, or remove the folder")
        try:
            return cls(
                settings=value["settings"],
                inputs=tuple(FileEntry.model_validate(entry) for entry in value["inputs"]),
                stamps=tuple(value["stamps"]),
                shards=tuple(Shard(number, *numbers) for number, numbers in enumerate(value["shards"])),
                records=value["records"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: a damaged plan ({error}); give another output, or remove the folder") from None


def make_or_read_plan(config: AugmentConfig, settings: dict[str, Any], output: Location) -> Plan:
    """Return the output's plan; make it where there is none, or where nothing was done yet by the one that is there.

    Raises ConfigError when the output holds results of other settings or other inputs, and DataError when an input has
    changed since, or cannot be read.
    """
    place = output / "plan.json"
    inputs = expand_inputs(config.input)
    begun = bool((output / "shards").names() or (output / "claims").names())
    if not place.is_file():
        if begun:
            raise ConfigError(f"output={output}: holds shards but no plan.json, so it is no output of this release; give another output, or remove the folder")
        plan = make_plan(inputs, settings, config)
        if place.create(plan.to_bytes()):
            return plan
    plan = Plan.read(place)
    if not begun and (plan.settings != settings or not _is_of(plan, inputs)):
        if plan.settings.get("shard") == settings["shard"] and _is_of(plan, inputs):  # only how to think has changed
            plan = dataclasses.replace(plan, settings=settings)
        else:
            plan = make_plan(inputs, settings, config)
        place.write(plan.to_bytes())
        return plan
    for key in sorted(plan.settings.keys() | settings.keys()):
        if plan.settings.get(key) != settings.get(key):
            difference = _difference(key, plan.settings, settings)
            raise ConfigError(f"output={output}: holds results of other settings ({difference}); give another output, or remove the folder")
    _check_inputs(plan, inputs, output)
    return plan


def _is_of(plan: Plan, inputs: list[Location]) -> bool:
    return [entry.name for entry in plan.inputs] == [str(place) for place in inputs] and list(plan.stamps) == [place.stamp() for place in inputs]


def _difference(key: str, planned: dict[str, Any], given: dict[str, Any]) -> str:
    def short(value: Any) -> str:
        text = orjson.dumps(value).decode()
        return text if len(text) <= 100 else f"{text[:97]}..."

    return f"{key}: {short(planned.get(key))}, now {short(given.get(key))}"


def _check_inputs(plan: Plan, inputs: list[Location], output: Location) -> None:
    planned, given = [entry.name for entry in plan.inputs], [str(place) for place in inputs]
    if planned != given:
        other = next(name for name in [*planned, *given] if (name in planned) != (name in given) or planned.index(name) != given.index(name))
        raise ConfigError(f"output={output}: was made from {len(planned)} other input(s) than the {len(given)} given now (see {other}); give another output")
    for place, entry, stamp in zip(inputs, plan.inputs, plan.stamps, strict=True):
        if place.stamp() != stamp and (place.size() != entry.bytes or sha256_of(place) != entry.sha256):
            raise DataError(f"{place}: has changed since output={output} was begun; give another output, or restore the file")


def make_plan(inputs: list[Location], settings: dict[str, Any], config: AugmentConfig) -> Plan:
    """Read all inputs and cut them into shards. Raises DataError for one that cannot be read."""
    size, longest = config.shard, int(config.max_record_megabytes * 1e6)
    shards: list[Shard] = []
    entries, stamps, records = [], [], 0
    with progress_bar("plan", sum(place.size() for place in inputs)) as bar:
        for file, place in enumerate(inputs):
            stamps.append(place.stamp())
            entries.append(FileEntry(name=str(place), bytes=place.size(), sha256=sha256_of(place)))
            cuts = _parquet_cuts(place, size) if place.name.endswith(".parquet") else _line_cuts(place, size, longest, bar.advance)
            for first, count, blank, offset in cuts:
                shards.append(Shard(len(shards), file, first, count, offset))
                records += count - blank
    return Plan(settings, tuple(entries), tuple(stamps), tuple(shards), records)


def _line_cuts(place: Location, size: ShardSize, longest: int, progress: Callable[[int], object]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, rows, blank ones, byte offset) of each shard of a file of lines; an offset only where reading can begin there."""
    limit, seekable = size.megabytes * 1e6, starts_anywhere(place)
    first = start = at = rows = blank = 0
    for line, length in stream_lines(place, longest=longest, progress=progress):
        if rows and (rows >= size.documents or at + length - start > limit):
            yield first, rows, blank, start if seekable else 0
            first, rows, blank, start = first + rows, 0, 0, at
        rows += 1
        blank += not line.strip()
        at += length
    if rows:
        yield first, rows, blank, start if seekable else 0


def _parquet_cuts(place: Location, size: ShardSize) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, rows, 0, 0) of each shard of a Parquet file, by its row groups' own sizes."""
    with open_parquet(place) as file:
        first = 0
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            bytes_per_row = group.total_byte_size / max(1, group.num_rows)
            rows = min(size.documents, max(1, math.floor(size.megabytes * 1e6 / max(1.0, bytes_per_row))))
            for begin in range(0, group.num_rows, rows):
                yield first + begin, min(rows, group.num_rows - begin), 0, 0
            first += group.num_rows
