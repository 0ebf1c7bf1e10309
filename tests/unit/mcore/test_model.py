import pytest
import torch

from tpt_megatron.config.model import ModelConfig, RopeScaling
from tpt_megatron.errors import ConfigError
from tpt_megatron.mcore.cpu import FusedAdam
from tpt_megatron.mcore.model import count_parameters, padded_vocabulary, scaled_frequencies


def config(**changes: object) -> ModelConfig:
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2, "vocab_size": 250}
    return ModelConfig.model_validate({**shape, **changes})


def test_vocabulary_is_padded_alike_in_every_layout() -> None:
    assert [padded_vocabulary(config(vocab_size=257), tensor_parallel) for tensor_parallel in (1, 2, 4)] == [384] * 3
    with pytest.raises(ConfigError, match=r"tensor_parallel=2 does not divide the 257 rows of the padded vocabulary; make model.vocab_divisor=1 a multiple"):
        padded_vocabulary(config(vocab_size=257, vocab_divisor=1), 2)


PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_of_presets_are_those_that_their_safetensors_state(preset: str) -> None:
    assert count_parameters(ModelConfig.model_validate(preset)) == PUBLISHED[preset]


def test_rope_is_stretched_as_transformers_does_it() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling(factor=32.0, original_max_position_embeddings=2048, high_freq_factor=5.0)
    theirs = LlamaConfig(head_dim=64, rope_theta=500_000.0, rope_scaling={"rope_type": "llama3", **scaling.model_dump()}, max_position_embeddings=65536)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    plain = 1.0 / 500_000.0 ** (torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(scaled_frequencies(plain, scaling), expected, rtol=1e-6, atol=0)
    assert not torch.allclose(plain, expected)


def test_fused_adam_is_torch_adamw() -> None:
    torch.manual_seed(0)
    mine = [torch.randn(5, 3, requires_grad=True)]
    theirs = [mine[0].detach().clone().requires_grad_()]
    ours, reference = FusedAdam(mine, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        gradient = torch.randn(5, 3)
        mine[0].grad, theirs[0].grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-7)
