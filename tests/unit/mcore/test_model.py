import pytest
import torch

from tpt_megatron.config.train import ModelConfig
from tpt_megatron.mcore.cpu import FusedAdam
from tpt_megatron.mcore.model import count_parameters, padded_vocabulary


def config(**changes: object) -> ModelConfig:
    shape = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2, "vocab_size": 250}
    return ModelConfig.model_validate({**shape, **changes})


@pytest.mark.parametrize(("tensor_parallel", "rows"), [(1, 256), (2, 256), (4, 512)])
def test_vocabulary_is_padded_for_the_layout(tensor_parallel: int, rows: int) -> None:
    assert padded_vocabulary(config(), tensor_parallel) == rows


def test_parameters_of_llama_3_8b_are_the_published_ones() -> None:
    llama = config(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_heads=32, num_query_groups=8, vocab_size=128256)
    assert count_parameters(llama) == 8_030_261_248


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
