"""Spearman's rank correlation of two numbers that documents have, with an interval by resampling documents.

Ranks of equal values are their mean. The interval is the percentile bootstrap over documents (Efron and Tibshirani 1993, ch. 13), ranks taken
anew in each resample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tpt_megatron.compare.crossings import INTERVAL

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
RANDOM_SEED = 20250920
FEWEST = 3
"""Documents; of two the ranks agree or they do not, whatever is behind them."""


@dataclass(frozen=True)
class RankCorrelation:
    """rho, and where it lies by INTERVAL; None where it is not defined, and `why_not` says why. documents: how many it is of."""

    documents: int
    rho: float | None
    interval: tuple[float, float] | None
    why_not: str | None = None


class _Ranks:
    """Ranks of values [n] when document i is there `weights[i]` times."""

    def __init__(self, values: Floats) -> None:
        _, self._which = np.unique(values, return_inverse=True)

    def __call__(self, weights: Floats) -> Floats:
        """Return ranks [n]; equal values have the mean of the ranks that they take up."""
        there = np.bincount(self._which, weights=weights)
        ranks: Floats = (np.cumsum(there) - there / 2 + 0.5)[self._which]
        return ranks


def spearman(one: Floats, other: Floats) -> float | None:
    """Return Spearman's rho of two [n]; None where all values of either are equal."""
    rho = _rho(_Ranks(one), _Ranks(other), np.ones(len(one)))
    return None if math.isnan(rho) else rho


def rank_correlation(one: Floats, other: Floats, resamples: int = RESAMPLES) -> RankCorrelation:
    """Return the correlation of two numbers [n], finite, with its interval. The same numbers give the same interval. Memory: some [n]."""
    count = len(one)
    if count < FEWEST:
        return RankCorrelation(count, None, None, f"fewer than {FEWEST} documents")
    rho = spearman(one, other)
    if rho is None:
        return RankCorrelation(count, None, None, "all values of one of the two are equal")
    random, ranks = np.random.default_rng(RANDOM_SEED), (_Ranks(one), _Ranks(other))
    drawn = np.array([_rho(*ranks, np.bincount(random.integers(0, count, count), minlength=count).astype(float)) for _ in range(resamples)])
    drawn = drawn[~np.isnan(drawn)]  # of few documents some resamples have one value only
    if not len(drawn):
        return RankCorrelation(count, rho, None)
    outer = (1 - INTERVAL) / 2
    low, high = np.quantile(drawn, [outer, 1 - outer]).tolist()
    return RankCorrelation(count, rho, (low, high))


def _rho(one: _Ranks, other: _Ranks, weights: Floats) -> float:
    """Return the correlation of the ranks; NaN where either are all equal."""
    total = weights.sum()
    deviations = [ranks - (weights @ ranks) / total for ranks in (one(weights), other(weights))]
    squares = [weights @ (of * of) for of in deviations]
    if min(squares) <= 1e-9 * total:  # ranks are half numbers: what differs at all differs by a half
        return math.nan
    return float(np.clip((weights * deviations[0]) @ deviations[1] / math.sqrt(squares[0] * squares[1]), -1, 1))
