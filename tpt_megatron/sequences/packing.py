"""How the documents of one dataset become sequences of sequence_length + 1 tokens: inputs, and the labels one further on.

Both packings shuffle the documents and answer for any sequence by its number, from a table of one entry a block of documents, which
one pass over the lengths makes: nothing is kept on disk, so nothing can be stale or torn, and memory does not grow with the dataset.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from tpt_megatron.sequences.permutation import Permutation

Lengths = npt.NDArray[np.int32]
"""[documents] tokens of each; may be mapped from a file."""

BLOCK = 4096
"""Documents an entry of the table of Concatenated; expanding one takes about a millisecond."""
PACKED_BLOCK = 1 << 18
"""Documents that BestFit packs among themselves: many, for lengths that fit, and so that equal lengths are packed together."""
_PASS = 1 << 18
"""Documents whose lengths are gathered at a time in the pass that makes a table."""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one document: `tokens` tokens from its token `first` on."""

    document: int
    first: int
    tokens: int


class Packing(Protocol):
    """Sequences 0, 1, ... without end, epoch after epoch."""

    sequences_per_epoch: int

    def spans(self, number: int) -> list[Span]:
        """Return what sequence `number` is made of, in order: at most sequence_length + 1 tokens; the rest of it is padding."""
        ...


class Concatenated:
    """Documents in an order of their own each epoch, laid end to end and cut every sequence_length tokens.

    Sequence k of an epoch is the tokens [k s, k s + s] of that line. Neighbours share one token, a label here and an input there. What is
    left at the end of an epoch, fewer than s + 1 tokens, is not seen in that epoch.
    """

    def __init__(self, lengths: Lengths, sequence_length: int, seed: int) -> None:
        self._lengths, self._sequence_length, self._seed = lengths, sequence_length, seed
        self._total = int(lengths.sum(dtype=np.int64))
        self.sequences_per_epoch = max(0, (self._total - 1) // sequence_length)
        self._epoch = -1
        self._block = -1

    def spans(self, number: int) -> list[Span]:
        """See Packing."""
        epoch, within = divmod(number, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._start_epoch(epoch)
        at = within * self._sequence_length
        stop = at + self._sequence_length + 1
        block = int(np.searchsorted(self._ends, at, side="right"))
        found: list[Span] = []
        while at < stop:
            self._expand(block)
            begin = int(self._ends[block - 1]) if block else 0
            place = int(np.searchsorted(self._block_ends, at - begin, side="right"))
            while at < stop and place < len(self._documents):
                document, end = int(self._documents[place]), begin + int(self._block_ends[place])
                length = int(self._lengths[document])
                if length:
                    take = min(stop, end) - at
                    found.append(Span(document, length - (end - at), take))
                    at += take
                place += 1
            block += 1
        return found

    def _start_epoch(self, epoch: int) -> None:
        """Make the table of this epoch: the tokens up to each block's end."""
        count = len(self._lengths)
        self._permutation = Permutation(count, self._seed, epoch)
        sums = []
        for begin in range(0, count, _PASS):
            lengths = self._lengths[self._permutation(np.arange(begin, min(begin + _PASS, count)))]
            sums.append(np.add.reduceat(lengths, np.arange(0, len(lengths), BLOCK), dtype=np.int64))
        self._ends = np.cumsum(np.concatenate(sums))
        self._epoch, self._block = epoch, -1

    def _expand(self, block: int) -> None:
        """Hold the documents of a block, in order, and the tokens up to the end of each."""
        if block != self._block:
            begin = block * BLOCK
            self._documents = self._permutation(np.arange(begin, min(begin + BLOCK, len(self._lengths))))
            self._block_ends = np.cumsum(self._lengths[self._documents], dtype=np.int64)
            self._block = block


class BestFit:
    """Documents kept whole: each lies in one sequence, which is filled up with others, then with padding.

    A sequence has room for sequence_length + 1 tokens. A document of more is too long: `cut` cuts it from its beginning into pieces of that
    many tokens and a shorter last one, which are packed as if they were documents; `drop` leaves it out (dropped_documents and dropped_tokens
    say how much that was). Nothing else is left out: every token comes once in an epoch.

    Documents are shuffled once; every PACKED_BLOCK of them are packed among themselves, longest first, each where it leaves the least
    room (best-fit decreasing; for training: Ding and others, Fewer Truncations Improve Language Modeling, 2024). An epoch has its own order
    of the blocks and of the sequences in each; which documents share a sequence is the same in every epoch.
    """

    def __init__(self, lengths: Lengths, sequence_length: int, seed: int, too_long: Literal["cut", "drop"]) -> None:
        self._lengths, self._seed, self._too_long = lengths, seed, too_long
        self._room = sequence_length + 1
        self._permutation = Permutation(len(lengths), seed)
        self.dropped_documents = self.dropped_tokens = 0
        counts = [self._count_sequences(block) for block in range(-(-len(lengths) // PACKED_BLOCK))]
        self._counts = np.array(counts, np.int64)
        self.sequences_per_epoch = int(self._counts.sum())
        self._epoch = self._block = -1

    def spans(self, number: int) -> list[Span]:
        """See Packing."""
        epoch, within = divmod(number, self.sequences_per_epoch)
        if epoch != self._epoch:
            self._blocks = Permutation(len(self._counts), self._seed, epoch)(np.arange(len(self._counts)))
            self._ends = np.cumsum(self._counts[self._blocks])
            self._epoch, self._block = epoch, -1
        place = int(np.searchsorted(self._ends, within, side="right"))
        block = int(self._blocks[place])
        if block != self._block:
            self._pack(block)
            self._order = Permutation(int(self._counts[block]), self._seed, epoch, block)
            self._block = block
        sequence = self._order.at(within - (int(self._ends[place - 1]) if place else 0))
        pieces = self._pieces[self._bounds[sequence] : self._bounds[sequence + 1]]
        return [Span(int(document), int(first), int(tokens)) for document, first, tokens in pieces]

    def _shuffled(self, block: int) -> tuple[npt.NDArray[np.int64], Lengths]:
        """Return the documents of a block in shuffled order, and their lengths."""
        begin = block * PACKED_BLOCK
        documents = self._permutation(np.arange(begin, min(begin + PACKED_BLOCK, len(self._lengths))))
        return documents, self._lengths[documents]

    def _count_sequences(self, block: int) -> int:
        _, lengths = self._shuffled(block)
        whole, too_long = 0, lengths > self._room
        if self._too_long == "cut":
            whole = int((lengths[too_long] // self._room).sum(dtype=np.int64))
            lengths[too_long] %= self._room
        else:
            self.dropped_documents += int(too_long.sum())
            self.dropped_tokens += int(lengths[too_long].sum(dtype=np.int64))
            lengths = lengths[~too_long]
        counts = np.bincount(lengths, minlength=self._room + 1)
        counts[self._room] += whole
        return pack(counts)[0]

    def _pack(self, block: int) -> None:
        """Hold the pieces of a block by sequence: [pieces, 3] document, first token, tokens; and where each sequence's begin."""
        documents, lengths = self._shuffled(block)
        if self._too_long == "drop":
            fits = lengths <= self._room
            documents, lengths = documents[fits], lengths[fits]
        parts = -(-lengths // self._room)  # of one document; 0 of an empty one
        owner = np.repeat(np.arange(len(documents)), parts)
        firsts = (np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)) * self._room
        tokens = np.minimum(lengths[owner] - firsts, self._room)
        sequences, placed = pack(np.bincount(tokens, minlength=self._room + 1))
        longest_first = np.argsort(-tokens, kind="stable")
        sequence_of = np.empty(len(owner), np.int64)
        sequence_of[longest_first] = np.concatenate([first + np.arange(bins * each) // each for first, bins, each in placed] or [longest_first])
        by_sequence = np.argsort(sequence_of, kind="stable")  # inside a sequence the shuffled order stays
        self._pieces = np.stack((documents[owner], firsts, tokens), axis=1)[by_sequence]
        self._bounds = np.searchsorted(sequence_of[by_sequence], np.arange(sequences + 1))


def pack(counts: npt.NDArray[np.int64]) -> tuple[int, list[tuple[int, int, int]]]:
    """Pack pieces into bins by best-fit decreasing. counts: [room + 1], how many pieces there are of each length; length 0 is none.

    Returns the number of bins and where the pieces go, longest first: (first bin, bins, pieces in each), bin after bin. Pieces of one
    length go together into bins with the same room, so that the time grows with the number of different lengths and not of pieces.
    """
    room = len(counts) - 1
    bins = 0
    placed: list[tuple[int, int, int]] = []
    rooms: list[int] = []  # sorted: the room left in some open bin
    open_bins: dict[int, list[tuple[int, int]]] = {}  # room left: (first bin, bins)

    def keep(left: int, first: int, count: int) -> None:
        if left and count:
            if left not in open_bins:
                open_bins[left] = []
                insort(rooms, left)
            open_bins[left].append((first, count))

    lengths = np.flatnonzero(counts)[::-1]
    for length, pieces in zip(lengths.tolist(), counts[lengths].tolist(), strict=True):
        if not length:
            break
        left_over = pieces
        while left_over:
            at = bisect_left(rooms, length)
            if at < len(rooms):
                space = rooms[at]
                first, count = open_bins[space].pop()
                if not open_bins[space]:
                    del open_bins[space], rooms[at]
            else:
                space, first = room, bins
                count = -(-left_over // (room // length))
                bins += count
            each = min(space // length, left_over)
            used = min(count, left_over // each)
            placed.append((first, used, each))
            left_over -= used * each
            keep(space - each * length, first, used)
            keep(space, first + used, count - used)
    return bins, placed
