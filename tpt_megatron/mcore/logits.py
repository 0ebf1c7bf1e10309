"""Logits of a checkpoint, as megatron-core computes them: what conversions are held against."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from tpt_megatron.config.load import check_config
from tpt_megatron.config.model import ModelConfig
from tpt_megatron.config.parallel import ParallelConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore.attention import attention_mask
from tpt_megatron.mcore.checkpoint import load_checkpoint
from tpt_megatron.mcore.engine import Engine


def checkpoint_logits(
    folder: Path, model: ModelConfig, tokens_bs: torch.Tensor, parallel: ParallelConfig, dtype: torch.dtype = torch.float32
) -> torch.Tensor | None:
    """Return [b, s, vocabulary] in fp32, unpadded, on ranks of the last pipeline stage; None on others. Needs the process groups of `groups.join`.

    folder: an `iter_*` folder. tokens_bs: [b, s] int64. dtype: what weights are rounded to first. Memory: weights, gradients and optimizer in
    fp32. CheckpointError as `load_checkpoint` raises it.
    """
    config = check_config(
        TrainConfig,
        {
            "run_dir": "unused",
            "model": model.model_dump(),
            "data": {"train": "unused", "sequence_length": tokens_bs.size(1), "attention": "sequence"},
            "optimizer": {"learning_rate": 1e-3},
            "parallel": parallel.model_dump(),
            "steps": 1,
            "global_batch_sequences": tokens_bs.size(0),
            "micro_batch_sequences": tokens_bs.size(0),
        },
        "logits",
    )
    engine = Engine(config, 1)
    load_checkpoint(engine, folder, "load another one", weights_only=True)
    with torch.no_grad():
        for chunk in engine.model:
            chunk.eval()
            for parameter in chunk.parameters():
                parameter.copy_(parameter.to(dtype))
        outputs = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter([tokens_bs]),
            model=engine.model,
            num_microbatches=1,
            seq_length=tokens_bs.size(1),
            micro_batch_size=tokens_bs.size(0),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return outputs[0].float().cpu()[..., : model.vocab_size] if parallel_state.is_pipeline_last_stage() else None


def _forward(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    tokens = next(batches).to(next(model.parameters()).device)
    positions = torch.arange(tokens.size(1), device=tokens.device)[None].expand_as(tokens)
    return model(tokens, positions, attention_mask(None, tokens.size(1))), _whole_vocabulary


def _whole_vocabulary(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    gathered: torch.Tensor = gather_from_tensor_model_parallel_region(logits)
    return gathered
