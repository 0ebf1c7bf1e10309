"""Qwen2 and Qwen2.5: a bias on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.families.rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, OUTPUT, QKV_BIAS, Family


def _settings(model: ModelConfig) -> dict[str, Any]:
    windows = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0}
    # Its config has no such key; transformers takes it where it is there.
    return windows if model.head_size == model.hidden_size // model.num_heads else windows | {"head_dim": model.head_size}


def refuse_windows(config: Mapping[str, Any]) -> str | None:
    """Return what asks for sliding windows; numbers that go with them are there without, too."""
    return "use_sliding_window=true" if config.get("use_sliding_window") else None


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    (EMBEDDING, *ATTENTION, QKV_BIAS, *MLP, FINAL_NORM, OUTPUT),
    _settings,
    lambda config: {"qkv_bias": True},
    refuse_windows,
)
