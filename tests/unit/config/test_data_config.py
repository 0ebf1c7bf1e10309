from typing import Any

import pytest

from tpt_megatron.config.data import DataConfig, Share
from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError

ONE = {"path": "a", "weight": 1}


def config(data: dict[str, Any], steps: int = 10) -> DataConfig:
    values = {
        "run_dir": "run",
        "model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1, "num_query_groups": 1},
        "data": {"sequence_length": 8, **data},
        "optimizer": {"learning_rate": 1e-3},
        "steps": steps,
        "global_batch_sequences": 2,
    }
    return check_config(TrainConfig, values, "train.yaml").data


def test_a_prefix_is_a_blend_of_one() -> None:
    assert config({"train": "a"}).train == config({"train": {"path": "a"}}).train == (Share(path="a"),)
    assert config({"train": "a"}).train_paths == ["a"]
    assert config({"train": "a", "validation": "v"}).validation_sets == {"": "v"}
    assert config({"train": "a", "validation": {"web": "v", "code": "w"}}).validation_sets == {"web": "v", "code": "w"}


def test_what_a_run_wrote_down_is_read_again() -> None:
    for data in ({"train": "a"}, {"stages": [{"tokens": 16, "train": "a"}, {"train": [ONE, {"path": "b", "weight": 2}]}]}):
        read = config(data)
        assert DataConfig.model_validate(read.model_dump(mode="json")) == read


def test_budgets_last_for_the_run_and_for_each_stage() -> None:
    budgets = [{"path": "a", "tokens": 100}, {"path": "b", "tokens": 60}]
    assert config({"train": budgets}).train[0].tokens == 100  # 10 steps x 2 sequences x 8 tokens
    with pytest.raises(ConfigError, match=r"data\.train: the budgets add up to 160 tokens, and the run reads 176; raise them, or make the run shorter"):
        config({"train": budgets}, steps=11)
    config({"stages": [{"tokens": 160, "train": budgets}, {"train": "a"}]}, steps=1000)
    with pytest.raises(ConfigError, match=r"data\.stages\.0: the budgets add up to 160 tokens, and the stage reads 168"):
        config({"stages": [{"tokens": 169, "train": budgets}, {"train": "a"}]}, steps=1000)


def test_a_stage_that_the_run_does_not_reach_is_refused() -> None:
    config({"stages": [{"tokens": 80, "train": "a"}, {"tokens": 72, "train": "b"}, {"train": "c"}]})  # one sequence is left for the last
    for second in (80, 800):
        with pytest.raises(ConfigError, match=r"data\.stages\.2 is never reached: the run reads 160 tokens, and the stages before it have as many or more"):
            config({"stages": [{"tokens": 80, "train": "a"}, {"tokens": second, "train": "b"}, {"train": "c"}]})
    with pytest.raises(ConfigError, match=r"data\.stages\.1 is never reached"):
        config({"stages": [{"tokens": 167, "train": "a"}, {"tokens": 8, "train": "b"}, {"train": "c"}]})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": "a", "too_long": "drop"}, "too_long=drop has no effect with packing=concatenate"),
        ({}, "key 'data.train' is missing, or data.stages in its place"),
        ({"train": "a", "stages": [{"train": "a"}]}, "give one of train and stages"),
        ({"train": [ONE, ONE]}, "a is named 2 times in one blend"),
        ({"train": [{"path": "a", "weight": 1, "tokens": 5}]}, "a: give one of weight and tokens"),
        ({"train": [ONE, {"path": "b"}]}, "the shares of a blend all need a weight, or all need tokens: a, b"),
        ({"train": [ONE, {"path": "b", "tokens": 5}]}, "the shares of a blend all need a weight, or all need tokens: a, b"),
        ({"train": [{"path": "a", "weight": 0}]}, "data.train.0.weight=0: must be greater than 0"),
        ({"train": [{"path": "a", "wieght": 1}]}, "unknown key 'data.train.0.wieght'; allowed here: max_epochs, path, tokens, weight"),
        ({"stages": [{"train": "a"}, {"train": "b"}]}, "stages.0: every stage but the last has tokens"),
        ({"stages": [{"train": "a", "tokens": 80}]}, "stages.0: every stage but the last has tokens, the last has none"),
        ({"stages": [{"train": "a", "tokens": 7}, {"train": "b"}]}, "stages.0.tokens=7 is less than one sequence of 8"),
        ({"train": "a", "validation": {}}, "validation: a mapping needs names with a dataset each"),
        ({"train": "a", "packing": "worst_fit"}, "data.packing='worst_fit': must be 'concatenate' or 'best_fit'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(data)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
