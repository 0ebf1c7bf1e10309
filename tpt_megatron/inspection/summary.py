"""What is in a token dataset, as numbers: counts by part and source, and lengths. Memory: some bytes a sequence, however many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpt_megatron.datasets import PART_THINKING, SOURCE_DTYPE, TokenDataset, sidecar
from tpt_megatron.errors import DataError

TOKENS_AT_ONCE = 1 << 22
SEQUENCES_AT_ONCE = 1 << 20
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
    thinking: npt.NDArray[np.int32] | None
    by_source: list[SourceCounts] | None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def document(self) -> npt.NDArray[np.int32] | None:
        """Tokens of each sequence that are not thinking."""
        return None if self.thinking is None else self.lengths - self.thinking


def summarise(dataset: TokenDataset) -> Summary:
    """Read parts and sources once, a block at a time. DataError when the sources do not belong to the dataset."""
    thinking = None if dataset.parts is None else thinking_of(dataset)
    names = None if dataset.details is None else dataset.details.get("sources")
    path = sidecar(dataset.prefix, "sources.bin")
    by_source = _count_sources(dataset.lengths, thinking, names, path) if names is not None and path.is_file() and thinking is not None else None
    return Summary(dataset.lengths, thinking, by_source)


def _count_sources(lengths: npt.NDArray[np.int32], thinking: npt.NDArray[np.int32], names: list[str | None], path: Path) -> list[SourceCounts]:
    if path.stat().st_size != len(lengths) * SOURCE_DTYPE.itemsize:
        raise DataError(f"{path}: {path.stat().st_size} bytes for {len(lengths)} sequences; the files do not belong together, make the dataset again")
    numbers = np.memmap(path, SOURCE_DTYPE, mode="r")
    if int(numbers.max()) >= len(names):
        raise DataError(f"{path}: source {int(numbers.max())} of {len(names)}; the files do not belong together, make the dataset again")
    counts = np.zeros((3, len(names)), np.int64)  # sequences, tokens of documents, tokens of thinking
    for begin in range(0, len(numbers), SEQUENCES_AT_ONCE):
        span = slice(begin, begin + SEQUENCES_AT_ONCE)
        for row, weights in enumerate((None, lengths[span] - thinking[span], thinking[span])):
            counts[row] += np.bincount(numbers[span], weights, len(names)).astype(np.int64)
    rows = [SourceCounts(name, *counts[:, i].tolist()) for i, name in enumerate(names) if counts[0, i]]
    return sorted(rows, key=lambda row: -(row.tokens_document + row.tokens_thinking))


def thinking_of(dataset: TokenDataset) -> npt.NDArray[np.int32]:
    """Return the thinking tokens of each sequence: [sequences]."""
    assert dataset.parts is not None
    found = np.zeros(len(dataset.lengths), np.int32)
    for first, last, begin, end in blocks(dataset):
        marked = np.concatenate(([0], np.cumsum(np.asarray(dataset.parts[begin:end]) == PART_THINKING, dtype=np.int32)))
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
    edges = log_edges(max(1, int(lengths.min())), int(lengths.max()), bins)
    edges[0] = lengths.min()
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), count_in(lengths, edges), strict=True))


def log_edges(shortest: int, longest: int, bins: int) -> npt.NDArray[np.int64]:
    """Return the whole-numbered edges of at most `bins` bins [from, to) from `shortest` (at least 1) to `longest`, both within."""
    longest = max(shortest, longest)
    edges = np.unique(np.geomspace(shortest, longest + 1, bins + 1).round().astype(np.int64))
    edges[0], edges[-1] = shortest, longest + 1
    return edges


def count_in(lengths: npt.NDArray[Any], edges: npt.NDArray[np.int64]) -> list[int]:
    """Return how many lengths lie in each bin [from, to)."""
    # np.histogram's last bin holds its right edge too; here that would be a length outside all bins.
    return [int(count) for count in np.histogram(lengths[lengths < edges[-1]], edges)[0]]


def distribution(summary: Summary, bins: int = 12) -> list[tuple[int, int, dict[str, int]]]:
    """Return (from, to, sequences by part) over bins that whole, document and thinking share; a bin [0, 1) comes first where it holds any."""
    kinds = shown_kinds(summary)
    shortest = min(int(values[values > 0].min()) for values in kinds.values() if (values > 0).any())
    edges = log_edges(shortest, int(summary.lengths.max()), bins)
    counted = {name: count_in(values, edges) for name, values in kinds.items()}
    rows = [(int(edges[i]), int(edges[i + 1]), {name: counts[i] for name, counts in counted.items()}) for i in range(len(edges) - 1)]
    without = {name: int(np.count_nonzero(values == 0)) for name, values in kinds.items()}
    return [(0, 1, without), *rows] if any(without.values()) else rows


def shown_kinds(summary: Summary) -> dict[str, npt.NDArray[np.int32]]:
    """Return the lengths that are worth showing: of whole sequences, and of their parts where any thinks."""
    kinds = {"whole": summary.lengths}
    if summary.document is not None and summary.thinking is not None and summary.thinking.any():
        kinds |= {"document": summary.document, "thinking": summary.thinking}
    return kinds
