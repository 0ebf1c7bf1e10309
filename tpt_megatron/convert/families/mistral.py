"""Mistral 7B and its successors without sliding windows: Llama's tensors under another name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.families import llama
from tpt_megatron.convert.families.rules import Family


def _settings(model: ModelConfig) -> dict[str, Any]:
    return {"head_dim": model.head_size, "sliding_window": None}


def _refuse(config: Mapping[str, Any]) -> str | None:
    window = config.get("sliding_window", 4096)  # transformers' default: a config.json without windows says null
    return None if window is None else f"sliding_window={window}"


FAMILY = Family("mistral", "MistralForCausalLM", llama.FAMILY.rules, _settings, lambda config: {}, _refuse)
