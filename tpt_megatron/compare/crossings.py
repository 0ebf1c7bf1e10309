"""How many tokens a score takes, and how sure that is: crossings of noisy curves, their ratio, and intervals by resampling.

The reasoning is in docs/decisions/009-data-efficiency.md. In short: the mean of an arm's seeds is fitted by the nearest curve that never
falls (isotonic regression), since the first crossing of a noisy curve comes too early; what is not seen (a score that is never reached, or
was there at the first checkpoint) is a bound, never a number; and an interval has two parts, added in quadrature on the log scale: the
choice of seeds, and the chance in each score that its number of problems leaves.

Arrays are float64; n curves at a time, p points each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from zlib import crc32

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Cost = Callable[[Floats], Floats]
"""Maps tokens to what they cost, such as FLOPs; rises with them, 0 to 0 and infinity to infinity."""

INTERVAL = 0.9
RESAMPLES = 2000
_RANDOM_SEED = 20250920
_SAME = 1e-9
"""Sums of scores that differ by less are equal: what rounding makes of a curve that lies exactly on the target."""


@dataclass(frozen=True)
class Bounds:
    """Where quantities lie, [n] each: low = high where it is known; low 0 or high infinite where that side is open."""

    low: Floats
    high: Floats


def reach(tokens: Floats, curves: Floats, targets: Floats) -> Bounds:
    """Return the tokens at which the never-falling fits of curves [n, p] at tokens [p] first reach targets [n], linear between points.

    Beyond the last point where a fit stays below its target; somewhere up to the first point where it starts at it.
    """
    count, points = curves.shape
    rows = np.arange(count)
    sums = np.zeros((count, points + 1))
    np.cumsum(curves - targets[:, None], axis=1, out=sums[:, 1:])
    # The fit reaches the target where the cumulative sum of what is above it is least; to either side of it the fit is a fit of its own.
    split = (sums <= sums.min(axis=1, keepdims=True) + _SAME).argmax(axis=1)
    places = np.arange(points + 1)
    steps = np.abs(split[:, None] - places)
    means = np.divide(np.abs(sums - sums[rows, split][:, None]), steps, out=np.full_like(sums, np.inf), where=steps > 0)
    below = np.where(places < split[:, None], means, np.inf).min(axis=1)  # target less the fit at the point before
    above = np.where(places > split[:, None], means, np.inf).min(axis=1)  # the fit at the point after, less target
    inside = (split > 0) & (split < points)
    before, after = tokens[np.clip(split - 1, 0, points - 1)], tokens[np.clip(split, 0, points - 1)]
    part = np.divide(below, below + above, out=np.ones(count), where=inside & (below + above > 0))
    crossing = before + (after - before) * part
    return Bounds(np.where(split == 0, 0.0, np.where(inside, crossing, tokens[-1])), np.where(split == points, np.inf, np.where(inside, crossing, tokens[0])))


def fit(curve: Floats) -> Floats:
    """Return the nearest curve [p] that never falls (least squares, all points alike)."""
    points = len(curve)
    sums = np.concatenate([[0.0], np.cumsum(curve)])
    fitted = np.full(points, -np.inf)
    for first in range(points):
        means = (sums[first + 1 :] - sums[first]) / np.arange(1, points - first + 1)
        fitted[first:] = np.maximum(fitted[first:], np.minimum.accumulate(means[::-1])[::-1])
    return fitted


def fitted_ends(curves: Floats) -> Floats:
    """Return the last value of the fit of each curve [n, p]: the largest mean of its last points."""
    return (np.cumsum(curves[:, ::-1], axis=1) / np.arange(1, curves.shape[1] + 1)).max(axis=1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Resamples:
    """An arm's mean curve at tokens [p], and what it might have been.

    mean         [1, p]  the mean over seeds
    by_seeds     [n, p]  other seeds, drawn from those there are; of one seed the mean itself, [1, p]
    by_problems  [n, p]  the same seeds, scored with other luck: binomial, by the number of problems
    by_both      [n, p]
    """

    tokens: Floats
    mean: Floats
    by_seeds: Floats
    by_problems: Floats
    by_both: Floats
    seeds: int

    @property
    def curves(self) -> tuple[Floats, ...]:
        """The four, in this order."""
        return self.mean, self.by_seeds, self.by_problems, self.by_both

    def band(self) -> tuple[Floats, Floats]:
        """Return an interval [p] around the mean at each point: both parts together."""
        outer = (1 - INTERVAL) / 2
        low, high = np.quantile(self.by_both, [outer, 1 - outer], axis=0)
        return np.minimum(low, self.mean[0]), np.maximum(high, self.mean[0])


def resample(tokens: Floats, scores: Floats, problems: npt.NDArray[np.int64], name: str, count: int = RESAMPLES) -> Resamples:
    """Draw curves that an arm's runs might have given. scores [seeds, p], between 0 and 1; problems [seeds, p] behind each, 0 where unknown.

    The same name gives the same draws. A score of 0 or 1 stays: no other luck is known of it. Memory: some [count, p].
    """
    seeds = len(scores)
    random = np.random.default_rng([_RANDOM_SEED, crc32(name.encode())])
    weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds  # [n, seeds]
    mean, shape = scores.mean(axis=0)[None], (count, len(tokens))
    by_problems, by_both = np.zeros(shape), np.zeros(shape)
    for seed in range(seeds):
        known = np.maximum(problems[seed], 1)
        drawn = np.where(problems[seed] > 0, random.binomial(known, np.clip(scores[seed], 0, 1), size=shape) / known, scores[seed])
        by_problems += drawn / seeds
        by_both += drawn * weights[:, seed, None]
    return Resamples(tokens, mean, weights @ scores if seeds > 1 else mean, by_problems, by_both, seeds)


@dataclass(frozen=True)
class Estimate:
    """A positive quantity with its interval. low and high are equal where it is known; otherwise it lies between them, 0 or infinity being no bound."""

    low: float
    high: float
    interval: tuple[float, float]

    @property
    def value(self) -> float | None:
        """The number; None where there are only bounds."""
        return self.low if self.low == self.high else None

    @property
    def kind(self) -> str:
        """estimate, at_least, at_most, between (two bounds), or unknown."""
        if self.value is not None:
            return "estimate"
        lower, upper = self.low > 0, math.isfinite(self.high)
        return "between" if lower and upper else "at_least" if lower else "at_most" if upper else "unknown"


@dataclass(frozen=True)
class Drawn:
    """Bounds of one quantity under each of `Resamples.curves`, in their order. seeds: of the arm with the fewest, arms of one seed apart."""

    bounds: tuple[Bounds, ...]
    seeds: int

    def over(self, other: Drawn) -> Drawn:
        """Return the quotient of two quantities that were drawn apart."""
        several = [drawn.seeds for drawn in (self, other) if drawn.seeds > 1]
        return Drawn(tuple(_ratio(above, below) for above, below in zip(self.bounds, other.bounds, strict=True)), min(several, default=1))

    def costing(self, cost: Cost) -> Drawn:
        """Return what these tokens cost."""
        return Drawn(tuple(Bounds(cost(bounds.low), cost(bounds.high)) for bounds in self.bounds), self.seeds)

    def estimate(self) -> Estimate:
        """Return the quantity with its interval, which holds it."""
        mean, by_seeds, by_problems, _ = self.bounds
        parts = [_deviations(mean, by_problems, (1 - INTERVAL) / 2)]
        if self.seeds > 1:
            parts.append(_deviations(mean, by_seeds, expanded_tail(self.seeds)))
        down, up = (math.hypot(*(part[side] for part in parts)) for side in (0, 1))
        low, high = float(mean.low[0]), float(mean.high[0])
        return Estimate(low, high, (low * math.exp(-down), high * math.exp(up) if math.isfinite(high) else math.inf))

    @property
    def share_not_reached(self) -> float:
        """The share of resamples, of seeds and of luck, that did not reach the score."""
        return float(np.isinf(self.bounds[-1].high).mean())


def _ratio(above: Bounds, below: Bounds) -> Bounds:
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = above.low / below.high, above.high / below.low
    return Bounds(np.nan_to_num(low, nan=0.0, posinf=np.inf), np.nan_to_num(high, nan=np.inf, posinf=np.inf))


def _deviations(mean: Bounds, drawn: Bounds, tail: float) -> tuple[float, float]:
    """Return how far resamples lie below and above, as logarithms, with `tail` of them beyond; infinite where a side is open."""
    place = math.floor(tail * (len(drawn.low) - 1))
    lowest, highest = np.sort(drawn.low)[place], np.sort(drawn.high)[-1 - place]
    low, high = float(mean.low[0]), float(mean.high[0])
    down = math.inf if lowest <= 0 or low <= 0 else max(0.0, math.log(low / lowest))
    up = math.inf if not math.isfinite(highest) or not math.isfinite(high) else max(0.0, math.log(highest / high))
    return down, up


def expanded_tail(seeds: int) -> float:
    """Return which share of resamples over few seeds to leave out at each end, so that the interval is about as wide as Student's t would have it.

    A bootstrap of n values has a variance that is too small by (n - 1)/n and the normal distribution's tails (Hesterberg 2015, expanded percentile
    interval). Of two or three seeds nearly nothing is left out: the interval reaches from the most to the least favourable choice of seeds.
    """
    return NormalDist().cdf(-math.sqrt(seeds / (seeds - 1)) * _student(seeds - 1))


def _student(freedom: int) -> float:
    """Return the upper quantile of Student's t at (1 + INTERVAL) / 2: exact for 1 and 2 degrees of freedom, else by the Cornish-Fisher series (0.3 % at 3)."""
    share = (1 + INTERVAL) / 2
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z = NormalDist().inv_cdf(share)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Crossings:
    """The tokens at which two arms reach one score. target: the score; where it is the baseline's own final one, that of its mean."""

    target: float
    baseline: Drawn
    arm: Drawn

    def factor(self, baseline_cost: Cost | None = None, arm_cost: Cost | None = None) -> Estimate:
        """Return how many times as much the baseline needs as the arm: of tokens, or of what these cost."""
        above = self.baseline if baseline_cost is None else self.baseline.costing(baseline_cost)
        below = self.arm if arm_cost is None else self.arm.costing(arm_cost)
        return above.over(below).estimate()


def crossings(baseline: Resamples, arm: Resamples, target: float | None) -> Crossings:
    """Return where two arms reach a score; None: the final one of the baseline's fit, which then varies with the baseline from resample to resample."""
    goals = [fitted_ends(curves) if target is None else np.array([target]) for curves in baseline.curves]
    return Crossings(float(goals[0][0]), _drawn(baseline, goals), _drawn(arm, goals))


def tokens_to(arm: Resamples, target: float) -> Estimate:
    """Return the tokens that an arm needs for a score."""
    return _drawn(arm, [np.array([target])] * len(arm.curves)).estimate()


def _drawn(arm: Resamples, goals: list[Floats]) -> Drawn:
    """Return the crossings of each kind of curve with its goals; one curve meets all goals, and one goal all curves."""
    bounds = []
    for curves, targets in zip(arm.curves, goals, strict=True):
        count = max(len(curves), len(targets))
        bounds.append(reach(arm.tokens, np.broadcast_to(curves, (count, curves.shape[1])), np.broadcast_to(targets, (count,))))
    return Drawn(tuple(bounds), arm.seeds)
