from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.sequences import packing
from tpt_megatron.sequences.packing import BestFit, Concatenated, Span, pack

some_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) > 20)
TooLong = Literal["cut", "drop"]


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Iterator[None]:
    """Let a few documents already fill several blocks, so that the borders between blocks are met."""
    patch = pytest.MonkeyPatch()
    patch.setattr(packing, "BLOCK", 4)
    patch.setattr(packing, "PACKED_BLOCK", 16)
    patch.setattr(packing, "_PASS", 8)
    yield
    patch.undo()


def tokens_of(spans: list[Span]) -> list[tuple[int, int]]:
    return [(span.document, span.first + i) for span in spans for i in range(span.tokens)]


@given(some_lengths, st.integers(1, 16), st.integers(0, 5), st.integers(0, 3))
def test_concatenated_shows_every_token_of_an_epoch_once_but_for_its_rest(lengths: list[int], length: int, seed: int, epoch: int) -> None:
    order = Concatenated(np.array(lengths, np.int32), length, seed)
    held = order.sequences_per_epoch
    assert held == (sum(lengths) - 1) // length
    rows = [tokens_of(order.spans(number)) for number in range(epoch * held, (epoch + 1) * held)]
    assert all(len(row) == length + 1 for row in rows)
    assert all(before[-1] == after[0] for before, after in pairwise(rows))
    inputs = [token for row in rows for token in row[:-1]]
    assert len(set(inputs)) == len(inputs) == held * length
    assert sum(lengths) - len(inputs) <= length


@given(some_lengths, st.integers(1, 30), st.integers(0, 5), st.sampled_from(["cut", "drop"]))
def test_best_fit_shows_every_token_of_an_epoch_once_but_for_what_it_says(lengths: list[int], length: int, seed: int, too_long: TooLong) -> None:
    order = BestFit(np.array(lengths, np.int32), length, seed, too_long)
    room = length + 1
    for epoch in range(2):
        rows = [order.spans(number) for number in range(epoch * order.sequences_per_epoch, (epoch + 1) * order.sequences_per_epoch)]
        assert all(0 < sum(span.tokens for span in row) <= room for row in rows)
        dropped = [n for n in lengths if n > room] if too_long == "drop" else []
        assert (order.dropped_documents, order.dropped_tokens) == (len(dropped), sum(dropped))
        expected = {(d, i) for d, n in enumerate(lengths) for i in range(n) if not (too_long == "drop" and n > room)}
        assert Counter(token for row in rows for token in tokens_of(row)) == Counter(expected)
        for span in (span for row in rows for span in row):
            if lengths[span.document] <= room:
                assert span == Span(span.document, 0, lengths[span.document])
            else:
                assert span.first % room == 0
                assert span.tokens == min(room, lengths[span.document] - span.first)


@given(some_lengths, st.integers(1, 16), st.sampled_from(["concatenate", "cut", "drop"]), st.data())
def test_any_sequence_is_the_same_whatever_was_asked_before(lengths: list[int], length: int, how: str, data: st.DataObject) -> None:
    def make() -> packing.Packing:
        array = np.array(lengths, np.int32)
        return Concatenated(array, length, 3) if how == "concatenate" else BestFit(array, length, 3, "cut" if how == "cut" else "drop")

    order = make()
    if not order.sequences_per_epoch:
        return
    for number in data.draw(st.lists(st.integers(0, 3 * order.sequences_per_epoch), max_size=10)):
        assert order.spans(number) == make().spans(number)


@pytest.mark.parametrize("too_long", [None, "cut"])
@pytest.mark.parametrize("documents", [16, 64])  # one block, and several
def test_epochs_and_seeds_differ_in_order(documents: int, too_long: TooLong | None) -> None:
    lengths = np.full(documents, 7, np.int32)

    def epoch(seed: int, number: int) -> list[list[Span]]:
        order = Concatenated(lengths, 20, seed) if too_long is None else BestFit(lengths, 20, seed, too_long)
        return [order.spans(number * order.sequences_per_epoch + i) for i in range(order.sequences_per_epoch)]

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 1) == epoch(0, 1)


def plain_best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing as textbooks have it."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [one for one in bins if room - sum(one) >= length]
        if fitting:
            min(fitting, key=lambda one: room - sum(one)).append(length)
        else:
            bins.append([length])
    return bins


@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 50))
def test_packing_by_counts_is_best_fit_decreasing(lengths: list[int], room: int) -> None:
    bins, placed = pack(np.bincount(np.array(lengths, np.int64), minlength=room + 1))
    filled: list[list[int]] = [[] for _ in range(bins)]
    left = sorted(lengths, reverse=True)
    for first, count, each in placed:
        for one in range(first, first + count):
            filled[one] += [left.pop(0) for _ in range(each)]
    assert not left
    # Of bins with equal room any may be taken, so what they hold may differ; how full they are may not.
    assert sorted(map(sum, filled)) == sorted(map(sum, plain_best_fit(lengths, room)))
