"""Qwen3's mixture of experts: a router and experts in place of every layer's MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.families import qwen3
from tpt_megatron.convert.families.rules import ATTENTION, EMBEDDING, FINAL_NORM, GATE_UP, OUTPUT, QK_NORMS, Family, Rule

_EXPERTS = (
    Rule("decoder.layers.pre_mlp_layernorm.weight", {"model.layers.{i}.post_attention_layernorm.weight": "H"}),
    Rule("decoder.layers.mlp.router.weight", {"model.layers.{i}.mlp.gate.weight": "EH"}),
    Rule(
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        {"model.layers.{i}.mlp.experts.{e}.gate_proj.weight": "FH", "model.layers.{i}.mlp.experts.{e}.up_proj.weight": "FH"},
        GATE_UP,
    ),
    Rule("decoder.layers.mlp.experts.experts.linear_fc2.weight", {"model.layers.{i}.mlp.experts.{e}.down_proj.weight": "HF"}),
)


def _settings(model: ModelConfig) -> dict[str, Any]:
    assert model.experts is not None
    return qwen3.settings(model) | {
        "num_experts": model.experts.num_experts,
        "num_local_experts": model.experts.num_experts,  # its name in transformers 5
        "num_experts_per_tok": model.experts.top_k,
        "moe_intermediate_size": model.experts.ffn_hidden_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": model.experts.aux_loss_coefficient,
        "output_router_logits": False,
    }


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    number = config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]
    experts = {"num_experts": number, "top_k": config["num_experts_per_tok"], "ffn_hidden_size": config["moe_intermediate_size"]}
    if config.get("router_aux_loss_coef") is not None:
        experts["aux_loss_coefficient"] = config["router_aux_loss_coef"]
    return {"qk_norm": True, "experts": experts}


def _refuse(config: Mapping[str, Any]) -> str | None:
    if not config.get("norm_topk_prob", False):
        return "norm_topk_prob=false"
    if config.get("decoder_sparse_step", 1) != 1:
        return f"decoder_sparse_step={config['decoder_sparse_step']}"
    if config.get("mlp_only_layers"):
        return f"mlp_only_layers={config['mlp_only_layers']}"
    return qwen3.refuse(config)


FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", (EMBEDDING, *ATTENTION, *QK_NORMS, *_EXPERTS, FINAL_NORM, OUTPUT), _settings, _read, _refuse)
