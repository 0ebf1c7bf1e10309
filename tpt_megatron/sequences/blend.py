"""Which dataset each sequence of a blend comes from, and which of that dataset's sequences it is: a function of its number.

Whole sequences are dealt so that after any number n of them, a share w has had more than w n - 1 and fewer than w n + 1 of them. That is
the schedule of Tijdeman's "chairman assignment problem" (1980): the i-th sequence of a share has its time between the slots i / w and
(i + 1) / w, and of those whose time has come, the one whose time ends first goes first.

The schedule repeats after a period of the shares' common denominator. Where that is over LONGEST_PERIOD, each period gets whole numbers
of sequences that follow the shares exactly in sum, and the bound is 2 instead of 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from math import lcm

import numpy as np
import numpy.typing as npt

LONGEST_PERIOD = 1 << 16
SMALLEST_SHARE = Fraction(2, LONGEST_PERIOD)
"""Below, a period could not tell a share from none."""


class Blend:
    """Shares of an endless stream. weights: relative, positive; each at least SMALLEST_SHARE of their sum."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        total = sum(weights, Fraction(0))
        self.shares = [weight / total for weight in weights]
        denominator = lcm(*(share.denominator for share in self.shares))
        self._exact = denominator <= LONGEST_PERIOD
        self._length = denominator if self._exact else LONGEST_PERIOD
        self._ends = list(accumulate(self.shares))
        self._period = -1
        self._owners: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._ranks: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def locate(self, number: int) -> tuple[int, int]:
        """Return which share sequence `number` belongs to, and how many of that share came before it."""
        period, within = divmod(number, self._length)
        self._schedule(period)
        owner = int(self._owners[within])
        return owner, self._before(period)[owner] + int(self._ranks[within])

    def counts(self, number: int) -> list[int]:
        """Return how many of the first `number` sequences belong to each share."""
        period, within = divmod(number, self._length)
        counts = self._before(period)
        if within:
            self._schedule(period)
            counts = [count + int(more) for count, more in zip(counts, np.bincount(self._owners[:within], minlength=len(counts)), strict=True)]
        return counts

    def _before(self, period: int) -> list[int]:
        """Return how many sequences of each share the periods before this one hold: rounded sums of shares, so that they add up."""
        bounds = [0, *(int(end * period * self._length) for end in self._ends)]
        return [after - before for before, after in pairwise(bounds)]

    def _schedule(self, period: int) -> None:
        """Hold a period: whose each of its sequences is, and the how manieth of its share inside the period."""
        period = 0 if self._exact else period
        if period == self._period:
            return
        counts = [after - before for before, after in zip(self._before(period), self._before(period + 1), strict=True)]
        self._owners = np.array(schedule(counts), np.int64)
        self._ranks = np.empty_like(self._owners)
        for owner, count in enumerate(counts):
            self._ranks[self._owners == owner] = np.arange(count)
        self._period = period


def schedule(counts: Sequence[int]) -> list[int]:
    """Return sum(counts) slots, counts[i] of them i, so that every beginning of it holds its part of each to within one."""
    slots = sum(counts)
    waiting: list[list[int]] = [[] for _ in range(slots + 1)]
    ready: list[tuple[int, int, int]] = []

    def announce(owner: int, index: int, slot: int) -> None:
        if index < counts[owner]:
            begins = index * slots // counts[owner]
            if begins > slot:
                waiting[begins].append(owner)
            else:
                heappush(ready, (-(-(index + 1) * slots // counts[owner]), owner, index))

    done = [0] * len(counts)
    for owner in range(len(counts)):
        announce(owner, 0, 0)
    order = []
    for slot in range(slots):
        for owner in waiting[slot]:
            announce(owner, done[owner], slot)
        _, owner, _ = heappop(ready)
        order.append(owner)
        done[owner] += 1
        announce(owner, done[owner], slot)
    return order
