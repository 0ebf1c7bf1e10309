from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.config.load import check_config
from tpt_megatron.config.progress import BatchRamp, Progress
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.train.schedule import learning_rate

MODEL = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1, "num_query_groups": 1}


def config(optimizer: dict[str, Any], **changes: Any) -> TrainConfig:
    values = {"run_dir": "r", "model": MODEL, "data": {"train": "d", "sequence_length": 10}, "global_batch_sequences": 4, "steps": 12}
    merged = values | {"optimizer": {"learning_rate": 1.0} | optimizer} | changes
    return check_config(TrainConfig, {key: value for key, value in merged.items() if value is not None}, "test")


def rates(run: TrainConfig) -> list[float]:
    return [learning_rate(run, step) for step in range(1, run.last_step + 1)]


def test_warm_up_is_linear_and_learns_from_the_first_step() -> None:
    assert rates(config({"warmup_steps": 4}, steps=6)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_goes_from_the_maximum_to_the_minimum(schedule: str) -> None:
    found = rates(config({"min_learning_rate": 0.1, "schedule": schedule, "warmup_steps": 2}))[2:]
    assert found[0] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(config({"schedule": "cosine"}, steps=11))[5] == pytest.approx(0.5)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)])
def test_wsd_stays_and_then_falls_to_the_minimum_at_the_last_step(shape: str, middle: float) -> None:
    found = rates(config({"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4, "decay_shape": shape}))
    assert found[:8] == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert found[9] == pytest.approx(middle)
    assert found[11] == 0
    assert found[7:] == sorted(found[7:], reverse=True)


def test_epochs_are_steps_once_the_sequences_of_one_are_known() -> None:
    by_epochs = config({"schedule": "cosine", "warmup_steps": 2}, steps=None, epochs=2.5)
    assert rates(by_epochs.in_steps(19)) == rates(config({"schedule": "cosine", "warmup_steps": 2}))  # 47.5 sequences, of which the last step fills up one
    assert config({}, steps=None, epochs=0.1).in_steps(40).last_step == 1  # of the decimal: in binary it is a little more
    assert config({}, steps=None, epochs=3).in_steps(20).last_step == 15
    assert config({}, steps=None, epochs=1.64).in_steps(10).last_step == 5  # 16.4 sequences are more than four steps have
    ramp = {"start_sequences": 1, "increment_sequences": 3, "tokens": 50}
    assert config({}, steps=None, epochs=1, batch_ramp=ramp).in_steps(13).last_step == 5 + 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "steps and epochs state the same; give one of them"),
        ({"steps": None, "tokens": 480}, "tokens and epochs state the same; give one of them"),
        ({"steps": None, "epochs": 0}, "epochs=0: must be greater than 0"),
        (
            {"steps": None, "data": {"sequence_length": 10, "train": [{"path": "d", "weight": 1}, {"path": "e", "weight": 1}]}},
            "epochs=2 are of one dataset, and data.train names d, e; give steps or tokens",
        ),
        (
            {"steps": None, "data": {"sequence_length": 10, "stages": [{"train": "d", "tokens": 20}, {"train": "e"}]}},
            "epochs=2 are of one dataset, and data.stages names d, e",
        ),
        ({"steps": None, "data": {"sequence_length": 10, "train": {"path": "d", "max_epochs": 2}}}, "epochs=2 and data.train.max_epochs=2.0 state the same"),
        ({"steps": None, "data": {"sequence_length": 10, "train": {"path": "d", "tokens": 20}}}, "epochs=2 and data.train.tokens=20 state the same"),
    ],
)
def test_epochs_that_say_it_twice_or_of_what_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config({}, **({"epochs": 2} | changes))
    assert says in str(refused.value)


def test_tokens_say_what_steps_say() -> None:
    by_tokens = config({"schedule": "wsd", "warmup_tokens": 80, "decay_tokens": 160}, steps=None, tokens=480)
    assert rates(by_tokens) == rates(config({"schedule": "wsd", "warmup_steps": 2, "decay_steps": 4}))
    assert config({}, steps=None, tokens=441).last_step == 12


@pytest.mark.parametrize(
    ("optimizer", "changes", "says"),
    [
        ({"schedule": "wsd"}, {}, "schedule=wsd needs decay_steps or decay_tokens, one of them; neither is given"),
        ({"decay_steps": 3}, {}, "decay_steps is for schedule=wsd, not for schedule=constant"),
        ({"warmup_steps": 2, "warmup_tokens": 80}, {}, "warmup_steps and warmup_tokens state the same"),
        ({"warmup_tokens": 480}, {}, "optimizer.warmup_tokens=480, 12 step(s), must be fewer than steps=12"),
        ({"schedule": "wsd", "warmup_steps": 9, "decay_steps": 4}, {}, "are together more than steps=12"),
        ({"min_learning_rate": 2}, {}, "min_learning_rate=2.0 is larger than learning_rate=1.0"),
        ({"min_learning_rate": 0.1}, {}, "min_learning_rate=0.1 has no effect with schedule=constant"),
        ({}, {"watch": {"profile": {"first_step": 13}}}, "watch.profile.first_step=13 is never reached: the run has 12 steps"),
        ({}, {"tokens": 480}, "steps and tokens state the same; give one of them"),
        ({}, {"steps": None}, "give steps, tokens or epochs"),
        ({}, {"batch_ramp": {"start_sequences": 1, "increment_sequences": 2, "tokens": 100}}, "batch_ramp from 1 by 2 does not reach global_batch_sequences=4"),
        ({}, {"batch_ramp": {"start_sequences": 4, "increment_sequences": 2, "tokens": 100}}, "must be fewer than global_batch_sequences=4"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(optimizer: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(optimizer, **changes)
    assert says in str(refused.value)


@given(start=st.integers(1, 6), increment=st.integers(1, 4), more=st.integers(1, 4), tokens=st.integers(1, 3000), length=st.integers(1, 20))
def test_growing_batches_count_up_without_a_gap(start: int, increment: int, more: int, tokens: int, length: int) -> None:
    full = start + more * increment
    progress = Progress(full, length, BatchRamp(start_sequences=start, increment_sequences=increment, tokens=tokens))
    seen = 0
    for step in range(1, 60):
        assert progress.sequences_before(step) == seen
        seen += progress.batch(step)
        assert progress.tokens_after(step) == seen * length
        assert progress.steps_for(seen * length) == step
        assert progress.steps_for(seen * length - 1) == (step if length * progress.batch(step) > 1 else step - 1)
    sizes = [progress.batch(step) for step in range(1, 5000)]
    assert tuple(sorted(set(sizes))) == progress.batches == tuple(range(start, full + 1, increment))
    assert sizes == sorted(sizes)
    ramped = sum(size for size in sizes if size < full) * length
    assert tokens <= ramped < tokens + more * length * full
