"""Writes torch_dist checkpoints of tiny Llamas without a trainer: the inverse mapping, spelled apart from the package's table."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.tokenizer import train_word_tokenizer

EOD = "<|endoftext|>"


def tiny_model(**changes: Any) -> ModelConfig:
    values = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 56, "num_heads": 4, "num_query_groups": 2, "head_dim": 12, "vocab_size": 61}
    return ModelConfig(**{**values, "rope_theta": 5_000.0, "norm_epsilon": 3e-5, **changes})


def random_llama(model: ModelConfig, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with every weight random, norms too: fresh ones are all ones and would hide mistakes."""
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_size,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        max_position_embeddings=64,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        llama = LlamaForCausalLM(config)
        for name, parameter in llama.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3 if "norm" in name else 0.2)
    return llama.eval()


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig) -> Tensor:
    size, heads = model.head_size, model.num_heads // model.num_query_groups
    rows = []
    for group in range(model.num_query_groups):
        rows += [q[group * heads * size : (group + 1) * heads * size], k[group * size : (group + 1) * size], v[group * size : (group + 1) * size]]
    return torch.cat(rows)


def checkpoint_state(llama: LlamaForCausalLM, model: ModelConfig, padded_vocab: int) -> dict[str, Tensor]:
    state = {name: tensor.detach().clone() for name, tensor in llama.state_dict().items()}

    def padded(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, torch.full((padded_vocab - len(tensor), tensor.shape[1]), 7.0)])

    def stacked(make: Any) -> Tensor:
        return torch.stack([make({name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in state.items()}) for i in range(model.num_layers)])

    keys = {
        "embedding.word_embeddings.weight": padded(state["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": stacked(lambda s: s["input_layernorm.weight"]),
        "decoder.layers.self_attention.linear_qkv.weight": stacked(
            lambda s: fuse_qkv(s["self_attn.q_proj.weight"], s["self_attn.k_proj.weight"], s["self_attn.v_proj.weight"], model)
        ),
        "decoder.layers.self_attention.linear_proj.weight": stacked(lambda s: s["self_attn.o_proj.weight"]),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": stacked(lambda s: s["post_attention_layernorm.weight"]),
        "decoder.layers.mlp.linear_fc1.weight": stacked(lambda s: torch.cat([s["mlp.gate_proj.weight"], s["mlp.up_proj.weight"]])),
        "decoder.layers.mlp.linear_fc2.weight": stacked(lambda s: s["mlp.down_proj.weight"]),
    }
    return keys if model.tie_embeddings else keys | {"output_layer.weight": padded(state["lm_head.weight"])}


def write_checkpoint(
    run: Path, model: ModelConfig, state: dict[str, Any], *, step: int = 100, words: tuple[str, ...] | None = None, latest: bool = True, **record: Any
) -> Path:
    """Write `RUN/checkpoints/iter_*`. `words` become its tokenizer, whose size must be the model's vocabulary."""
    folder = run / "checkpoints" / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is the intent
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    tokenizer = None
    if words is not None:
        made = train_word_tokenizer([], words, EOD)
        made.save(folder / "tokenizer.json")
        tokenizer = {"fingerprint": made.fingerprint, "end_of_document": EOD, "eod_id": made.eod_id, "vocabulary_size": made.vocabulary_size}
    values = {"format": 1, "step": step, "tokens_seen": step * 1000, "model": model.model_dump(), "sequence_length": 64, "precision": "fp32"}
    (folder / "tpt.json").write_text(json.dumps({**values, "tokenizer": tokenizer, "arm": "vanilla", "data": None, **record}))
    if latest:
        (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(step))
    return folder
