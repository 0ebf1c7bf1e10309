"""A causal language model over bytes, as a Hugging Face folder with its tokenizer: random, or one that looks at the last byte only."""

from __future__ import annotations

import json
from pathlib import Path

from tpt_megatron.tokenizer import load_tokenizer

END = "<|endoftext|>"


def make_byte_model(folder: Path, *, positions: int = 256, seed: int = 0, is_bigram: bool = False, sharpness: float = 1.0) -> Path:
    """Save the model. is_bigram: its attention and its MLPs give nothing, so that the next byte depends on the last one. Returns the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=positions
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for weights in model.parameters():
                if weights.ndim == 2:
                    weights *= 8 * sharpness  # otherwise every byte is about as likely as any other
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= 4
                if is_bigram:
                    layer.self_attn.o_proj.weight.zero_()
                    layer.mlp.down_proj.weight.zero_()
        model.save_pretrained(folder)
    load_tokenizer("byte", END).save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}))
    return folder
