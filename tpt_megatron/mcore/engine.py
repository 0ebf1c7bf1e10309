"""How one optimizer step is computed: megatron-core's model, schedules and optimizer behind four verbs.

The trainer says when (train/loop.py); this says how. Ranks and pipeline stages are asked about here and nowhere above.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.pipeline_parallel import get_forward_backward_func

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore.attention import document_mask
from tpt_megatron.mcore.model import build_model, seed_everything, transformer_config


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass on one rank reads; all of shape [b, s].

    tokens, labels  int64 ids; labels are the tokens that follow
    loss_mask       fp32, 0 where no loss is taken
    documents       int32 numbers of the documents inside each sequence, or None: attention over the whole sequence
    parts           uint8 part of each label (0 document, 1 thinking), or None where the dataset does not say
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.float32]
    documents: npt.NDArray[np.int32] | None = None
    parts: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums of token losses and numbers of tokens over every rank and micro-batch of a step, in all and by part."""

    loss: float
    tokens: float
    loss_document: float
    tokens_document: float
    loss_thinking: float
    tokens_thinking: float

    def means(self) -> dict[str, float]:
        """Return the mean losses by metric name; a part without tokens has none."""
        sums = {"loss": (self.loss, self.tokens)}
        if self.tokens_document or self.tokens_thinking:
            sums["loss_document"] = (self.loss_document, self.tokens_document)
            sums["loss_thinking"] = (self.loss_thinking, self.tokens_thinking)
        return {name: total / tokens for name, (total, tokens) in sums.items() if tokens}


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: losses, and the gradient's norm before clipping."""

    losses: LossSums
    gradient_norm: float


class Engine:
    """This rank's share of model and optimizer. Needs the process groups of `groups.join`."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        seed_everything(config.seed)
        core = transformer_config(config)
        self.model = build_model(config, core)
        chosen = config.optimizer
        settings = OptimizerConfig(
            optimizer="adam",
            lr=chosen.learning_rate,
            min_lr=chosen.min_learning_rate,
            weight_decay=chosen.weight_decay,
            adam_beta1=chosen.beta1,
            adam_beta2=chosen.beta2,
            adam_eps=chosen.epsilon,
            clip_grad=chosen.clip_gradient_norm,
            bf16=config.precision == "bf16",
            params_dtype=core.params_dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.model], get_standard_config_overrides(settings), use_gloo_process_groups=False)
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            part.init_state_fn(part.optimizer, part.config)  # else a checkpoint cannot be saved before the first step
        core.finalize_model_grads_func = finalize_model_grads
        core.grad_scale_func = self.optimizer.scale_loss
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def train_step(self, batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """Run one optimizer step over this rank's micro-batches; every rank gets the same result."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = self._config.optimizer.weight_decay * group["wd_mult"]
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._forward_backward(batches, forward_only=False)
        _, gradient_norm, _ = self.optimizer.step()  # fp32 and bf16 never skip an update: there is no loss scaling
        return StepResult(losses, float(gradient_norm))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> LossSums:
        """Return the losses of the model as it is, over every rank's micro-batches."""
        self.model.eval()
        return self._forward_backward(batches, forward_only=True)

    def _forward_backward(self, batches: Sequence[MicroBatch], *, forward_only: bool) -> LossSums:
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=len(batches),
            seq_length=self._config.data.sequence_length,
            micro_batch_size=self._config.micro_batch_sequences,
            forward_only=forward_only,
        )
        total = torch.zeros(len(fields(LossSums)), dtype=torch.float64, device=self._device)
        for report in reports:  # on the last pipeline stage only
            total += report["sums"]
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        dist.broadcast(total, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=parallel_state.get_pipeline_model_parallel_group())
        return LossSums(*total.tolist())

    def _forward(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        tokens, labels, loss_mask = (torch.from_numpy(array).to(self._device, non_blocking=True) for array in (batch.tokens, batch.labels, batch.loss_mask))
        mask = None if batch.documents is None else document_mask(torch.from_numpy(batch.documents).to(self._device))
        positions = torch.arange(tokens.size(1), device=self._device).expand_as(tokens)
        output = model(tokens, positions, mask, labels=labels)
        parts = None if batch.parts is None else torch.from_numpy(batch.parts).to(self._device)
        return output, partial(_sum_losses, loss_mask, parts)


def _sum_losses(loss_mask: torch.Tensor, parts: torch.Tensor | None, token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return (sum of losses, number of tokens, report), as megatron-core's per-token loss asks. token_losses [b, s]."""
    losses = token_losses.float() * loss_mask
    loss, tokens = losses.sum(), loss_mask.sum()
    sums = [loss.detach(), tokens]
    for part in (0, 1):
        here = torch.zeros_like(loss_mask) if parts is None else loss_mask * (parts == part)
        sums += [(losses.detach() * here).sum(), here.sum()]
    return loss, tokens.to(torch.int), {"sums": torch.stack(sums).double()}
