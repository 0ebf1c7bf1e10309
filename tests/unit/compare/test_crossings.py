"""Factors and intervals on curves whose answer is known."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.compare.crossings import crossings, fit, reach, resample, tokens_to

TOKENS = np.array([100.0, 200.0, 300.0, 400.0])


def arm(*seeds: list[float], problems: int = 0, name: str = "arm", tokens: Any = TOKENS) -> Any:
    scores = np.array(seeds)
    return resample(np.asarray(tokens, float), scores, np.full(scores.shape, problems), name, 400)


def test_the_factor_is_the_ratio_of_tokens_and_exact_where_nothing_varies() -> None:
    baseline = arm([0.0, 0.2, 0.4, 0.6])
    found = crossings(baseline, arm([0.0, 0.4, 0.8, 1.0]), 0.6).factor()
    assert (found.kind, found.value, found.interval) == ("estimate", pytest.approx(400 / 250), (pytest.approx(1.6), pytest.approx(1.6)))
    at_final = crossings(baseline, arm([0.0, 0.4, 0.8, 1.0]), None)
    assert (at_final.target, at_final.factor().value) == (pytest.approx(0.6), pytest.approx(1.6))
    assert crossings(baseline, baseline, 0.5).factor().value == pytest.approx(1)


def test_a_score_that_is_never_reached_gives_a_bound_and_never_a_number() -> None:
    baseline, better, worse = arm([0.0, 0.2, 0.4, 0.6]), arm([0.0, 0.4, 0.8, 1.0]), arm([0.0, 0.1, 0.1, 0.2])
    found = crossings(baseline, better, 0.8)
    assert (found.factor().kind, found.factor().low, found.factor().interval[1]) == ("at_least", pytest.approx(400 / 300), math.inf)
    assert found.baseline.share_not_reached == 1
    assert crossings(baseline, worse, 0.5).factor().kind == "at_most"
    assert crossings(worse, worse, 0.9).factor().kind == "unknown"
    assert tokens_to(worse, 0.9).kind == "at_least"


def test_a_score_that_was_there_at_the_first_checkpoint_is_a_bound() -> None:
    found = crossings(arm([0.0, 0.2, 0.4, 0.6]), arm([0.7, 0.8, 0.9, 1.0]), 0.6).factor()
    assert (found.kind, found.low, found.high) == ("at_least", pytest.approx(4.0), math.inf)
    assert crossings(arm([0.5, 0.6, 0.6, 0.6]), arm([0.0, 0.2, 0.4, 0.6]), 0.4).factor().kind == "at_most"


def test_one_point_tells_a_side_only() -> None:
    one = arm([0.5], tokens=[1000])
    assert (tokens_to(one, 0.4).kind, tokens_to(one, 0.4).high) == ("at_most", 1000)
    assert (tokens_to(one, 0.6).kind, tokens_to(one, 0.6).low) == ("at_least", 1000)
    assert tokens_to(one, 0.5).high == 1000


def test_a_peak_of_noise_is_no_crossing() -> None:
    assert tokens_to(arm([0.0, 0.5, 0.1, 0.6]), 0.45).value == pytest.approx(300 + 100 * (0.45 - 0.3) / (0.6 - 0.3))


SCORES = st.lists(st.floats(0, 1), min_size=2, max_size=12)


@given(SCORES, st.floats(0, 1))
def test_crossings_are_those_of_the_nearest_curve_that_never_falls(scores: list[float], target: float) -> None:
    curve, tokens = np.array(scores), np.arange(1.0, len(scores) + 1)
    fitted = fit(curve)
    assert (np.diff(fitted) >= -1e-12).all()
    assert fitted.sum() == pytest.approx(curve.sum())
    found = reach(tokens, curve[None], np.array([target]))
    low, high = float(found.low[0]), float(found.high[0])
    if abs(fitted - target).min() < 1e-6:
        return  # whether a level is reached is up to rounding
    if fitted[-1] < target:
        assert (low, high) == (tokens[-1], math.inf)
    elif fitted[0] > target:
        assert (low, high) == (0, tokens[0])
    else:
        after = int((fitted < target).sum())
        expected = tokens[after - 1] + (target - fitted[after - 1]) / (fitted[after] - fitted[after - 1])
        assert low == high == pytest.approx(expected, abs=1e-6)


@given(st.lists(SCORES.filter(lambda scores: len(scores) == 4), min_size=1, max_size=3), st.floats(0.05, 0.95), st.floats(0.01, 100))
def test_an_arm_that_needs_k_times_the_tokens_has_a_kth_of_the_factor(seeds: list[list[float]], target: float, k: float) -> None:
    baseline = arm([0.0, 0.3, 0.6, 1.0], problems=50, name="baseline")
    one = crossings(baseline, arm(*seeds, problems=50), target).factor()
    other = crossings(baseline, arm(*seeds, problems=50, tokens=TOKENS * k), target).factor()
    assert other.kind == one.kind
    for value, scaled in zip((one.low, one.high, *one.interval), (other.low, other.high, *other.interval), strict=True):
        assert scaled == pytest.approx(value / k, rel=1e-6)
    assert one.interval[0] <= one.low * (1 + 1e-9)
    assert one.interval[1] >= one.high * (1 - 1e-9)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Learning sets in suddenly, at a moment that varies by seed: of intervals over three seeds an arm, 90 % should hold the ratio of mean curves."""
    random = np.random.default_rng(7)
    tokens, problems, simulations = np.linspace(5, 100, 20), 100, 200

    def accuracies(moments: Any) -> Any:
        return 1 / (1 + np.exp(-(tokens - np.asarray(moments)[:, None]) / 4))

    def truth(moment: float) -> float:
        return tokens_to(arm(accuracies(random.normal(moment, 4, 20_000)).mean(axis=0).tolist(), tokens=tokens), 0.5).low

    expected, held, known = truth(60) / truth(30), 0, 0
    for number in range(simulations):
        drawn = []
        for name, moment in (("vanilla", 60), ("append", 30)):
            scores = random.binomial(problems, accuracies(random.normal(moment, 4, 3))) / problems
            drawn.append(resample(tokens, scores, np.full(scores.shape, problems), f"{name} {number}", 300))
        found = crossings(drawn[0], drawn[1], 0.5).factor()
        known += found.kind == "estimate"
        held += found.interval[0] <= expected <= found.interval[1]
    assert known == simulations
    # Binomial, 200 simulations: three standard errors are 6 points. Wider than it says is no harm to a reader; narrower is.
    assert held / simulations > 0.84
