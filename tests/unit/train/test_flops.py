import pytest

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.mcore.model import count_parameters
from tpt_megatron.train.flops import flops_per_token, peak_tflops


@pytest.mark.parametrize("preset", ["llama-3-8b", "qwen3-0.6b"])
def test_without_attention_they_are_six_times_the_parameters_that_multiply(preset: str) -> None:
    model = ModelConfig.model_validate(preset)
    embedding = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size  # looked up, not multiplied
    assert flops_per_token(model, 0) == pytest.approx(6 * (count_parameters(model) - embedding), rel=5e-4)  # but for norms


def test_attention_is_causal() -> None:
    model = ModelConfig.model_validate("llama-3-8b")
    # 12 x layers x hidden x sequence is the usual term for attention over the whole sequence; causal is half of it.
    assert flops_per_token(model, 8192) - flops_per_token(model, 0) == 6 * 32 * 4096 * 8192


def test_of_a_mixture_the_experts_that_are_asked_count() -> None:
    model = ModelConfig.model_validate("qwen3-30b-a3b")
    assert flops_per_token(model, 0) / 6 == pytest.approx(3.35e9 - 151_936 * 2048, rel=0.01)  # "A3B": 3.3 billion are active


def test_chips_are_known_by_their_names() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe", "fp8") == 1513.0
    assert peak_tflops("NVIDIA H100 NVL", "bf16") == 835.5
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp8") is None
    assert peak_tflops("cpu", "fp32") is None
