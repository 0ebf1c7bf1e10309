"""What is in a token dataset, as numbers: counts by part and source, and lengths. Memory: some bytes a sequence, however many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tpt_megatron.datasets import PART_NAMES, SOURCE_DTYPE, TokenDataset, sidecar
from tpt_megatron.errors import DataError

TOKENS_AT_ONCE = 1 << 22
SEQUENCES_AT_ONCE = 1 << 20
PERCENTILES = (1, 10, 50, 90, 99)


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """Sequences, and tokens by the part's name, of one source; name is None for sequences without one."""

    name: str | None
    sequences: int
    by_part: dict[str, int]

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(self.by_part.values())


@dataclass(frozen=True, slots=True)
class Summary:
    """lengths: tokens of each sequence, [sequences]; parts: those of each part, by its name; parts and by_source are None without sidecars."""

    lengths: npt.NDArray[np.int32]
    parts: dict[str, npt.NDArray[np.int32]] | None
    by_source: list[SourceCounts] | None

    @property
    def tokens(self) -> int:
        """All tokens."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def tokens_by_part(self) -> dict[str, int]:
        """All tokens by the part's name; empty without sidecars."""
        return {name: int(values.sum(dtype=np.int64)) for name, values in (self.parts or {}).items()}


def summarise(dataset: TokenDataset) -> Summary:
    """Read parts and sources once, a block at a time. DataError when the sources do not belong to the dataset."""
    parts = None if dataset.parts is None else part_lengths(dataset)
    names = None if dataset.details is None else dataset.details.get("sources")
    path = sidecar(dataset.prefix, "sources.bin")
    by_source = _count_sources(parts, names, path) if names is not None and path.is_file() and parts is not None else None
    return Summary(dataset.lengths, parts, by_source)


def _count_sources(parts: dict[str, npt.NDArray[np.int32]], names: list[str | None], path: Path) -> list[SourceCounts]:
    sequences = len(next(iter(parts.values())))
    if path.stat().st_size != sequences * SOURCE_DTYPE.itemsize:
        raise DataError(f"{path}: {path.stat().st_size} bytes for {sequences} sequences; the files do not belong together, make the dataset again")
    numbers = np.memmap(path, SOURCE_DTYPE, mode="r")
    if int(numbers.max()) >= len(names):
        raise DataError(f"{path}: source {int(numbers.max())} of {len(names)}; the files do not belong together, make the dataset again")
    counts = np.zeros((1 + len(parts), len(names)), np.int64)  # sequences, tokens of each part
    for begin in range(0, len(numbers), SEQUENCES_AT_ONCE):
        span = slice(begin, begin + SEQUENCES_AT_ONCE)
        for row, weights in enumerate((None, *(values[span] for values in parts.values()))):
            counts[row] += np.bincount(numbers[span], weights, len(names)).astype(np.int64)
    rows = [SourceCounts(name, int(counts[0, i]), dict(zip(parts, counts[1:, i].tolist(), strict=True))) for i, name in enumerate(names) if counts[0, i]]
    return sorted(rows, key=lambda row: -row.tokens)


def part_lengths(dataset: TokenDataset) -> dict[str, npt.NDArray[np.int32]]:
    """Return the tokens of each sequence that are of each part, by its name: [sequences]. The first part has what is of no other one."""
    assert dataset.parts is not None
    first_part, *others = dataset.part_codes
    found = {part: np.zeros(len(dataset.lengths), np.int32) for part in others}
    for first, last, begin, end in blocks(dataset):
        bounds = np.clip(dataset.offsets[first : last + 1] - begin, 0, end - begin)
        codes = np.asarray(dataset.parts[begin:end])
        for part, lengths in found.items():
            marked = np.concatenate(([0], np.cumsum(codes == part, dtype=np.int32)))
            lengths[first:last] += marked[bounds[1:]] - marked[bounds[:-1]]
    rest = dataset.lengths - np.sum(list(found.values()), axis=0, dtype=np.int32)
    return {PART_NAMES[part]: lengths for part, lengths in ((first_part, rest), *found.items())}


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
    """Return (from, to, sequences by part) over bins that the whole and its parts share; a bin [0, 1) comes first where it holds any."""
    kinds = shown_kinds(summary)
    shortest = min(int(values[values > 0].min()) for values in kinds.values() if (values > 0).any())
    edges = log_edges(shortest, int(summary.lengths.max()), bins)
    counted = {name: count_in(values, edges) for name, values in kinds.items()}
    rows = [(int(edges[i]), int(edges[i + 1]), {name: counts[i] for name, counts in counted.items()}) for i in range(len(edges) - 1)]
    without = {name: int(np.count_nonzero(values == 0)) for name, values in kinds.items()}
    return [(0, 1, without), *rows] if any(without.values()) else rows


def shown_kinds(summary: Summary) -> dict[str, npt.NDArray[np.int32]]:
    """Return the lengths that are worth showing: of whole sequences, and of their parts where there are several."""
    kinds, parts = {"whole": summary.lengths}, summary.parts or {}
    return kinds | parts if sum(bool(values.any()) for values in parts.values()) > 1 else kinds
