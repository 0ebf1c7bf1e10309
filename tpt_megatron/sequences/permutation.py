"""A permutation of 0 ... n - 1 that needs no memory: any position of it can be evaluated, alone or in bulk.

A Feistel network over pairs (left, right) with left < a, right < b and a b just above n, whose rounds add a hash of one half to the
other: left += hash(right) mod a, right += hash(left) mod b, in turns. What falls on n or above goes through the network again ("cycle
walking"; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), which is rare since a b - n < a. The hash is our own, in whole
numbers: no release of numpy can change the order of a run that is to be resumed.

On a handful of elements a Feistel network reaches some permutations more often than others (measured with 5), so up to SMALL elements
are sorted by random numbers instead.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

ROUNDS = 8
SMALL = 1024
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64's finaliser (Steele and others, 2014)
_HALF = np.uint64(32)
_CHUNK = 1 << 15
"""Positions worked on at a time, so that intermediate arrays stay in the processor's cache."""


class Permutation:
    """A pseudo-random permutation of 0 ... size - 1, chosen by `key`. size < 2^62."""

    def __init__(self, size: int, *key: int) -> None:
        assert 0 < size < 1 << 62
        self.size = size
        left = math.isqrt(size - 1) + 1
        self._sides = (left, -(-size // left))
        small = size <= SMALL
        digest = hashlib.shake_128(repr((size, *key)).encode()).digest(8 * (size if small else ROUNDS))
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)
        self._table = np.argsort(self._keys, kind="stable") if small else None

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return what stands at `positions`, each in 0 ... size - 1."""
        if self._table is not None:
            return self._table[positions]
        found = np.empty(len(positions), np.int64)
        for begin in range(0, len(positions), _CHUNK):
            part = self._network(positions[begin : begin + _CHUNK].astype(np.uint64))
            outside = np.flatnonzero(part >= self.size)
            while len(outside):
                part[outside] = self._network(part[outside])
                outside = outside[part[outside] >= self.size]
            found[begin : begin + _CHUNK] = part
        return found

    def at(self, position: int) -> int:
        """Return what stands at one position."""
        return int(self(np.array([position], np.int64))[0])

    def _network(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Permute 0 ... a b - 1."""
        sides = [np.uint64(side) for side in self._sides]
        left = values // sides[1]
        halves = [left, values - left * sides[1]]
        hashed, wrapped = np.empty_like(values), np.empty_like(values)
        for number, key in enumerate(self._keys):
            changed, other = halves[number % 2], halves[1 - number % 2]
            side = sides[number % 2]
            np.add(other, key, out=hashed)
            for factor in _FACTORS:
                np.multiply(hashed, factor, out=hashed)
                np.right_shift(hashed, _HALF, out=wrapped)
                np.bitwise_xor(hashed, wrapped, out=hashed)
            np.right_shift(hashed, _HALF, out=hashed)
            np.multiply(hashed, side, out=hashed)  # side < 2^31: hash / 2^32 x side, rounded down
            np.right_shift(hashed, _HALF, out=hashed)
            np.add(changed, hashed, out=changed)
            np.subtract(changed, side, out=wrapped)
            np.minimum(changed, wrapped, out=changed)  # below `side`, the difference wraps to a huge number
        np.multiply(halves[0], sides[1], out=hashed)
        hashed += halves[1]
        return hashed
