from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.sequences.permutation import SMALL, Permutation


@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 100))
def test_every_element_comes_once_and_any_position_can_be_asked_alone(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, seed, epoch)
    found = permutation(np.arange(size))
    assert sorted(found.tolist()) == list(range(size))
    for position in (0, size // 3, size - 1):
        assert permutation.at(position) == found[position]


def test_the_order_is_pinned() -> None:
    """A change of these numbers changes the order of runs that are to be resumed: raise ORDER_VERSION with it."""
    assert Permutation(10, 1234, 0)(np.arange(10)).tolist() == [7, 1, 0, 4, 3, 2, 9, 5, 8, 6]
    assert Permutation(10**8, 1234, 0)(np.array([0, 1, 2, 10**8 - 1])).tolist() == [7883796, 45583615, 41219248, 42237231]


def chi_square(cells: np.ndarray, expected: float) -> float:
    """Return the statistic in standard deviations from its mean."""
    freedom = cells.size - 1
    return float((((cells - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [SMALL + 1, 99_991, 1 << 17])
def test_no_structure_is_seen_in_positions_or_between_neighbours(size: int) -> None:
    found = Permutation(size, 5, 0)(np.arange(size))
    buckets = 16
    places = np.bincount(np.arange(size) * buckets // size * buckets + found * buckets // size, minlength=buckets**2)
    assert abs(chi_square(places, size / buckets**2)) < 4.5  # a few cells are bound to their row's sum: a little below 0 on average
    for distance in (1, 2, 64, 1000):
        steps = np.bincount(np.mod(found[distance:] - found[:-distance], size) * 64 // size, minlength=64)
        assert abs(chi_square(steps, (size - distance) / 64)) < 4.5
    assert (np.diff(found) == 1).sum() < 10
    assert (found == np.arange(size)).sum() < 10


def test_few_elements_take_every_order_equally_often() -> None:
    orders = Counter(tuple(Permutation(5, seed)(np.arange(5)).tolist()) for seed in range(6000))
    assert len(orders) == 120
    assert abs(chi_square(np.array(list(orders.values())), 50)) < 4.5


def test_epochs_and_seeds_give_orders_that_have_nothing_to_do_with_each_other() -> None:
    size = 50_000
    first = Permutation(size, 1, 0)(np.arange(size))
    for other in (Permutation(size, 1, 1), Permutation(size, 2, 0)):
        assert abs(np.corrcoef(first, other(np.arange(size)))[0, 1]) * np.sqrt(size) < 4.5
