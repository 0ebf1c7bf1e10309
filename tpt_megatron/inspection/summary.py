"""What is in a token dataset, as numbers: counts by part and source, and lengths. Memory: some bytes a sequence, however many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tpt_megatron.datasets import PART_THINKING, SOURCE_DTYPE, TokenDataset, sidecar

TOKENS_AT_ONCE = 1 << 22
PERCENTILES = (1, 10, 50, 90, 99)


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Sequences and tokens of one source; name is None for sequences without one."""

    name: str | None
    sequences: int
    tokens_document: int
    tokens_thinking: int


@dataclass(frozen=True, slots=True)
class Summary:
    """lengths and thinking: tokens of each sequence, all and thinking ones, [sequences]; thinking and by_source are None without sidecars."""

    lengths: npt.NDArray[np.int32]
    thinking: npt.NDArray[np.int64] | None
    by_source: list[SourceCounts] | None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def document(self) -> npt.NDArray[np.int64] | None:
        """Tokens of each sequence that are not thinking."""
        return None if self.thinking is None else self.lengths - self.thinking


def summarise(dataset: TokenDataset) -> Summary:
    """Read parts and sources once, a block at a time."""
    thinking = None if dataset.parts is None else thinking_of(dataset)
    names = None if dataset.details is None else dataset.details.get("sources")
    path = sidecar(dataset.prefix, "sources.bin")
    by_source = None
    if names is not None and path.is_file() and thinking is not None:
        numbers = np.fromfile(path, SOURCE_DTYPE)
        sequences = np.bincount(numbers, minlength=len(names))
        counted = [np.bincount(numbers, values, len(names)).astype(np.int64) for values in (dataset.lengths - thinking, thinking)]
        rows = zip(names, sequences.tolist(), counted[0].tolist(), counted[1].tolist(), strict=True)
        by_source = sorted((SourceCounts(*row) for row in rows), key=lambda row: -(row.tokens_document + row.tokens_thinking))
    return Summary(dataset.lengths, thinking, by_source)


def thinking_of(dataset: TokenDataset) -> npt.NDArray[np.int64]:
    """Return the thinking tokens of each sequence: [sequences]."""
    assert dataset.parts is not None
    found = np.zeros(len(dataset.lengths), np.int64)
    for first, last, begin, end in blocks(dataset):
        marked = np.concatenate(([0], np.cumsum(np.asarray(dataset.parts[begin:end]) == PART_THINKING)))
        bounds = np.clip(dataset.offsets[first : last + 1] - begin, 0, end - begin)
        found[first:last] += marked[bounds[1:]] - marked[bounds[:-1]]
    return found


def blocks(dataset: TokenDataset) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first sequence, last sequence + 1, first token, last token + 1) of blocks of tokens; a sequence may reach over several."""
    total = int(dataset.offsets[-1])
    for begin in range(0, total, TOKENS_AT_ONCE):
        end = min(total, begin + TOKENS_AT_ONCE)
        first = int(np.searchsorted(dataset.offsets, begin, side="right")) - 1
        yield first, int(np.searchsorted(dataset.offsets[:-1], end)), begin, end


def percentiles(lengths: npt.NDArray[Any]) -> dict[str, float]:
    """Return smallest, PERCENTILES, largest and mean."""
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    named = {f"{percent} %": float(value) for percent, value in zip(PERCENTILES, values, strict=True)}
    return {"min": float(lengths.min())} | named | {"max": float(lengths.max()), "mean": float(lengths.mean())}


def histogram(lengths: npt.NDArray[Any], bins: int = 12) -> list[tuple[int, int, int]]:
    """Return (from, to, sequences) of bins [from, to) whose width grows by a constant factor; the last holds the longest."""
    edges = np.unique(np.geomspace(max(1, lengths.min()), int(lengths.max()) + 1, bins + 1).astype(np.int64))
    edges[0], edges[-1] = lengths.min(), int(lengths.max()) + 1
    counts, _ = np.histogram(lengths, edges)
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))
