"""What a family's table is written in: rules that name one checkpoint tensor and the Hugging Face tensors it holds.

Checkpoint keys are those of megatron-core 0.16.1's torch_dist format with its default metadata: layers are stacked along a first
axis, experts along a second, and norms carry the names that Transformer Engine gives them, whichever layers wrote them.

Shapes are spelled with the letters of `sizes`: H hidden, Q query rows, K key (or value) rows, D of one head, F feed-forward,
E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpt_megatron.config.model import ModelConfig

Shape = tuple[int, ...]


def sizes(model: ModelConfig) -> dict[str, int]:
    """Return what each letter of a shape stands for."""
    experts = model.experts
    return {
        "H": model.hidden_size,
        "Q": model.num_heads * model.head_size,
        "K": model.num_query_groups * model.head_size,
        "D": model.head_size,
        "F": model.ffn_hidden_size if experts is None else experts.ffn_hidden_size,
        "E": 0 if experts is None else experts.num_experts,
        "V": model.vocab_size,
    }


@dataclass(frozen=True)
class Fusion:
    """How several tensors lie in one, along its first axis."""

    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]


def _split_qkv(weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    heads_a_group = model.num_heads // model.num_query_groups
    grouped = weight.view(model.num_query_groups, heads_a_group + 2, model.head_size, *weight.shape[1:])  # [groups, q.. k v, head_size, ...]
    parts = torch.split_with_sizes(grouped, [heads_a_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, *weight.shape[1:]) for part in parts)


def _join_qkv(parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    grouped = [part.view(model.num_query_groups, -1, model.head_size, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def _split_gate_up(weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    del model
    gate, up = weight.chunk(2)
    return gate, up


ALONE = Fusion(join=lambda parts, model: parts[0], split=lambda weight, model: (weight,))
QKV = Fusion(_join_qkv, _split_qkv)
"""Query group by query group: the group's query heads, its one key head, its one value head, head_size rows each."""
GATE_UP = Fusion(join=lambda parts, model: torch.cat(list(parts)), split=_split_gate_up)
VOCABULARY = Fusion(join=lambda parts, model: parts[0], split=lambda weight, model: (weight[: model.vocab_size],))
"""Rows beyond the vocabulary, which pad it, are left out."""


@dataclass(frozen=True)
class Rule:
    """One checkpoint tensor. In a layer's rule the key is stacked and `{i}` is the layer; in an expert's, too, and `{e}` is the expert.

    parts: the Hugging Face tensors in it, each with its shape in letters.
    """

    key: str
    parts: Mapping[str, str]
    fusion: Fusion = ALONE

    @property
    def is_of_experts(self) -> bool:
        """Say whether there is one for each expert of a layer."""
        return any("{e}" in name for name in self.parts)

    @property
    def is_of_layers(self) -> bool:
        """Say whether there is one for each layer."""
        return any("{i}" in name for name in self.parts)


@dataclass(frozen=True)
class Piece:
    """A rule at its place: the slice `place` (layer, or layer and expert) of the checkpoint tensor `key`, and what it is made of, by name.

    shape: of the slice, without the axes of `place`; the vocabulary unpadded.
    """

    key: str
    place: tuple[int, ...]
    shape: Shape
    parts: dict[str, Shape]
    fusion: Fusion


def pieces(rules: Sequence[Rule], model: ModelConfig) -> Iterator[Piece]:
    """Yield the pieces that make the whole model: what belongs to no layer in the rules' order, its layers between, one after the other."""
    known = sizes(model)
    layer = [rule for rule in rules if rule.is_of_layers]
    is_begun = False
    for rule in rules:
        if not rule.is_of_layers:
            yield _piece(rule, known)
        elif not is_begun:
            is_begun = True
            for i in range(model.num_layers):
                for of_layer in layer:
                    if of_layer.is_of_experts:
                        yield from (_piece(of_layer, known, i, e) for e in range(known["E"]))
                    else:
                        yield _piece(of_layer, known, i)


def _piece(rule: Rule, known: Mapping[str, int], *place: int) -> Piece:
    named = dict(zip(("i", "e"), place, strict=False))
    parts = {name.format(**named): tuple(known[letter] for letter in letters) for name, letters in rule.parts.items()}
    shapes = list(parts.values())
    return Piece(rule.key, place, (sum(shape[0] for shape in shapes), *shapes[0][1:]), parts, rule.fusion)


@dataclass(frozen=True)
class Family:
    """A model family of Hugging Face: its names, its table, and how its config.json differs from Llama's.

    settings    what its config.json has besides what every family's has; callable, of the model
    read        the ModelConfig keys that its config.json implies besides every family's; callable, of config.json
    refuse      why it cannot be expressed here, by key and value; callable, of config.json: None when it can
    """

    model_type: str
    architecture: str
    rules: tuple[Rule, ...]
    settings: Callable[[ModelConfig], dict[str, Any]]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    refuse: Callable[[Mapping[str, Any]], str | None]

    def rules_of(self, model: ModelConfig) -> tuple[Rule, ...]:
        """Return the table of one model: tied embeddings have no output layer."""
        return tuple(rule for rule in self.rules if not (model.tie_embeddings and rule.key == OUTPUT.key))


EMBEDDING = Rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "VH"}, VOCABULARY)
FINAL_NORM = Rule("decoder.final_layernorm.weight", {"model.norm.weight": "H"})
OUTPUT = Rule("output_layer.weight", {"lm_head.weight": "VH"}, VOCABULARY)
ATTENTION = (
    Rule("decoder.layers.self_attention.linear_qkv.layer_norm_weight", {"model.layers.{i}.input_layernorm.weight": "H"}),
    Rule(
        "decoder.layers.self_attention.linear_qkv.weight",
        {
            "model.layers.{i}.self_attn.q_proj.weight": "QH",
            "model.layers.{i}.self_attn.k_proj.weight": "KH",
            "model.layers.{i}.self_attn.v_proj.weight": "KH",
        },
        QKV,
    ),
    Rule("decoder.layers.self_attention.linear_proj.weight", {"model.layers.{i}.self_attn.o_proj.weight": "HQ"}),
)
QKV_BIAS = Rule(
    "decoder.layers.self_attention.linear_qkv.bias",
    {
        "model.layers.{i}.self_attn.q_proj.bias": "Q",
        "model.layers.{i}.self_attn.k_proj.bias": "K",
        "model.layers.{i}.self_attn.v_proj.bias": "K",
    },
    QKV,
)
QK_NORMS = (
    Rule("decoder.layers.self_attention.q_layernorm.weight", {"model.layers.{i}.self_attn.q_norm.weight": "D"}),
    Rule("decoder.layers.self_attention.k_layernorm.weight", {"model.layers.{i}.self_attn.k_norm.weight": "D"}),
)
MLP_NORM = Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", {"model.layers.{i}.post_attention_layernorm.weight": "H"})
MLP = (
    MLP_NORM,
    Rule(
        "decoder.layers.mlp.linear_fc1.weight",
        {"model.layers.{i}.mlp.gate_proj.weight": "FH", "model.layers.{i}.mlp.up_proj.weight": "FH"},
        GATE_UP,
    ),
    Rule("decoder.layers.mlp.linear_fc2.weight", {"model.layers.{i}.mlp.down_proj.weight": "HF"}),
)
