"""What train_gpu.py measures beside the trainer: steps of others, over models of the same shape and the same number of tokens.

Each function takes the trainer's config and train_gpu.py's arguments, and returns a step to be called. MachineError where the machine lacks what it needs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from tpt_megatron.errors import MachineError

Step = Callable[[], object]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def transformers_step(config: Any, args: argparse.Namespace) -> Step:
    """The model of transformers that an export is for, compiled, fully sharded by torch (fp32 parameters, gathered in bf16), with torch's fused AdamW."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoConfig, AutoModelForCausalLM

    from tpt_megatron.convert.families import family_of
    from tpt_megatron.convert.hugging_face import written_config

    device, shape = _device(), written_config(family_of(config.model), config.model, positions=args.sequence, dtype=torch.float32, eod_id=None)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape | {"use_cache": False}), attn_implementation="sdpa")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if config.precision == "bf16" else MixedPrecisionPolicy()
    for layer in model.model.layers:
        if not args.no_compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(config.model.vocab_size, (args.micro_batches, args.micro_batch, args.sequence), device=device)

    def step() -> None:
        for number, batch in enumerate(ids):
            model.set_requires_gradient_sync(number + 1 == len(ids))
            (model(input_ids=batch, labels=batch).loss / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


def layers_step(config: Any, args: argparse.Namespace) -> Step:
    """Transformer Engine's own layers, forwards and backwards, gradients accumulated in fp32: no embedding, loss or optimizer."""
    if not torch.cuda.is_available():
        raise MachineError("Transformer Engine's layers need a GPU, and there is no CUDA here")
    if config.precision != "bf16" or config.model.experts is not None:
        raise MachineError("the layers are dense ones, in bf16 or FP8, and this row is none")
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe
    from transformer_engine.pytorch.attention import RotaryPositionEmbedding

    model, device = config.model, _device()
    recipes = {
        "delayed": recipe.DelayedScaling,
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "mxfp8": recipe.MXFP8BlockScaling,
    }
    layers = torch.nn.ModuleList(
        te.TransformerLayer(
            model.hidden_size,
            model.ffn_hidden_size,
            model.num_heads,
            num_gqa_groups=model.num_query_groups,
            kv_channels=model.head_size,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            normalization="RMSNorm",
            activation="swiglu",
            bias=False,
            fuse_qkv_params=True,
            fuse_wgrad_accumulation=True,
            params_dtype=torch.bfloat16,
            self_attn_mask_type="causal",
        )
        for _ in range(model.num_layers)
    ).to(device)
    for parameter in layers.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    turns = RotaryPositionEmbedding(model.head_size)(args.sequence).to(device)
    inputs = torch.randn(args.sequence, args.micro_batch, model.hidden_size, dtype=torch.bfloat16, device=device, requires_grad=True)
    chosen = None if config.fp8 == "none" else recipes[config.fp8]()

    def step() -> None:
        for number in range(args.micro_batches):
            hidden = inputs
            with nullcontext() if chosen is None else te.fp8_autocast(enabled=True, fp8_recipe=chosen):
                for layer in layers:
                    hidden = layer(hidden, rotary_pos_emb=turns, is_first_microbatch=number == 0)
            hidden.backward(inputs.detach())

    return step
