"""What the values of many thoughts say: means, quantiles and how many help, by source. Shards are counted apart and merged in their order."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tpt_megatron.errors import DataError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SCALE, WIDTH = 1e-3, 0.02
"""Nats. A bin is 2 % wide for values well above SCALE, and 0.00002 nats near zero: no quantile is further off than that."""
SOURCES = 200
OTHERS, NO_SOURCE = "(other)", "(none)"


@dataclass(slots=True)
class Values:
    """Values of thoughts, in nats. helped: those above 0; per_token: the sum of each thought's nats over its target's tokens; bins: of these quotients."""

    thoughts: int = 0
    helped: int = 0
    nats: float = 0.0
    per_token: float = 0.0
    target_tokens: int = 0
    least: float = math.inf
    greatest: float = -math.inf
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, nats: float, target_tokens: int) -> None:
        """Count one thought."""
        each = nats / target_tokens
        self.merge(Values(1, int(nats > 0), nats, each, target_tokens, each, each, Counter({math.floor(math.asinh(each / SCALE) / WIDTH): 1})))

    def merge(self, other: Values) -> None:
        """Add what another has counted."""
        self.thoughts += other.thoughts
        self.helped += other.helped
        self.nats += other.nats
        self.per_token += other.per_token
        self.target_tokens += other.target_tokens
        self.least, self.greatest = min(self.least, other.least), max(self.greatest, other.greatest)
        self.bins.update(other.bins)

    def quantile(self, share: float) -> float:
        """Return the nats a token that `share` of the thoughts do not exceed, within a bin. Needs one thought."""
        rank, before = max(1, math.ceil(share * self.thoughts)), 0
        for index in sorted(self.bins):
            inside = self.bins[index]
            if before + inside >= rank:
                value = SCALE * math.sinh((index + (rank - before - 0.5) / inside) * WIDTH)
                return min(max(value, self.least), self.greatest)
            before += inside
        raise AssertionError("the bins hold fewer values than were counted")

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says of them."""
        if not self.thoughts:
            return {"thoughts": 0}
        return {
            "thoughts": self.thoughts,
            "helping": self.helped / self.thoughts,
            "mean_nats": self.nats / self.thoughts,
            "mean_nats_per_token": self.per_token / self.thoughts,
            "nats_of_all_per_token_of_all": self.nats / self.target_tokens,
            "target_tokens": self.target_tokens,
            "quantiles_nats_per_token": {str(share): self.quantile(share) for share in QUANTILES},
        }


@dataclass(slots=True)
class ValueStatistics:
    """What a shard, or all of them, say.

    by_source  at most 200 by name, the others together
    without    thoughts without a value, by why
    """

    all: Values = field(default_factory=Values)
    by_source: dict[str, Values] = field(default_factory=dict)
    without: Counter[str] = field(default_factory=Counter)

    def add(self, source: str | None, nats: float, target_tokens: int) -> None:
        """Count a thought's value."""
        self.all.add(nats, target_tokens)
        self.by_source.setdefault(NO_SOURCE if source is None else source, Values()).add(nats, target_tokens)
        self._fold()

    def merge(self, other: ValueStatistics) -> None:
        """Add what another shard has counted."""
        self.all.merge(other.all)
        for name, values in other.by_source.items():
            self.by_source.setdefault(name, Values()).merge(values)
        self._fold()
        self.without += other.without

    def _fold(self) -> None:
        if len(self.by_source) <= SOURCES:
            return
        # The first by name, not the largest: so it does not matter in which order shards are merged.
        for name in sorted(name for name in self.by_source if name != OTHERS)[SOURCES:]:
            self.by_source.setdefault(OTHERS, Values()).merge(self.by_source.pop(name))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes equal statistics."""
        value: dict[str, Any] = _ADAPTER.dump_python(self)
        for values in (value["all"], *value["by_source"].values()):
            values["bins"] = sorted(values["bins"].items())
            if not values["thoughts"]:
                values["least"] = values["greatest"] = None  # infinities have no place in JSON
        value["without"] = dict(sorted(value["without"].items()))
        return value

    @classmethod
    def from_json(cls, value: Any) -> ValueStatistics:
        """Return the statistics that `to_json` described; DataError when `value` is something else."""
        try:
            of_all = [value["all"], *value["by_source"].values()]
            read = [
                {key: held for key, held in values.items() if key not in ("bins", "least", "greatest") or held is not None} | {"bins": dict(values["bins"])}
                for values in of_all
            ]
            return _ADAPTER.validate_python({**value, "all": read[0], "by_source": dict(zip(value["by_source"], read[1:], strict=True))})
        except (ValidationError, KeyError, TypeError, ValueError, AttributeError):
            raise DataError("statistics of values: not what tpt value writes; the shard's manifest is damaged") from None


_ADAPTER = TypeAdapter(ValueStatistics)
