"""How Transformer Engine's kernel for the loss is called and its answer read, with another function in its place: the kernel itself needs a GPU."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch.nn import functional

from tpt_megatron.mcore import model
from tpt_megatron.mcore.model import fused_cross_entropy


def kernel(logits: torch.Tensor, labels: torch.Tensor, *, dist_process_group: Any, is_cg_capturable: bool) -> torch.Tensor:
    """Go by strides as the kernel does: rows at multiples of the last but one of logits, labels at multiples of their last."""
    assert dist_process_group is None
    assert is_cg_capturable, "else it waits for the GPU"
    first, second, vocabulary = logits.shape
    count = first * second
    rows = logits.as_strided((count, vocabulary), (logits.stride(-2), 1))
    targets = labels.as_strided((count,), (labels.stride(-1),))
    return functional.cross_entropy(rows.float(), targets, reduction="none").view(first, second)


@pytest.mark.parametrize(("length", "micro_batch"), [(7, 1), (5, 3), (1, 4)])
def test_losses_belong_to_their_labels(monkeypatch: pytest.MonkeyPatch, length: int, micro_batch: int) -> None:
    stand_in = types.ModuleType("transformer_engine.pytorch.cross_entropy")
    stand_in.parallel_cross_entropy = kernel  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(model.parallel_state, "get_tensor_model_parallel_group", lambda: None)
    logits_sbv = torch.randn(length, micro_batch, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels_bs = torch.randint(11, (micro_batch, length), generator=torch.Generator().manual_seed(1))
    losses_bs = fused_cross_entropy(labels_bs, logits_sbv)
    expected = functional.cross_entropy(logits_sbv.permute(1, 2, 0), labels_bs, reduction="none")
    assert torch.allclose(losses_bs, expected, atol=1e-6)
    weights = torch.rand(micro_batch, length, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((losses_bs * weights).sum(), logits_sbv)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits_sbv)
    assert torch.allclose(gradient, wanted, atol=1e-6)
