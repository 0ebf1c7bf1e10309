"""Model families by the name that config.json gives them: one file each, one table each."""

from __future__ import annotations

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.families import llama, mistral, qwen2, qwen3, qwen3_moe
from tpt_megatron.convert.families.rules import Family
from tpt_megatron.errors import ConversionError

FAMILIES: dict[str, Family] = {family.model_type: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY)}


def family_of(model: ModelConfig, model_type: str | None = None) -> Family:
    """Return the family that a model is exported as: the one it came from, where it still fits, or the plainest that can express it.

    Raises ConversionError, which names the keys, when none can.
    """
    if model.mtp_layers:
        raise ConversionError(f"model.mtp_layers={model.mtp_layers}: no format that transformers reads has layers for multi-token prediction")
    has = (model.experts is not None, model.qk_norm, model.qkv_bias)
    families = {(False, False, False): "llama", (False, False, True): "qwen2", (False, True, False): "qwen3", (True, True, False): "qwen3_moe"}
    if has not in families:
        keys = f"model.experts={'given' if has[0] else 'none'}, qk_norm={has[1]}, qkv_bias={has[2]}".lower()
        raise ConversionError(f"{keys}: no family has these together; Qwen3's mixture has qk_norm and no qkv_bias, Qwen2 has qkv_bias alone")
    chosen = families[has]
    return FAMILIES["mistral" if chosen == "llama" and model_type == "mistral" else chosen]
