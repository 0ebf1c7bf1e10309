"""Llama in Hugging Face's words and in megatron-core's: which tensor of one is made of which of the other.

Checkpoint keys are those of megatron-core 0.16.1's torch_dist format with its default metadata: layers are stacked along
a first axis, and norms carry the names that Transformer Engine gives them, whichever layers wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_megatron.config.model import ModelConfig

Split = Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
Shape = tuple[int, ...]


def as_it_is(weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Return the tensor itself."""
    del model
    return (weight,)


def without_padding(weight_vh: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Cut the rows that pad the vocabulary: `[padded, hidden]` to `[vocab_size, hidden]`."""
    return (weight_vh[: model.vocab_size],)


def split_qkv(weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Take q, k and v out of the fused rows.

    The rows come query group by query group: the group's query heads, its one key head, its one value head, head_size rows each.
    """
    heads_a_group = model.num_heads // model.num_query_groups
    grouped = weight.view(model.num_query_groups, heads_a_group + 2, model.head_size, -1)  # [groups, q.. k v, head_size, hidden]
    q, k, v = torch.split_with_sizes(grouped, [heads_a_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, weight.shape[-1]) for part in (q, k, v))


def split_gate_up(weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Halve `[2 x ffn, hidden]` into gate and up, in this order."""
    gate, up = torch.split_with_sizes(weight, [model.ffn_hidden_size] * 2, dim=0)
    return gate, up


@dataclass(frozen=True)
class Rule:
    """One checkpoint key and the Hugging Face tensors it becomes. In a layer's rule the key is stacked and `{i}` is the layer."""

    key: str
    names: tuple[str, ...]
    split: Split


EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), without_padding)
LAYER = (
    Rule("decoder.layers.self_attention.linear_qkv.layer_norm_weight", ("model.layers.{i}.input_layernorm.weight",), as_it_is),
    Rule(
        "decoder.layers.self_attention.linear_qkv.weight",
        ("model.layers.{i}.self_attn.q_proj.weight", "model.layers.{i}.self_attn.k_proj.weight", "model.layers.{i}.self_attn.v_proj.weight"),
        split_qkv,
    ),
    Rule("decoder.layers.self_attention.linear_proj.weight", ("model.layers.{i}.self_attn.o_proj.weight",), as_it_is),
    Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", ("model.layers.{i}.post_attention_layernorm.weight",), as_it_is),
    Rule("decoder.layers.mlp.linear_fc1.weight", ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"), split_gate_up),
    Rule("decoder.layers.mlp.linear_fc2.weight", ("model.layers.{i}.mlp.down_proj.weight",), as_it_is),
)
FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), as_it_is)
OUTPUT = Rule("output_layer.weight", ("lm_head.weight",), without_padding)


@dataclass(frozen=True)
class Step:
    """A rule at its place: read `key` (its slice `layer` when it is stacked), split it, name the parts `names`."""

    key: str
    layer: int | None
    names: tuple[str, ...]
    split: Split


def steps(model: ModelConfig) -> Iterator[Step]:
    """Yield the steps that make the whole model, in the order of its layers. Tied embeddings have no output layer."""
    yield Step(EMBEDDING.key, None, EMBEDDING.names, EMBEDDING.split)
    for i in range(model.num_layers):
        for rule in LAYER:
            yield Step(rule.key, i, tuple(name.format(i=i) for name in rule.names), rule.split)
    for rule in (FINAL_NORM,) if model.tie_embeddings else (FINAL_NORM, OUTPUT):
        yield Step(rule.key, None, rule.names, rule.split)


def checkpoint_shapes(model: ModelConfig, padded_vocab: int) -> dict[str, Shape]:
    """Return the shape of every key that a checkpoint of this model holds."""
    layers, hidden, ffn, head = model.num_layers, model.hidden_size, model.ffn_hidden_size, model.head_size
    vocabulary = (padded_vocab, hidden)
    shapes: dict[str, Shape] = {
        "embedding.word_embeddings.weight": vocabulary,
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        "decoder.layers.self_attention.linear_qkv.weight": (layers, (model.num_heads + 2 * model.num_query_groups) * head, hidden),
        "decoder.layers.self_attention.linear_proj.weight": (layers, hidden, model.num_heads * head),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        "decoder.layers.mlp.linear_fc1.weight": (layers, 2 * ffn, hidden),
        "decoder.layers.mlp.linear_fc2.weight": (layers, hidden, ffn),
        "decoder.final_layernorm.weight": (hidden,),
    }
    return shapes if model.tie_embeddings else shapes | {"output_layer.weight": vocabulary}


def hugging_face_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every tensor of the Hugging Face model."""
    hidden, ffn, q, kv = model.hidden_size, model.ffn_hidden_size, model.num_heads * model.head_size, model.num_query_groups * model.head_size
    layer: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (model.vocab_size, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(model.num_layers) for name, shape in layer.items()}
    return shapes if model.tie_embeddings else shapes | {"lm_head.weight": (model.vocab_size, hidden)}


def hugging_face_config(model: ModelConfig, *, sequence_length: int, dtype: str, eod_id: int | None) -> dict[str, object]:
    """Return `config.json` in the spelling that transformers 4.57 and 5.x both read. `dtype` is torch's name, e.g. `bfloat16`.

    transformers 5 spells RoPE `rope_parameters`; 4.57 ignores that silently and takes theta 10,000, so it is not used.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else {"rope_type": "llama3", **model.rope_scaling.model_dump()},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
