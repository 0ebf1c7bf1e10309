import pytest

from tpt_megatron.config.train import OptimizerConfig
from tpt_megatron.train.schedule import learning_rate


def test_warm_up_is_linear_and_learns_from_the_first_step() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_goes_from_the_maximum_to_the_minimum(schedule: str) -> None:
    config = OptimizerConfig.model_validate({"learning_rate": 1.0, "min_learning_rate": 0.1, "schedule": schedule, "warmup_steps": 2})
    rates = [learning_rate(config, step, 12) for step in range(2, 12)]
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)


def test_cosine_is_half_way_in_the_middle() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine")
    assert learning_rate(config, 5, 11) == pytest.approx(0.5)
