"""What megatron-core is told on CUDA, asked where there is none. That it computes what it should is tests/gpu's to say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore.model import transformer_config

pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:megatron\.core", r"ignore::DeprecationWarning:megatron\.core")
EXPERTS = {"experts": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 32}}


def train_config(**changes: Any) -> TrainConfig:
    model = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_heads": 4, "num_query_groups": 2, "vocab_size": 250} | changes.pop("model", {})
    fixed = {"run_dir": "unused", "data": {"train": "unused", "sequence_length": 32}, "optimizer": {"learning_rate": 1e-3}, "steps": 1}
    return check_config(TrainConfig, fixed | {"model": model, "global_batch_sequences": 2, "precision": "bf16"} | changes, "test")


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb", object())  # Transformer Engine's, asked for


@pytest.mark.usefixtures("on_cuda")
def test_kernels_are_fused() -> None:
    core = transformer_config(train_config())
    assert core.apply_rope_fusion
    assert core.bias_activation_fusion
    assert core.masked_softmax_fusion
    assert core.gradient_accumulation_fusion
    assert core.deallocate_pipeline_outputs


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(("recipe", "numbers"), [("delayed", "hybrid"), ("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")])
def test_recipes_have_their_formats(recipe: str, numbers: str) -> None:
    core = transformer_config(train_config(fp8=recipe, fp8_parameters=True))
    assert (core.fp8, core.fp8_recipe, core.fp8_param) == (numbers, recipe, True)
    assert not core.use_cpu_initialization  # only a GPU can quantize what it draws
    assert transformer_config(train_config(fp8=recipe)).use_cpu_initialization


@pytest.mark.usefixtures("on_cuda")
def test_experts_are_multiplied_together_and_drawn_by_each_rank() -> None:
    core = transformer_config(train_config(model=EXPERTS))
    assert core.moe_grouped_gemm
    assert not core.use_cpu_initialization
    assert core.moe_router_dtype == "fp32"


@pytest.mark.usefixtures("on_cuda")
@pytest.mark.parametrize(
    ("recompute", "expected"),
    [("none", (None, None, None)), ("selective", ("selective", None, None)), ("full", ("full", "uniform", 1))],
)
def test_recomputation(recompute: str, expected: tuple[Any, ...]) -> None:
    core = transformer_config(train_config(recompute=recompute))
    assert (core.recompute_granularity, core.recompute_method, core.recompute_num_layers) == expected
    if recompute == "selective":
        assert core.recompute_modules == ["core_attn"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_cpu_has_none_of_cudas_kernels() -> None:
    core = transformer_config(train_config())
    assert not core.apply_rope_fusion
    assert not core.masked_softmax_fusion
    assert not transformer_config(train_config(model=EXPERTS)).moe_grouped_gemm
