"""What a shard, and by merging a whole output, says of its documents and thoughts.

Everything in it is an integer, so that merging is exact: in whatever order shards finish and are merged, the sums are the
same. Lengths are kept as histograms with logarithmic bins; quantiles read off them are approximate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tpt_megatron.augment.outcome import Outcome
from tpt_megatron.config.augment import Cost
from tpt_megatron.errors import DataError
from tpt_megatron.records import Document, Thought

BINS_PER_DOUBLING = 4
"""A bin's upper edge is 2**(1/4) = 1.19 times its lower one: no quantile is further than 19 % from the exact one."""

MAXIMUM_GROUPS = 200
MAXIMUM_NAME = 100
OTHER = "(other)"
NO_SOURCE = "(no source)"


@dataclass(slots=True)
class Histogram:
    """Lengths, as exact count, sum, least and greatest, and counts by logarithmic bin.

    Bin b holds values from 2**(b/4) up to, and without, 2**((b+1)/4); bin -1 holds zeros.
    """

    count: int = 0
    total: int = 0
    least: int | None = None
    greatest: int | None = None
    bins: dict[int, int] = field(default_factory=dict)

    def add(self, value: int) -> None:
        """Count one length."""
        index = (value**BINS_PER_DOUBLING).bit_length() - 1  # floor(4 log2(value)), in integers: no rounding at the edges
        self.merge(Histogram(1, value, value, value, {index: 1}))

    def merge(self, other: Histogram) -> None:
        """Add what another histogram has counted."""
        self.count += other.count
        self.total += other.total
        if other.least is not None:
            self.least = other.least if self.least is None else min(self.least, other.least)
        if other.greatest is not None:
            self.greatest = other.greatest if self.greatest is None else max(self.greatest, other.greatest)
        for index, count in other.bins.items():
            self.bins[index] = self.bins.get(index, 0) + count

    @property
    def mean(self) -> float | None:
        """The exact mean; None of nothing."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """Return the value that `share` of all do not exceed, within a factor of 2**(1/4); None of nothing."""
        if self.least is None or self.greatest is None:
            return None
        rank = max(1, math.ceil(share * self.count))
        before = 0
        for index in sorted(self.bins):
            inside = self.bins[index]
            if before + inside >= rank:
                place = (rank - before - 0.5) / inside
                value = 2 ** ((index + place) / BINS_PER_DOUBLING) if index >= 0 else 0.0
                return min(max(value, self.least), self.greatest)
            before += inside
        raise AssertionError("the bins hold fewer values than were counted")


@dataclass(slots=True)
class Moments:
    """Count, sum and sum of squares of a number that each document has."""

    count: int = 0
    total: int = 0
    squares: int = 0

    def add(self, value: int) -> None:
        """Count one document's number."""
        self.merge(Moments(1, value, value * value))

    def merge(self, other: Moments) -> None:
        """Add what others have counted."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float | None:
        """The mean over documents; None of nothing."""
        return self.total / self.count if self.count else None

    @property
    def standard_error(self) -> float | None:
        """The standard error of the mean; None of fewer than two documents."""
        if self.count < 2:
            return None
        deviations = self.squares * self.count - self.total**2  # count times the sum of squared deviations, exact
        return math.sqrt(deviations / self.count / (self.count - 1) / self.count)


@dataclass(slots=True)
class Group:
    """One source, one difficulty, or one generator with one prompt. `tokens` counts the thoughts whose tokens are known, `characters` all."""

    documents: int = 0
    document_characters: int = 0
    tokens: Histogram = field(default_factory=Histogram)
    characters: Histogram = field(default_factory=Histogram)

    def add(self, document: Document, thoughts: list[Thought]) -> None:
        """Count one document and those of its thoughts that belong here."""
        self.documents += 1
        self.document_characters += len(document.text)
        for thought in thoughts:
            self.characters.add(len(thought.text))
            if thought.tokens is not None:
                self.tokens.add(thought.tokens)

    def merge(self, other: Group) -> None:
        """Add what another group has counted."""
        self.documents += other.documents
        self.document_characters += other.document_characters
        self.tokens.merge(other.tokens)
        self.characters.merge(other.characters)


def maker(thought: Thought) -> str:
    """Return what names a thought's generator and prompt together."""
    return f"{thought.generator} · {thought.prompt}" if thought.prompt else thought.generator


@dataclass(slots=True)
class Statistics:
    """What was read, thought, rejected and spent.

    all              every document and thought
    by_source        at most 200 sources, the first by name; the others are one group, "(other)". So it is for the other groups:
                     a fixed order, and not the largest, since only so does the order of merging not matter
    by_difficulty    documents that state one
    by_maker         by generator and prompt; `documents` are those that it gave a thought
    rejections       by reason, then by generator and prompt
    requests, prompt_tokens, generated_tokens   all requests, those of rejected thoughts too, as far as engines tell
    document_tokens, prompt_tokens_each, generated_tokens_each   of each document, over those where it is known
    training_tokens  document and thoughts, over documents where the tokens of both are known; `training_document_tokens`: of
                     these, what is document
    work_ms          milliseconds that workers were at work
    """

    all: Group = field(default_factory=Group)
    documents_without_thoughts: int = 0
    by_source: dict[str, Group] = field(default_factory=dict)
    by_difficulty: dict[str, Group] = field(default_factory=dict)
    by_maker: dict[str, Group] = field(default_factory=dict)
    rejections: dict[str, dict[str, int]] = field(default_factory=dict)
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    document_tokens: Moments = field(default_factory=Moments)
    prompt_tokens_each: Moments = field(default_factory=Moments)
    generated_tokens_each: Moments = field(default_factory=Moments)
    training_tokens: Moments = field(default_factory=Moments)
    training_document_tokens: int = 0
    work_ms: int = 0

    def add(self, document: Document, outcome: Outcome, *, difficulty: str | None, document_tokens: int | None) -> None:
        """Count one document. `document_tokens` are those of its whole text, None where no tokenizer counts them."""
        thoughts = list(outcome.thoughts)
        self.all.add(document, thoughts)
        self.documents_without_thoughts += not thoughts
        _group(self.by_source, NO_SOURCE if document.source is None else document.source).add(document, thoughts)
        _fold(self.by_source)
        if difficulty is not None:
            _group(self.by_difficulty, difficulty).add(document, thoughts)
            _fold(self.by_difficulty)
        for name in dict.fromkeys(map(maker, thoughts)):
            _group(self.by_maker, name).add(document, [thought for thought in thoughts if maker(thought) == name])
        _fold(self.by_maker)
        for rejection in outcome.rejections:
            counts = self.rejections.setdefault(rejection.reason, {})
            name = _shortened(maker(rejection.thought))
            counts[name] = counts.get(name, 0) + 1
            _fold_counts(counts)
        self._add_tokens(outcome, document_tokens)

    def _add_tokens(self, outcome: Outcome, document_tokens: int | None) -> None:
        self.requests += outcome.requests
        self.prompt_tokens += outcome.prompt_tokens
        self.generated_tokens += outcome.generated_tokens
        # No tokens at all for a request: the engine does not tell, or the request failed. Neither says what a document takes.
        if outcome.prompt_tokens or not outcome.requests:
            self.prompt_tokens_each.add(outcome.prompt_tokens)
        if outcome.generated_tokens or not outcome.requests:
            self.generated_tokens_each.add(outcome.generated_tokens)
        if document_tokens is None:
            return
        self.document_tokens.add(document_tokens)
        known = [thought.tokens for thought in outcome.thoughts if thought.tokens is not None]
        if len(known) == len(outcome.thoughts):
            self.training_tokens.add(document_tokens + sum(known))
            self.training_document_tokens += document_tokens

    def add_seconds(self, seconds: float) -> None:
        """Count time that a worker was at work; kept in whole milliseconds."""
        self.work_ms += round(seconds * 1000)

    def merge(self, other: Statistics) -> None:
        """Add what another shard has counted; `other` stays as it is."""
        self.all.merge(other.all)
        self.documents_without_thoughts += other.documents_without_thoughts
        for mine, theirs in ((self.by_source, other.by_source), (self.by_difficulty, other.by_difficulty), (self.by_maker, other.by_maker)):
            for name, group in theirs.items():
                mine.setdefault(name, Group()).merge(group)
            _fold(mine)
        for reason, by_maker in other.rejections.items():
            counts = self.rejections.setdefault(reason, {})
            for name, count in by_maker.items():
                counts[name] = counts.get(name, 0) + count
            _fold_counts(counts)
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.document_tokens.merge(other.document_tokens)
        self.prompt_tokens_each.merge(other.prompt_tokens_each)
        self.generated_tokens_each.merge(other.generated_tokens_each)
        self.training_tokens.merge(other.training_tokens)
        self.training_document_tokens += other.training_document_tokens
        self.work_ms += other.work_ms

    @property
    def documents(self) -> int:
        """Documents, those without thoughts too."""
        return self.all.documents

    @property
    def thoughts(self) -> int:
        """Thoughts that were kept."""
        return self.all.characters.count

    @property
    def rejected(self) -> int:
        """Thoughts that were rejected, and requests that gave none."""
        return sum(sum(counts.values()) for counts in self.rejections.values())

    @property
    def kept_share(self) -> float | None:
        """Thoughts kept, as a share of those kept and rejected; None of nothing."""
        return self.thoughts / (self.thoughts + self.rejected) if self.thoughts + self.rejected else None

    @property
    def work_s(self) -> float:
        """Seconds that workers were at work, summed over workers."""
        return self.work_ms / 1000

    @property
    def expansion_characters(self) -> float | None:
        """(document + thoughts) / document, in characters: exact. None of nothing."""
        characters = self.all.document_characters
        return (characters + self.all.characters.total) / characters if characters else None

    @property
    def expansion_tokens(self) -> float | None:
        """(document + thoughts) / document, in tokens, over the `training_tokens.count` documents where both are known; None of none."""
        return self.training_tokens.total / self.training_document_tokens if self.training_document_tokens else None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes equal statistics."""
        value: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        for name in ("document_tokens", "prompt_tokens_each", "generated_tokens_each", "training_tokens"):
            value[name]["squares"] = str(value[name]["squares"])  # outgrows the 64 bits of a JSON reader's integer
        return value

    @classmethod
    def from_json(cls, value: Any) -> Statistics:
        """Return the statistics that `to_json` described; DataError when `value` is something else."""
        try:
            return _ADAPTER.validate_python(value)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise DataError(f"statistics: {where or 'value'}: {error.errors()[0]['msg']}; the shard's manifest is damaged") from None


_ADAPTER = TypeAdapter(Statistics)


def _shortened(name: str) -> str:
    return name if len(name) <= MAXIMUM_NAME else name[: MAXIMUM_NAME - 1] + "…"


def _group(groups: dict[str, Group], name: str) -> Group:
    return groups.setdefault(_shortened(name), Group())


def _surplus(names: dict[str, Any]) -> list[str]:
    """Return the names to fold. A name once folded is never among the first 200 of a larger set, so merging in any order agrees."""
    return sorted(name for name in names if name != OTHER)[MAXIMUM_GROUPS:] if len(names) > MAXIMUM_GROUPS else []


def _fold(groups: dict[str, Group]) -> None:
    for name in _surplus(groups):
        group = groups.pop(name)
        groups.setdefault(OTHER, Group()).merge(group)


def _fold_counts(counts: dict[str, int]) -> None:
    for name in _surplus(counts):
        counts[OTHER] = counts.pop(name) + counts.get(OTHER, 0)


@dataclass(frozen=True, slots=True)
class Spent:
    """What was spent so far, in hours and in the config's currency. What was not stated is None."""

    gpu_hours: float | None
    gpu_cost: float | None
    token_cost: float | None


def spent(statistics: Statistics, cost: Cost, elapsed_s: float | None) -> Spent:
    """Return the cost so far: gpus x wall hours x price of a GPU-hour, and tokens x price of a token.

    GPU-hours need `elapsed_s`, and `cost.gpus` or `cost.per_gpu_hour` stated; tokens need a price and an engine that counts them.
    """
    stated = cost.per_gpu_hour is not None or "gpus" in cost.model_fields_set
    gpu_hours = cost.gpus * elapsed_s / 3600 if stated and elapsed_s is not None else None
    gpu_cost = None if gpu_hours is None or cost.per_gpu_hour is None else gpu_hours * cost.per_gpu_hour
    return Spent(gpu_hours, gpu_cost, token_cost(cost, statistics.prompt_tokens or None, statistics.generated_tokens or None))


def token_cost(cost: Cost, prompt_tokens: float | None, generated_tokens: float | None) -> float | None:
    """Return tokens x price; None where no price is stated, or where a count that has one is unknown."""
    priced = [(cost.per_million_prompt_tokens, prompt_tokens), (cost.per_million_generated_tokens, generated_tokens)]
    parts = [None if tokens is None else price * tokens / 1e6 for price, tokens in priced if price is not None]
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None


def quantity(value: float) -> str:
    """Return a number as people say it: 812, 4.7, 12,345, 1.25M, 3.4B."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= scale * 0.9995:
            return f"{value / scale:.3g}{letter}"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
