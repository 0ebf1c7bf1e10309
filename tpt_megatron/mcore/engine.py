"""How one optimizer step is computed: megatron-core's model, schedules and optimizer behind four verbs.

The trainer says when (train/loop.py); this says how. Ranks and pipeline stages are asked about here and nowhere above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore.attention import attention_mask, on_this_context_rank, packed_documents
from tpt_megatron.mcore.machine import check_machine
from tpt_megatron.mcore.model import build_model, gathers_in_bf16, seed_everything, transformer_config


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass on one rank reads; all of shape [b, s].

    tokens, labels  int64 ids; labels are the tokens that follow
    weights         fp32, how much each label counts in the loss; 0: no loss is taken
    kinds           int32 number of what each label is, from 0: the engine sums losses by it, and its caller knows the names
    documents       int32 numbers of the documents inside each sequence, or None: attention over the whole sequence
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    kinds: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over every rank and micro-batch of a step.

    weighted  of token losses by their weights; weights: of the weights. weighted / weights is what is learned from
    losses    [kinds] of token losses, whatever their weights; tokens: [kinds] how many
    """

    weighted: float
    weights: float
    losses: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]

    @property
    def loss(self) -> float:
        """The mean token loss by weight, in nats; 0 where no label counts: there is nothing to learn then, and the gradient is 0."""
        return self.weighted / self.weights if self.weights else 0.0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(self.weighted + other.weighted, self.weights + other.weights, self.losses + other.losses, self.tokens + other.tokens)

    def mean(self, kinds: Sequence[int]) -> float | None:
        """Return the mean token loss of some kinds, whatever their weights, in nats; None where there is no such token."""
        tokens = self.tokens[list(kinds)].sum()
        return float(self.losses[list(kinds)].sum() / tokens) if tokens else None


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step: losses, the gradient's norm before clipping, and whether parameters were updated."""

    losses: LossSums
    gradient_norm: float
    updated: bool


def _weighed(batch: MicroBatch) -> npt.NDArray[np.float64]:
    """Return [2], how many labels count, and the sum of their weights."""
    return np.array([np.count_nonzero(batch.weights), batch.weights.sum(dtype=np.float64)])


def _always(loss: float, gradient_norm: float) -> bool:
    return True


class Engine:
    """This rank's share of model and optimizer. Needs the process groups of `groups.join`.

    kinds: how many kinds of labels there are. around_forward: entered around the forward pass of each micro-batch.
    """

    def __init__(self, config: TrainConfig, kinds: int, around_forward: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        check_machine(config)
        self._config, self._kinds, self._around_forward = config, kinds, around_forward
        seed_everything(config.seed)
        core = transformer_config(config)
        self.model = build_model(config, core)
        """A chunk for each virtual pipeline stage."""
        chosen, parallel = config.optimizer, config.parallel
        settings = OptimizerConfig(
            optimizer="adam",
            lr=chosen.learning_rate,
            min_lr=chosen.min_learning_rate,
            weight_decay=chosen.weight_decay,
            adam_beta1=chosen.beta1,
            adam_beta2=chosen.beta2,
            adam_eps=chosen.epsilon,
            clip_grad=chosen.clip_gradient_norm,
            fp8_recipe=None if config.fp8 == "none" else config.fp8,
            reuse_grad_buf_for_mxfp8_param_ag=gathers_in_bf16(config),
            bf16=config.precision == "bf16",
            params_dtype=core.params_dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        self.optimizer = get_megatron_optimizer(settings, self.model, get_standard_config_overrides(settings), use_gloo_process_groups=False)
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            part.init_state_fn(part.optimizer, part.config)  # else a checkpoint cannot be saved before the first step
        core.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            core.no_sync_func = [chunk.no_sync for chunk in self.model] if len(self.model) > 1 else self.model[0].no_sync
        self._weight_scale: float | torch.Tensor = 1.0
        self._is_packed = torch.cuda.is_available() and config.data.attention == "document"
        self._device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def train_step(self, batches: Sequence[MicroBatch], learning_rate: float, accept: Callable[[float, float], bool] = _always) -> StepResult:
        """Run one optimizer step over this rank's micro-batches; every rank gets the same result.

        `accept` is asked with (loss, gradient norm) before anything is changed: where it says no, parameters and optimizer stay as they are.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = self._config.optimizer.weight_decay * group["wd_mult"]
        self._set_mode(training=True)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._weight_scale = self._tokens_per_weight(batches)
        losses = self._forward_backward(batches, forward_only=False)
        self.optimizer.prepare_grads()  # fp32 and bf16 have no loss scaling, so that it finds nothing
        gradient_norm = float(self.optimizer.get_grad_norm())
        updated = accept(losses.loss, gradient_norm)
        if updated:
            self._clip(gradient_norm)
            self.optimizer.step_with_ready_grads()
        return StepResult(losses, gradient_norm, updated)

    def load_parameters(self, loaded: Mapping[str, Any], *, weights_only: bool) -> None:
        """Bring model and optimizer into step after a checkpoint's were loaded. loaded: the chunks' weights by name, in full precision.

        weights_only: the optimizer's fp32 parameters become the model's. FP8 parameters are quantized anew from the fp32 ones, as after a step:
        what load_state_dict made of them was quantized before their scales were loaded.
        """
        in_fp8 = self._config.fp8_parameters
        if weights_only:
            self.optimizer.reload_model_params(state_dict=dict(loaded) if in_fp8 else None)
        if not in_fp8:
            return
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if gathers_in_bf16(self._config):
                part._copy_main_params_to_param_buffer()
            else:
                part._copy_main_params_to_model_params()
        if not self._config.parallel.overlap_param_gather:  # else the next forward pass gathers them
            for chunk in self.model:
                chunk.start_param_sync()

    def gather_parameters(self) -> None:
        """Have every rank hold all parameters as the last step left them: overlapped gathering leaves that to the next forward pass."""
        if self._config.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def _clip(self, gradient_norm: float) -> None:
        """Bring the gradient of all parameters, whichever optimizer has them, under the config's norm."""
        most = self._config.optimizer.clip_gradient_norm
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]) if most else []:
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, most, gradient_norm, part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> LossSums:
        """Return the losses of the model as it is, over every rank's micro-batches."""
        self._set_mode(training=False)
        return self._forward_backward(batches, forward_only=True)

    def _set_mode(self, *, training: bool) -> None:
        for chunk in self.model:
            if chunk.training != training:  # it walks through all modules, which a small model's step notices
                chunk.train(training)

    def _tokens_per_weight(self, batches: Sequence[MicroBatch]) -> float | torch.Tensor:
        """Return the number of labels that count, over the sum of their weights, in the whole step: 1 where every weight is 0 or 1.

        megatron-core divides the sum of losses by a whole number of tokens; with losses multiplied by this, that makes their mean by weight.
        An fp32 scalar on the GPU, so that the host need not wait for the last step's update there.
        """
        if not self._config.data.has_uneven_weights:
            return 1.0
        sums = self._put(np.sum([_weighed(batch) for batch in batches], axis=0))
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        return torch.where(sums[1] > 0, sums[0] / sums[1], 1.0).float()

    def _put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Return an array on this rank's device. From pinned memory: from any other the host waits until the GPU has done what it was given before."""
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.pin_memory().to(self._device, non_blocking=True)

    def _forward_backward(self, batches: Sequence[MicroBatch], *, forward_only: bool) -> LossSums:
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=[iter(batches) for _ in self.model],
            model=self.model,
            num_microbatches=len(batches),
            seq_length=self._config.data.sequence_length * (self._config.micro_batch_sequences if self._is_packed else 1),
            micro_batch_size=1 if self._is_packed else self._config.micro_batch_sequences,
            forward_only=forward_only,
        )
        total = torch.zeros(2 + 2 * self._kinds, dtype=torch.float64, device=self._device)
        for report in reports:  # on the last pipeline stage only
            total += report["sums"]
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.broadcast(total, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=parallel_state.get_pipeline_model_parallel_group())
        weighted, weights, *by_kind = total.tolist()
        losses, tokens = np.array(by_kind).reshape(2, self._kinds)
        return LossSums(weighted, weights, losses, tokens)

    def _forward(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        tokens, labels, weights, kinds = (on_this_context_rank(self._put(array)) for array in (batch.tokens, batch.labels, batch.weights, batch.kinds))
        length = batch.tokens.shape[1]
        positions = on_this_context_rank(torch.arange(length, device=self._device)[None]).expand_as(tokens)
        mask = packed = None
        if self._is_packed:
            assert batch.documents is not None
            packed = packed_documents(batch.documents, self._put)
            tokens, labels, weights, kinds, positions = (tensor.reshape(1, -1) for tensor in (tokens, labels, weights, kinds, positions))
        elif self._device.type == "cpu":
            mask = attention_mask(None if batch.documents is None else torch.from_numpy(batch.documents), length)
        else:
            assert batch.documents is None  # Transformer Engine's attention is causal by itself, over the whole sequence
        with self._around_forward():
            output = model(tokens, positions, mask, labels=labels, loss_mask=weights, packed_seq_params=packed)
        return output, partial(self._sum_losses, weights, kinds)

    def _sum_losses(self, weights: torch.Tensor, kinds: torch.Tensor, token_losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return (sum of losses, number of tokens, report), as megatron-core's per-token loss asks; token_losses [b, s/cp]."""
        losses = token_losses.float()
        weighted = (losses * weights).sum()
        plain, kinds = losses.detach().double().flatten(), kinds.flatten().long()
        # Not bincount, for which the host would wait for the GPU.
        by_kind = plain.new_zeros(2, self._kinds).index_add_(1, kinds, torch.stack((plain, torch.ones_like(plain))))
        sums = torch.cat((torch.stack((weighted.detach().double(), weights.double().sum())), by_kind.flatten()))
        return weighted * self._weight_scale, (weights > 0).sum().to(torch.int), {"sums": sums}
