"""The sequences of a whole run: stages of blends of packed datasets."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from zlib import crc32

from tpt_megatron.config.data import DataConfig, Share, Stage
from tpt_megatron.datasets import TokenDataset
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.sequences.blend import SMALLEST_SHARE, Blend
from tpt_megatron.sequences.packing import BestFit, Concatenated, Packing, Span

log = logging.getLogger(__name__)

ORDER_VERSION = 1
"""Part of a run's data fingerprint: raised when the same config and datasets give other sequences than before."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A stretch of a document inside a sequence of the run: `tokens` tokens from its token `first` on. path: the dataset's, as the config has it."""

    sequence: int
    path: str
    document: int
    first: int
    tokens: int


class Stream:
    """Sequences 0, 1, ... of a run or of a validation set: each a function of config, datasets, seed and its number.

    Raises DataError when a dataset cannot fill one sequence, and ConfigError when a share is too small to be dealt.
    """

    def __init__(self, config: DataConfig, stages: Sequence[Stage], datasets: Mapping[str, TokenDataset], seed: int) -> None:
        self._config, self._stages, self._datasets, self._seed = config, stages, datasets, seed
        paths = dict.fromkeys(share.path for stage in stages for share in stage.train)
        self._packings = {path: _packing(config, datasets[path], seed) for path in paths}
        self._blends = [_blend(stage.train) for stage in stages]
        self._starts = [0]
        self._before: list[dict[str, int]] = [dict.fromkeys(paths, 0)]
        """For each stage, how many sequences of each dataset the stages before it hold."""
        for stage in stages[:-1]:
            assert stage.tokens is not None
            self._starts.append(self._starts[-1] + stage.tokens // config.sequence_length)
            self._before.append(self.counts(self._starts[-1], stage=len(self._before) - 1))

    def spans(self, number: int) -> tuple[str, list[Span]]:
        """Return the path of the dataset that sequence `number` is of, and what it is made of."""
        path, within = self.locate(number)
        return path, self._packings[path].spans(within)

    def locate(self, number: int) -> tuple[str, int]:
        """Return the path of the dataset that sequence `number` is of, and which of that dataset's sequences it is."""
        stage = bisect_right(self._starts, number) - 1
        share, within = self._blends[stage].locate(number - self._starts[stage])
        path = self._stages[stage].train[share].path
        return path, self._before[stage][path] + within

    def counts(self, number: int, *, stage: int | None = None) -> dict[str, int]:
        """Return how many of the first `number` sequences are of each dataset. stage: the one that `number` ends, where it is known."""
        stage = max(0, bisect_right(self._starts, number - 1) - 1) if stage is None else stage
        counts = dict(self._before[stage])
        for share, count in zip(self._stages[stage].train, self._blends[stage].counts(number - self._starts[stage]), strict=True):
            counts[share.path] += count
        return counts

    def documents(self, sequences: Iterable[int]) -> Iterator[Seen]:
        """Say which documents some sequences of the run are made of."""
        for number in sequences:
            path, spans = self.spans(number)
            for span in spans:
                yield Seen(number, path, span.document, span.first, span.tokens)

    def sequences_per_epoch(self, path: str) -> int:
        """Return how many sequences one pass through a dataset has."""
        return self._packings[path].sequences_per_epoch

    def check_epochs(self, sequences: int) -> None:
        """Raise ConfigError when a run of that many sequences goes through a dataset more often than its max_epochs."""
        length = self._config.sequence_length
        for path, count in self.counts(sequences).items():
            caps = [share.max_epochs for stage in self._stages for share in stage.train if share.path == path and share.max_epochs is not None]
            held = self.sequences_per_epoch(path)
            if caps and count > min(caps) * held:
                fits = int(min(caps) * held)
                raise ConfigError(
                    f"{path}: the run would go through it {count / held:.2f} times, over its max_epochs={min(caps):g}: {count * length:,} tokens of "
                    f"{held * length:,}; {fits * length:,} fit, {fits / sequences:.2%} of the run: lower its share, shorten the run, or raise max_epochs"
                )

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides which tokens come when, apart from where the files lie."""
        config, paths = self._config, list(self._packings)
        return {
            "order": ORDER_VERSION,
            "seed": self._seed,
            "sequence_length": config.sequence_length,
            "packing": config.packing if config.packing == "concatenate" else f"{config.packing}, {config.too_long}",
            "attention": config.attention,
            "datasets": [_dataset_fingerprint(self._datasets[path]) for path in paths],
            "stages": [
                {
                    "sequences": None if stage.tokens is None else stage.tokens // config.sequence_length,
                    "shares": [[paths.index(share.path), str(part)] for share, part in zip(stage.train, blend.shares, strict=True)],
                }
                for stage, blend in zip(self._stages, self._blends, strict=True)
            ],
        }


def _packing(config: DataConfig, dataset: TokenDataset, seed: int) -> Packing:
    packing: Packing
    if config.packing == "concatenate":
        packing = Concatenated(dataset.lengths, config.sequence_length, seed)
    else:
        packing = fitted = BestFit(dataset.lengths, config.sequence_length, seed, config.too_long)
        if fitted.dropped_documents:
            log.warning(
                "%s: %s documents (%s tokens) are over %d tokens and left out, by data.too_long=drop",
                *(dataset.prefix, f"{fitted.dropped_documents:,}", f"{fitted.dropped_tokens:,}", config.sequence_length + 1),
            )
    if packing.sequences_per_epoch < 1:
        total = len(dataset.tokens)
        if config.packing == "best_fit":
            raise DataError(f"{dataset.prefix}: every document is over {config.sequence_length + 1} tokens and would be dropped; set data.too_long=cut")
        raise DataError(
            f"{dataset.prefix}: {total} tokens do not fill one sequence of {config.sequence_length} + 1; give more data or shorten data.sequence_length"
        )
    return packing


def _blend(shares: Sequence[Share]) -> Blend:
    blend = Blend([Fraction(str(share.part)) for share in shares])  # of the decimal that was written, not of the nearest binary number
    for share, part in zip(shares, blend.shares, strict=True):
        if part < SMALLEST_SHARE:
            raise ConfigError(f"{share.path}: its share is {float(part):.2g} of the tokens, the least is {float(SMALLEST_SHARE):.2g}; raise it or leave it out")
    return blend


def _dataset_fingerprint(dataset: TokenDataset) -> dict[str, Any]:
    found = {"documents": len(dataset.lengths), "tokens": len(dataset.tokens)}
    sha256 = (dataset.details or {}).get("sha256")
    return {**found, "sha256": sha256} if sha256 is not None else {**found, "crc32_of_lengths": _crc32(dataset)}


def _crc32(dataset: TokenDataset) -> int:
    """Return a checksum of the documents' lengths: what there is to know a dataset by that has no manifest, short of reading it all."""
    block, checksum = 1 << 20, 0
    for begin in range(0, len(dataset.lengths), block):
        checksum = crc32(dataset.lengths[begin : begin + block].tobytes(), checksum)
    return checksum
