"""Hugging Face models of every family that is converted, tiny, with all weights random, in folders as transformers 4 and 5 spell them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from tpt_megatron.tokenizer import load_tokenizer

_SHAPE = {
    **{"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 263},
    **{"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 3e-5},
}
_LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "router_aux_loss_coef": 0.002}


def _config(kind: str, theta: float, scaling: Mapping[str, Any] | None = None, **values: Any) -> Any:
    rope = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return getattr(transformers, f"{kind}Config")(**{**_SHAPE, "rope_parameters": rope, **values})


def configs() -> dict[str, Any]:
    """Return a fresh config of each case: query groups everywhere, heads of a size of their own where the family has them."""
    return {
        "llama": _config("Llama", 10_000.0, vocab_size=257, mlp_bias=False),
        "llama-tied-scaled": _config("Llama", 500_000.0, _LLAMA_3, tie_word_embeddings=True, head_dim=12),
        "mistral": _config("Mistral", 1_000_000.0, sliding_window=None, head_dim=16, vocab_size=269),
        "qwen2": _config("Qwen2", 1_000_000.0, rms_norm_eps=1e-6),
        "qwen2-tied": _config("Qwen2", 10_000.0, tie_word_embeddings=True, vocab_size=271),
        "qwen3": _config("Qwen3", 1_000_000.0, head_dim=16, rms_norm_eps=1e-6),
        "qwen3-tied": _config("Qwen3", 5_000_000.0, head_dim=12, tie_word_embeddings=True, vocab_size=277),
        "qwen3_moe": _config("Qwen3Moe", 1_000_000.0, head_dim=16, **_EXPERTS),
        "qwen3_moe-tied": _config("Qwen3Moe", 10_000.0, head_dim=12, tie_word_embeddings=True, vocab_size=281, **_EXPERTS),
    }


def random_model(config: Any, seed: int = 0) -> PreTrainedModel:
    """Return a model in fp32 with every weight random: fresh norms are ones, fresh biases zeros, and hide mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1 if parameter.dim() == 1 else 0.15)
    return model.float().eval()


def logits(model: PreTrainedModel, tokens_bs: torch.Tensor) -> torch.Tensor:
    """Return [b, s, vocabulary]."""
    with torch.inference_mode():
        result: torch.Tensor = model(tokens_bs).logits
    return result


KEPT = {
    "tokenizer.json": json.dumps(json.loads(load_tokenizer("byte", "<|endoftext|>").to_bytes()), indent=1).encode() + b"\n\n",
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}",  "x":1}',
    "special_tokens_map.json": b'{ "eos_token":"</s>" }',
    "chat_template.jinja": b"{%- for m in messages %}{{ m }}\r\n{% endfor %}",
    "generation_config.json": b'{"eos_token_id": [2, 1], "temperature": 0.6}\n',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
}
"""Files beside the weights, in bytes that no JSON writer would choose."""


def save_model(model: PreTrainedModel, folder: Path, *, spelling: int = 5, shard_size: str = "20KB", dtype: torch.dtype | None = None) -> Path:
    """Write a model in several shards with files beside it. spelling: which transformers' config.json."""
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    for name, content in KEPT.items():
        (folder / name).write_bytes(content)
    if spelling == 4:
        path = folder / "config.json"
        path.write_text(json.dumps(_as_transformers_4(json.loads(path.read_text())), indent=2))
    return folder


def _as_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    config.pop("layer_types", None)
    return config | {"transformers_version": "4.57.6"}


def edit_config(folder: Path, *removed: str, **changes: Any) -> None:
    """Change keys of config.json."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps(config | changes))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a model folder."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def edit_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Put other tensors in a folder's place, or remove (None) or add them; the folder has one file afterwards."""
    tensors = tensors_of(folder)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    kept = {name: tensor.clone().contiguous() for name, tensor in (tensors | dict(changes)).items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
