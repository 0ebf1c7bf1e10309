"""Cutting the inputs into pieces by their sizes, without reading them: `OUTPUT/plan.json`.

A piece is what one worker does at a time and what a new start re-uses. Lines of a plain file belong to the piece in which
they begin; a compressed file is one piece, since it can only be read from its beginning; a Parquet file is cut between row groups.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.files import is_compressed, read_json
from tpt_megatron.record_files import open_parquet
from tpt_megatron.storage import Location

PLAN_VERSION = 2
PIECES_AT_MOST = 4096
SMALLEST_PIECE, SMALLEST_PIECE_OF_ONE_WORKER, LARGEST_PIECE = 32e6, 512e6, 1e9
"""Bytes. One worker has nobody to share with: larger pieces cost a little less, and no more than half a minute when they are lost."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of input `file`; rows instead of bytes where the file is Parquet."""

    number: int
    file: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The number as folder names have it."""
        return f"{self.number:05d}"

    @property
    def is_first(self) -> bool:
        """Whether the file begins with it."""
        return self.start == 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Inputs by (name, bytes), what tells cheaply whether each has changed since, and the pieces in the inputs' order.

    `settings` are those that the pieces depend on, without the arms.
    """

    settings: dict[str, Any]
    inputs: tuple[tuple[str, int], ...]
    stamps: tuple[str, ...]
    pieces: tuple[Piece, ...]

    def is_of(self, other: Plan) -> bool:
        """Say whether both are for the same inputs, unchanged, and settings; the cuts may differ."""
        return (self.settings, self.inputs, self.stamps) == (other.settings, other.inputs, other.stamps)

    def fingerprint(self) -> str:
        """Return 16 hex digits that are the same on every machine that sees the same inputs under the same names."""
        return hashlib.sha256(orjson.dumps(self._content(), option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]

    def _content(self) -> dict[str, Any]:
        cuts = [(piece.file, piece.start, piece.stop) for piece in self.pieces]
        return {"plan_version": PLAN_VERSION, "settings": self.settings, "inputs": self.inputs, "pieces": cuts}

    def to_bytes(self) -> bytes:
        """Return the plan as JSON."""
        return orjson.dumps(self._content() | {"stamps": self.stamps}, option=orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def read(cls, place: Location) -> Plan:
        """Read a plan; DataError when it is damaged or of another release."""
        value = read_json(place)
        if not isinstance(value, dict) or value.get("plan_version") != PLAN_VERSION:
            raise DataError(f"{place}: not a plan of this release; give another output, or remove the folder")
        try:
            return cls(
                settings=value["settings"],
                inputs=tuple((str(name), int(size)) for name, size in value["inputs"]),
                stamps=tuple(value["stamps"]),
                pieces=tuple(Piece(number, *numbers) for number, numbers in enumerate(value["pieces"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{place}: a damaged plan ({error}); give another output, or remove the folder") from None


def make_plan(inputs: Sequence[Location], settings: dict[str, Any], piece_megabytes: float | None, *, is_shared: bool = True) -> Plan:
    """Cut the inputs, into pieces of `piece_megabytes` or by the inputs' size; `is_shared`: several workers or machines do the work.

    What is written does not depend on the cuts.
    """
    sizes, stamps = [], []
    for place in inputs:
        try:
            sizes.append(place.size())
            stamps.append(place.stamp())
        except FileNotFoundError:
            raise DataError(f"{place}: no such file") from None
    smallest = SMALLEST_PIECE if is_shared else SMALLEST_PIECE_OF_ONE_WORKER
    wanted = min(LARGEST_PIECE, max(smallest, sum(sizes) / PIECES_AT_MOST)) if piece_megabytes is None else piece_megabytes * 1e6
    pieces: list[Piece] = []
    for file, (place, size) in enumerate(zip(inputs, sizes, strict=True)):
        for start, stop in _cuts(place, size, wanted):
            pieces.append(Piece(len(pieces), file, start, stop))
    return Plan(settings, tuple((str(place), size) for place, size in zip(inputs, sizes, strict=True)), tuple(stamps), tuple(pieces))


def part_of(plan: Plan, number: int, count: int) -> tuple[Piece, ...]:
    """Return the pieces of part `number` of `count`, as equal in number as can be, in order.

    Raises ConfigError when there are fewer pieces than parts.
    """
    pieces = plan.pieces
    if count > len(pieces):
        raise ConfigError(f"shard={number + 1}/{count}: the input makes {len(pieces)} piece(s) of work only; give fewer shards or a smaller piece_megabytes")
    return pieces[number * len(pieces) // count : (number + 1) * len(pieces) // count]


def _cuts(place: Location, size: int, wanted: float) -> Iterator[tuple[int, int]]:
    if place.name.endswith(".parquet"):
        yield from _row_group_cuts(place, size, wanted)
    elif is_compressed(place.name):
        yield 0, size
    else:
        count = max(1, math.ceil(size / wanted))
        yield from ((i * size // count, (i + 1) * size // count) for i in range(count))


def _row_group_cuts(place: Location, size: int, wanted: float) -> Iterator[tuple[int, int]]:
    with open_parquet(place) as file:
        rows, start, held = 0, 0, 0.0
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            share = size * group.num_rows / max(1, file.metadata.num_rows)
            if held and held + share > wanted:
                yield start, rows
                start, held = rows, 0.0
            rows += group.num_rows
            held += share
        yield start, rows
