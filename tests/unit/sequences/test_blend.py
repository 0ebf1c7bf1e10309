from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from tpt_megatron.sequences.blend import LONGEST_PERIOD, Blend, schedule

small_weights = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(small_weights, st.integers(1, 2000))
def test_every_beginning_holds_each_share_to_within_one_sequence(weights: list[int], length: int) -> None:
    blend = Blend([Fraction(weight) for weight in weights])
    seen = [0] * len(weights)
    for number in range(length):
        owner, within = blend.locate(number)
        assert within == seen[owner]
        seen[owner] += 1
        assert all(abs(count - share * (number + 1)) < 1 for count, share in zip(seen, blend.shares, strict=True))
    assert blend.counts(length) == seen
    assert blend.counts(0) == [0] * len(weights)


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=5), st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_weights_without_a_small_common_measure_stay_within_two_however_far(weights: list[float], periods: int) -> None:
    blend = Blend([Fraction(weight) for weight in weights])
    start = 10**9 // LONGEST_PERIOD * LONGEST_PERIOD + periods * LONGEST_PERIOD - 50
    for number in range(start, start + 100):
        counts, (owner, within) = blend.counts(number), blend.locate(number)
        assert sum(counts) == number
        assert within == counts[owner]
        assert all(abs(count - share * number) < 2 for count, share in zip(counts, blend.shares, strict=True))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(any))
def test_a_schedule_gives_each_what_it_is_due(counts: list[int]) -> None:
    order = schedule(counts)
    assert [order.count(owner) for owner in range(len(counts))] == counts
    for slot in range(len(order) + 1):
        for owner, count in enumerate(counts):
            assert abs(order[:slot].count(owner) - Fraction(count * slot, len(order))) < 1
