"""Which tokens every step sees: documents shuffled anew each epoch, concatenated, cut into sequences.

A sequence is a function of its number and the seed alone: nothing is cached, so no cache can be stale or torn, and a run
that resumes or changes its data-parallel size continues with the very next sequence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpt_megatron.datasets import TokenDataset
from tpt_megatron.errors import DataError
from tpt_megatron.mcore.engine import MicroBatch


class SequenceOrder:
    """The endless stream of sequences drawn from one dataset.

    In epoch e the documents are permuted by a generator seeded with (seed, e) and laid end to end; sequence k of the
    epoch is the tokens [k s, k s + s] of that line: s inputs and the s labels one further on. What is left at the end of an
    epoch, fewer than s + 1 tokens, is not seen in that epoch. Raises DataError when the dataset cannot fill one sequence.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int, seed: int, *, document_attention: bool, weights: tuple[float, float] = (1.0, 1.0)) -> None:
        self._dataset, self._length, self._seed = dataset, sequence_length, seed
        self._document_attention = document_attention
        self._weights = np.array(weights, np.float32)
        self.sequences_per_epoch = (int(dataset.offsets[-1]) - 1) // sequence_length
        if self.sequences_per_epoch < 1:
            total = int(dataset.offsets[-1])
            raise DataError(
                f"{dataset.prefix}: {total} tokens do not fill one sequence of {sequence_length} + 1; give more data or shorten data.sequence_length"
            )
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._ends: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def micro_batch(self, sequences: range) -> MicroBatch:
        """Return the sequences of these numbers (counted from the run's start) as one batch."""
        rows = [self._sequence(number) for number in sequences]
        tokens = np.stack([row[0] for row in rows])
        parts = np.ascontiguousarray(np.stack([row[1] for row in rows])[:, 1:])
        documents = np.stack([row[2] for row in rows])
        kinds = parts.astype(np.int32)
        return MicroBatch(
            tokens=np.ascontiguousarray(tokens[:, :-1]),
            labels=np.ascontiguousarray(tokens[:, 1:]),
            weights=self._weights[parts],
            kinds=kinds,
            documents=np.ascontiguousarray(documents[:, :-1]) if self._document_attention else None,
        )

    def _sequence(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Return tokens, parts and document numbers of one sequence, each of sequence_length + 1."""
        epoch, within = divmod(number, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._dataset.lengths))
            self._ends = np.cumsum(self._dataset.lengths[self._order], dtype=np.int64)
            self._epoch = epoch
        start = within * self._length
        stop = start + self._length + 1
        tokens = np.empty(self._length + 1, np.int64)
        parts = np.zeros(self._length + 1, np.uint8)
        documents = np.empty(self._length + 1, np.int32)
        at = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while start < stop:
            document = int(self._order[at])
            begin = int(self._ends[at]) - int(self._dataset.lengths[document])
            take = min(stop, int(self._ends[at])) - start
            source = int(self._dataset.offsets[document]) + start - begin
            tokens[filled : filled + take] = self._dataset.tokens[source : source + take]
            if self._dataset.parts is not None:
                parts[filled : filled + take] = self._dataset.parts[source : source + take]
            documents[filled : filled + take] = at
            filled, start, at = filled + take, start + take, at + 1
        return tokens, parts, documents


def step_batches(order: SequenceOrder, first_sequence: int, *, global_batch: int, micro_batch: int, rank: int, ranks: int) -> list[MicroBatch]:
    """Return data-parallel rank `rank`'s micro-batches of the step whose sequences start at `first_sequence`.

    The step's sequences are dealt so that which ones it sees does not depend on the number of ranks.
    """
    per_rank = global_batch // ranks
    start = first_sequence + rank * per_rank
    return [order.micro_batch(range(at, at + micro_batch)) for at in range(start, start + per_rank, micro_batch)]
