"""Llama 2, 3, 3.1 and 3.2: the plain family, of which the others are variations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.families.rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, OUTPUT, Family


def _settings(model: ModelConfig) -> dict[str, Any]:
    return {"head_dim": model.head_size, "attention_bias": False, "mlp_bias": False}


def _refuse(config: Mapping[str, Any]) -> str | None:
    return next((f"{key}=true" for key in ("attention_bias", "mlp_bias") if config.get(key)), None)


FAMILY = Family("llama", "LlamaForCausalLM", (EMBEDDING, *ATTENTION, *MLP, FINAL_NORM, OUTPUT), _settings, lambda config: {}, _refuse)
