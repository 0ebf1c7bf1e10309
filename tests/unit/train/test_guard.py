import math

import pytest

from tpt_megatron.config.watching import FaultConfig
from tpt_megatron.train.guard import FEWEST_NORMS, NORMS_KEPT, StepGuard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_refused_and_counted_in_a_row(loss: float, norm: float) -> None:
    guard = StepGuard(FaultConfig(skips_in_a_row=2))
    assert not guard.accept(loss, norm)
    assert guard.accept(2.0, 1.0)
    assert guard.skips_in_a_row == 0
    assert not guard.accept(loss, norm)
    assert not guard.is_lost
    assert not guard.accept(loss, norm)
    assert guard.is_lost
    assert guard.reason == f"loss {loss} and gradient norm {norm}"


def test_a_spike_is_far_over_the_median_of_the_last_steps() -> None:
    guard = StepGuard(FaultConfig(spike_factor=5))
    assert all(guard.accept(1.0, 100.0) for _ in range(FEWEST_NORMS - 1))
    assert guard.accept(1.0, 1e6)  # too few to compare with
    assert not guard.accept(1.0, 501.0)
    assert guard.reason == "gradient norm 501, 5.0 times the median of the last 20"
    assert all(guard.accept(1.0, 10.0) for _ in range(NORMS_KEPT))
    assert not guard.accept(1.0, 51.0)  # what was refused, and what is long past, is not compared with
    assert guard.accept(1.0, 49.0)


def test_a_resumed_guard_judges_as_the_first_would_have() -> None:
    first = StepGuard(FaultConfig(spike_factor=2))
    for step in range(30):
        first.accept(1.0, 1.0 + step % 3)
    resumed = StepGuard(FaultConfig(spike_factor=2), first.norms)
    norms = [2.0, 3.9, 4.1, 5.0, 1.0]
    assert [resumed.accept(1.0, norm) for norm in norms] == [first.accept(1.0, norm) for norm in norms] == [True, True, False, False, True]


def test_a_resumed_guard_goes_on_counting_in_a_row() -> None:
    first = StepGuard(FaultConfig(skips_in_a_row=2))
    first.accept(math.nan, 1.0)
    resumed = StepGuard(FaultConfig(skips_in_a_row=2), first.norms, first.skips_in_a_row)
    resumed.accept(math.nan, 1.0)
    assert resumed.is_lost


def test_without_a_factor_nothing_is_kept() -> None:
    guard = StepGuard(FaultConfig())
    assert guard.accept(1.0, 1.0)
    assert guard.accept(1.0, 1e9)
    assert guard.norms == []
