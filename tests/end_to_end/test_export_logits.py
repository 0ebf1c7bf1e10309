"""What megatron-core computes is what transformers computes from the export: the same losses on the same tokens.

The vocabulary is padded in the one and not in the other: rows of padding have no part in the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.exports import loss_of_export, train_and_save

SHAPE = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 112, "num_heads": 6, "num_query_groups": 2, "vocab_size": 201, "rope_theta": 5e5}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True, "rope_scaling": {"factor": 8, "original_max_position_embeddings": 32}},
    "untied": {"tie_embeddings": False},
    "experts": {"tie_embeddings": False, "qk_norm": True, "experts": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 56}},
}


@pytest.mark.parametrize("kind", MODELS)
def test_losses_agree(tmp_path: Path, kind: str) -> None:
    expected = train_and_save(tmp_path, model=SHAPE | MODELS[kind])
    loss, model = loss_of_export(tmp_path)
    assert type(model).__name__ == ("Qwen3MoeForCausalLM" if kind == "experts" else "LlamaForCausalLM")
    assert model.config.vocab_size == SHAPE["vocab_size"]
    assert loss < 4.5, "the model has learnt nothing: agreement would say little"
    assert loss == pytest.approx(expected, abs=1e-5)
