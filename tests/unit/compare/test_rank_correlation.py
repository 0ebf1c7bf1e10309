import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tpt_megatron.compare.rank_correlation import rank_correlation, spearman

few = st.sampled_from([0.0, 1.0, 1.5, 7.0, 1e9])


def by_hand(one: np.ndarray, other: np.ndarray) -> float:  # type: ignore[type-arg]
    """Return Pearson's correlation of ranks, each the mean of the places of its equals."""

    def ranks(values: np.ndarray) -> list[float]:  # type: ignore[type-arg]
        ordered = sorted(values.tolist())
        return [float(np.mean([place for place, other in enumerate(ordered) if other == value])) for value in values.tolist()]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


@settings(max_examples=60)
@given(st.integers(3, 30).flatmap(lambda n: st.tuples(arrays(np.float64, n, elements=few), arrays(np.float64, n, elements=few))))
def test_it_is_the_correlation_of_ranks_ties_and_all(pair: tuple[np.ndarray, np.ndarray]) -> None:  # type: ignore[type-arg]
    one, other = pair
    found = rank_correlation(one, other, resamples=20)
    assert found.documents == len(one)
    if len(set(one.tolist())) == 1 or len(set(other.tolist())) == 1:
        assert found.rho is found.interval is spearman(one, other) is None
        assert found.why_not == "all values of one of the two are equal"
        return
    assert found.rho == pytest.approx(by_hand(one, other), abs=1e-9)
    assert found.rho == pytest.approx(spearman(other, one), abs=1e-9)
    assert spearman(-one, other) == pytest.approx(-found.rho, abs=1e-9)
    assert spearman(np.exp(one / 1e9), other) == pytest.approx(found.rho, abs=1e-9)
    assert found.interval is not None
    assert -1 <= found.interval[0] <= found.interval[1] <= 1


def test_known_ones() -> None:
    rising = np.arange(50.0)
    for other, rho in ((rising**3, 1.0), (-rising, -1.0)):
        found = rank_correlation(rising, other)
        assert found.rho == pytest.approx(rho)
        assert found.interval == (pytest.approx(rho), pytest.approx(rho))
    assert spearman(np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 7])) == pytest.approx(0.8207826816681233)  # as R's cor.test has it
    assert rank_correlation(rising[:2], rising[:2]).why_not == "fewer than 3 documents"


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Normal pairs of correlation r have a rank correlation of 6/pi asin(r/2)."""
    random, truth, held = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.5 / 2), 0
    for _ in range(100):
        one = random.standard_normal(200)
        found = rank_correlation(one, 0.5 * one + np.sqrt(0.75) * random.standard_normal(200), resamples=200)
        assert found.interval is not None
        held += found.interval[0] <= truth <= found.interval[1]
    assert 82 <= held <= 97


def test_the_same_numbers_give_the_same_interval() -> None:
    random = np.random.default_rng(1)
    one, other = random.standard_normal((2, 40))
    assert rank_correlation(one, other) == rank_correlation(one, other)
