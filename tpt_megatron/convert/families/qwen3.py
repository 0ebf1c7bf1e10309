"""Qwen3: norms on each head's query and key, no biases, a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.families.qwen2 import refuse_windows
from tpt_megatron.convert.families.rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, OUTPUT, QK_NORMS, Family


def settings(model: ModelConfig) -> dict[str, Any]:
    """Return what Qwen3's config.json has besides every family's."""
    return {"head_dim": model.head_size, "attention_bias": False, "use_sliding_window": False, "sliding_window": None, "max_window_layers": model.num_layers}


def refuse(config: Mapping[str, Any]) -> str | None:
    """Return what of Qwen3's config.json has no place here."""
    return "attention_bias=true" if config.get("attention_bias") else refuse_windows(config)


FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (EMBEDDING, *ATTENTION, *QK_NORMS, *MLP, FINAL_NORM, OUTPUT),
    settings,
    lambda config: {"qk_norm": True, "head_dim": config["head_dim"]},  # transformers would take 128 where there is none
    refuse,
)
