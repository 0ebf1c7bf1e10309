from typing import Any

import pytest

from tpt_megatron.config.load import check_config
from tpt_megatron.config.parallel import check_world
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError

SHAPE = {"num_layers": 12, "hidden_size": 48, "ffn_hidden_size": 96, "num_heads": 12, "num_query_groups": 6}
EXPERTS = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 30}


def config(model: Any, parallel: dict[str, Any], **others: Any) -> TrainConfig:
    values = {"run_dir": "r", "model": model, "data": {"train": "d", "sequence_length": 32}, "optimizer": {"learning_rate": 1}, "parallel": parallel}
    return check_config(TrainConfig, values | {"steps": 2, "global_batch_sequences": 4} | others, "test")


@pytest.mark.parametrize(
    ("model", "parallel", "says"),
    [
        ({}, {"tensor_parallel": 4}, "parallel.tensor_parallel=4 does not divide model.num_query_groups=6; it could be 2, 3, 6"),
        ({}, {"pipeline_parallel": 5}, "parallel.pipeline_parallel=5 does not divide model.num_layers=12; it could be 3, 4, 6"),
        (
            {},
            {"pipeline_parallel": 2, "virtual_pipeline": 4},
            "parallel.pipeline_parallel=2 x parallel.virtual_pipeline=4 = 8 does not divide model.num_layers=12; their product could be 4, 6, 12",
        ),
        ({}, {"virtual_pipeline": 2}, "virtual_pipeline=2 needs pipeline_parallel of at least 2"),
        ({}, {"context_parallel": 3}, "data.sequence_length=32 is not a multiple of 2 x parallel.context_parallel=3 = 6; the nearest: 30 or 36"),
        (
            {},
            {"tensor_parallel": 3, "sequence_parallel": True},
            "data.sequence_length=32 is not a multiple of parallel.tensor_parallel=3 with sequence_parallel = 3; the nearest: 30 or 33",
        ),
        ({}, {"sequence_parallel": True}, "sequence_parallel=true needs tensor_parallel of at least 2"),
        ({}, {"expert_parallel": 2}, "parallel.expert_parallel=2, but the model has no experts"),
        ({"experts": EXPERTS}, {"expert_parallel": 3}, "parallel.expert_parallel=3 does not divide model.experts.num_experts=8; it could be 1, 2, 4"),
        ({"experts": EXPERTS}, {"tensor_parallel": 2}, "parallel.tensor_parallel=2 with model.experts needs parallel.sequence_parallel=true"),
        ({"mtp_layers": 1, "tie_embeddings": True}, {"pipeline_parallel": 2}, "needs parallel.pipeline_parallel=1"),
        ({}, {"overlap_param_gather": True}, "overlap_param_gather=true needs distributed_optimizer=true and overlap_grad_reduce=true"),
        ({"experts": EXPERTS | {"top_k": 9}}, {}, "top_k=9 is more than num_experts=8"),
        ({"rope_scaling": {"factor": 8, "high_freq_factor": 1}}, {}, "high_freq_factor=1.0 must be larger than low_freq_factor=1.0"),
    ],
)
def test_impossible_layouts_are_refused_with_what_would_work(model: dict[str, Any], parallel: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(SHAPE | model, parallel)
    assert says in str(refused.value)


def test_presets_fill_in_what_is_not_given() -> None:
    chosen = config({"preset": "llama-3.2-1b", "num_layers": 4}, {}).model
    assert (chosen.num_layers, chosen.hidden_size, chosen.rope_scaling is not None) == (4, 2048, True)
    assert config("qwen3-8b", {}).model.qk_norm
    with pytest.raises(ConfigError, match="preset='llama-4' is not known; known are llama-3-8b, "):
        config("llama-4", {})


@pytest.mark.parametrize(
    ("parallel", "world", "says"),
    [
        (
            {"tensor_parallel": 2, "pipeline_parallel": 2},
            6,
            "parallel.tensor_parallel=2 x parallel.pipeline_parallel=2 = 4 does not divide the 6 rank(s) of this job; start it with 4 or 8",
        ),
        ({"context_parallel": 4}, 2, "parallel.context_parallel=4 does not divide the 2 rank(s) of this job; start it with 4 "),
        (
            {"expert_parallel": 4},
            6,
            "parallel.expert_parallel=4 does not divide the 6 rank(s) that share a pipeline stage's layers (data",
        ),
    ],
)
def test_worlds_that_a_layout_does_not_fill_are_refused(parallel: dict[str, Any], world: int, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_world(config(SHAPE | {"experts": EXPERTS}, parallel | {"sequence_parallel": "tensor_parallel" in parallel}).parallel, world)
    assert says in str(refused.value)


OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("parallel", "changes", "says"),
    [
        ({}, {"fp8": "delayed", "precision": "fp32"}, "fp8=delayed goes over precision=bf16"),
        ({}, {"fp8_parameters": True}, "needs a recipe: set fp8"),
        ({"distributed_optimizer": False}, {"fp8": "delayed", "fp8_parameters": True}, "fp8_parameters=true needs parallel.distributed_optimizer=true"),
        (OVERLAPPED, {"fp8": "mxfp8", "fp8_parameters": True}, "is not supported with parallel.overlap_param_gather=true"),
    ],
)
def test_fp8_goes_over_bf16_and_its_parameters_are_made_from_fp32(parallel: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(SHAPE, parallel, **{"precision": "bf16"} | changes)
    assert says in str(refused.value)
    config(SHAPE, OVERLAPPED, precision="bf16", fp8="delayed", fp8_parameters=True)


@pytest.mark.parametrize(
    ("recipe", "model", "parallel", "others", "says"),
    [
        ("tensorwise", {"hidden_size": 72}, {}, {}, "multiples of 16, which model.hidden_size=72 is not; the nearest: 64 or 80"),
        ("mxfp8", {}, {}, {}, "fp8=mxfp8 multiplies matrices whose sizes are multiples of 32, which model.hidden_size=48 is not; the nearest: 32 or 64"),
        (
            "delayed",
            {"ffn_hidden_size": 144},
            {"tensor_parallel": 2},
            {},
            "multiples of 16, which model.num_heads=12 x model.head_dim=4 / parallel.tensor_parallel=2 = 24 is not; the nearest: 16 or 32",
        ),
        ("blockwise", {"ffn_hidden_size": 100}, {}, {}, "which model.ffn_hidden_size=100 is not; the nearest: 96 or 112"),
        ("blockwise", {"experts": EXPERTS}, {}, {}, "which model.experts.ffn_hidden_size=30 is not; the nearest: 16 or 32"),
        (
            "tensorwise",
            {},
            {"context_parallel": 4},
            {"micro_batch_sequences": 1},
            "which micro_batch_sequences=1 x data.sequence_length=32 / parallel.context_parallel=4 = 8 is not; the nearest: 16",
        ),
        (
            "blockwise",
            {"hidden_size": 128, "num_heads": 8, "num_query_groups": 4},
            {"tensor_parallel": 2, "sequence_parallel": True},
            {"micro_batch_sequences": 2},
            "fp8=blockwise with parallel.sequence_parallel gathers tensors whose sizes are multiples of 128, which "
            "micro_batch_sequences=2 x data.sequence_length=32 / parallel.tensor_parallel=2 = 32 is not; the nearest: 128",
        ),
        (
            "tensorwise",
            {"hidden_size": 128, "ffn_hidden_size": 128, "num_heads": 8, "num_query_groups": 8},
            {"tensor_parallel": 4, "sequence_parallel": True, "context_parallel": 2},
            {"micro_batch_sequences": 3, "data": {"train": "d", "sequence_length": 32}},
            "fp8=tensorwise with parallel.sequence_parallel gathers tensors whose sizes are multiples of 8, which "
            "micro_batch_sequences=3 x data.sequence_length=32 / parallel.context_parallel=2 / parallel.tensor_parallel=4 = 12 is not; the nearest: 8 or 16",
        ),
        (
            "delayed",
            {"hidden_size": 96, "num_heads": 4, "head_dim": 16, "num_query_groups": 4, "mtp_layers": 1},
            {"tensor_parallel": 4},
            {},
            "multiples of 16, which model.ffn_hidden_size=96 / parallel.tensor_parallel=4 = 24 is not",
        ),
        (
            "delayed",
            {"hidden_size": 96, "ffn_hidden_size": 128, "num_heads": 4, "head_dim": 16, "num_query_groups": 4, "mtp_layers": 1},
            {"tensor_parallel": 4},
            {},
            "multiples of 16, which model.hidden_size=96 / parallel.tensor_parallel=4 = 24 is not; the nearest: 16 or 32",
        ),
    ],
)
def test_sizes_that_fp8_has_no_matrix_products_for_are_refused(
    recipe: str, model: dict[str, Any], parallel: dict[str, Any], others: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        config(SHAPE | model, parallel, precision="bf16", fp8=recipe, **others)
    assert says in str(refused.value)
    config(SHAPE | model, parallel, precision="bf16", **others)


@pytest.mark.parametrize("preset", ["llama-3-8b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_presets_have_sizes_for_fp8_in_usual_layouts(preset: str, recipe: str) -> None:
    data = {"train": "d", "sequence_length": 8192}
    accepted = config(preset, {"tensor_parallel": 4, "sequence_parallel": True, "context_parallel": 2}, precision="bf16", fp8=recipe, data=data)
    assert accepted.fp8 == recipe
