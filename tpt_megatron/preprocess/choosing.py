"""Choosing thoughts by a score that each has: those of at least so much, the best of a document, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from tpt_megatron.config.preprocess import KeepThoughts, PreprocessConfig
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.record_files import read_rows
from tpt_megatron.records import AugmentedDocument, Thought, read_augmented
from tpt_megatron.storage import Location

FILES_LOOKED_AT, RECORDS_LOOKED_AT, LONGEST_LOOKED_AT = 8, 64, 1_000_000


@dataclass(slots=True)
class ChoiceCounts:
    """What became of thoughts: read = kept + below_min + not_best + unscored. documents_dropped: those that no arm has, since no thought stayed."""

    thoughts_read: int = 0
    thoughts_kept: int = 0
    thoughts_below_min: int = 0
    thoughts_not_best: int = 0
    thoughts_unscored: int = 0
    thoughts_kept_unscored: int = 0
    documents_dropped: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)


@dataclass(slots=True)
class ThoughtChoice:
    """Chooses a document's thoughts; counts what it did."""

    config: KeepThoughts
    counts: ChoiceCounts = field(default_factory=ChoiceCounts)

    def check(self, augmented: AugmentedDocument, where: str) -> None:
        """Raise RecordError where a thought's score is neither a number nor null."""
        for number, thought in enumerate(augmented.thoughts, 1):
            value = find(thought, self.config.score)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise RecordError(where, f"thought {number}: {self.config.score} must be a number or null, found {type(value).__name__}")

    def of(self, augmented: AugmentedDocument) -> AugmentedDocument | None:
        """Return the document with the thoughts that stay; None where it is dropped."""
        scores = [_score(thought, self.config.score) for thought in augmented.thoughts]
        least = -math.inf if self.config.min is None else self.config.min
        enough = [number for number, score in enumerate(scores) if score is not None and score >= least]
        best = sorted(enough, key=lambda number: -(scores[number] or 0.0))[: self.config.best]
        unscored = [number for number, score in enumerate(scores) if score is None]
        kept = sorted([*best, *unscored] if self.config.unscored == "keep" else best)
        counts = self.counts
        counts.thoughts_read += len(scores)
        counts.thoughts_kept += len(kept)
        counts.thoughts_below_min += len(scores) - len(unscored) - len(enough)
        counts.thoughts_not_best += len(enough) - len(best)
        counts.thoughts_unscored += len(unscored) if self.config.unscored == "drop" else 0
        counts.thoughts_kept_unscored += len(unscored) if self.config.unscored == "keep" else 0
        if not kept and self.config.without_thoughts == "drop":
            counts.documents_dropped += 1
            return None
        return replace(augmented, thoughts=tuple(augmented.thoughts[number] for number in kept))


def check_scored(config: PreprocessConfig, inputs: Sequence[Location]) -> None:
    """Look at the first records of some inputs, and raise DataError where there are thoughts and none has even a place for the score."""
    if config.keep_thoughts is None:
        return
    group, _, name = config.keep_thoughts.score.rpartition(".")
    seen = 0
    for place in inputs[:: max(1, len(inputs) // FILES_LOOKED_AT)][:FILES_LOOKED_AT]:
        for row in islice(read_rows(place, longest=LONGEST_LOOKED_AT), RECORDS_LOOKED_AT):
            try:
                thoughts = read_augmented(row.parse(), row.where, config.fields.names()).thoughts
            except RecordError:  # left to the run to report
                continue
            seen += len(thoughts)
            if any(name in (find(thought, group) or {} if group else thought.extra) for thought in thoughts):
                return
    if seen:
        raise DataError(without_scores(config.keep_thoughts, seen))


def without_scores(config: KeepThoughts, thoughts: int) -> str:
    """Say that thoughts are to be chosen by a score that none has."""
    return f"none of {thoughts:,} thoughts has a score at keep_thoughts.score={config.score}: have tpt value give them one, or say where they have it"


def find(thought: Thought, path: str) -> Any:
    """Return what a thought has beside its own fields at a path with dots; None where it has nothing."""
    value: Any = thought.extra
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _score(thought: Thought, path: str) -> float | None:
    value = find(thought, path)
    return None if value is None or math.isnan(value) else float(value)
