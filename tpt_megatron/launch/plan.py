"""What a training run will be on N GPUs, before one of them is touched: memory of each pipeline stage, time, checkpoints, and whether it fits.

Parameters, gradients and optimizer are counted on simulated ranks (mcore/simulation.py); activations are by formula (activations.py); time is the
model's FLOPs over the FLOP/s that were stated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.launch.activations import Activations, activations
from tpt_megatron.launch.gpus import Gpu
from tpt_megatron.mcore.machine import check_supported_on_cuda
from tpt_megatron.mcore.model import count_parameters, padded_vocabulary
from tpt_megatron.mcore.simulation import HeldByRank, simulate_stages
from tpt_megatron.train.flops import flops_per_token


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One rank of a pipeline stage, in bytes. fp8_bytes: copies of weights in FP8, which are kept beside bf16 ones."""

    held: HeldByRank
    fp8_bytes: int
    activations: Activations

    @property
    def total(self) -> int:
        """All that the rank needs of its GPU."""
        held = self.held
        return held.parameter_bytes + held.gradient_bytes + held.optimizer_bytes + self.fp8_bytes + self.activations.total


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A run. Sizes in bytes, times in seconds; None where the length of the run is not known without its data, or the chip's peak is not.

    micro_batches    a data-parallel rank's, a step
    bubble           the share of a step in which a pipeline stage has nothing to do: (stages - 1) / (chunks x micro-batches + stages - 1)
    flops            of the whole run, by the convention of train/flops.py
    seconds          flops over world_size x peak x mfu
    checkpoint_bytes of one checkpoint: weights, and the optimizer's state where it is saved
    """

    world_size: int
    data_parallel: int
    parameters: int
    stages: tuple[StagePlan, ...]
    micro_batches: int
    bubble: float
    steps: int | None
    tokens: int | None
    tokens_a_step: int
    flops_a_token: float
    flops: float | None
    mfu: float
    seconds_a_step: float | None
    seconds: float | None
    checkpoint_bytes: int
    checkpoints_kept: int | None

    @property
    def fullest(self) -> StagePlan:
        """The stage that needs most of its GPU."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run."""
        return None if self.seconds is None else self.seconds * self.world_size / 3600

    def to_json(self) -> dict[str, Any]:
        """Return all of it as a JSON object."""
        stages = [asdict(stage) | {"total": stage.total} for stage in self.stages]
        return asdict(self) | {"stages": stages, "gpu_hours": self.gpu_hours}


def plan_training(config: TrainConfig, world_size: int, gpu: Gpu, mfu: float) -> TrainingPlan:
    """Plan a run whose model.vocab_size is known. Raises ConfigError for what the trainer would refuse on such a cluster."""
    if config.model.vocab_size == 0:
        raise ConfigError("model.vocab_size=0 takes the dataset's, which is not there yet; give model.vocab_size, or data.train that exists")
    check_supported_on_cuda(config)
    gpu.check_fp8(config.fp8)
    padded_vocabulary(config.model, config.parallel.tensor_parallel)
    config.check_world(world_size)
    held = simulate_stages(config, world_size)
    data_parallel = world_size // config.parallel.model_ranks
    micro_batches = config.global_batch_sequences // (config.micro_batch_sequences * data_parallel)
    pp, chunks = config.parallel.pipeline_parallel, config.parallel.virtual_pipeline
    steps = None if config.epochs is not None else config.last_step
    tokens = None if steps is None else config.progress.sequences_before(steps + 1) * config.data.sequence_length
    each = flops_per_token(config.model, config.data.sequence_length)
    peak = gpu.peak_flops(config.fp8 != "none")
    speed = None if peak is None else world_size * peak * mfu
    tokens_a_step = config.global_batch_sequences * config.data.sequence_length
    return TrainingPlan(
        world_size=world_size,
        data_parallel=data_parallel,
        parameters=count_parameters(config.model),
        stages=tuple(StagePlan(rank, _fp8_bytes(config, rank), activations(config, rank.pipeline_stage, micro_batches)) for rank in held),
        micro_batches=micro_batches,
        bubble=(pp - 1) / (chunks * micro_batches + pp - 1),
        steps=steps,
        tokens=tokens,
        tokens_a_step=tokens_a_step,
        flops_a_token=each,
        flops=None if tokens is None else each * tokens,
        mfu=mfu,
        seconds_a_step=None if speed is None else each * tokens_a_step / speed,
        seconds=None if speed is None or tokens is None else each * tokens / speed,
        checkpoint_bytes=checkpoint_bytes(config),
        checkpoints_kept=_checkpoints_kept(config, steps),
    )


def _fp8_bytes(config: TrainConfig, held: HeldByRank) -> int:
    """Return the bytes of FP8 weights beside bf16 ones, as they are and transposed; FP8 parameters have both in the place of their two bytes."""
    if config.fp8 == "none" or config.fp8_parameters:
        return 0
    rows = padded_vocabulary(config.model, config.parallel.tensor_parallel) * config.model.hidden_size // config.parallel.tensor_parallel
    last = config.parallel.pipeline_parallel - 1
    is_last = held.pipeline_stage == last
    # Layers for multi-token prediction, on the last stage, have an embedding there, too; and where embeddings are tied, a last stage has a copy.
    ends = held.pipeline_stage == 0 or (is_last and config.model.mtp_layers > 0), is_last and (last > 0 or not config.model.tie_embeddings)
    return 2 * (held.parameters - rows * sum(ends))


def checkpoint_bytes(config: TrainConfig) -> int:
    """Return what the tensors of one checkpoint take: weights as they are trained; and fp32 weights and two moments of the optimizer.

    An optimizer that is not distributed has no other weights than those of fp32, and writes them once.
    """
    model: ModelConfig = config.model
    padding = (padded_vocabulary(model, 1) - model.vocab_size) * model.hidden_size * (1 if model.tie_embeddings else 2)
    weights = count_parameters(model) + padding + _mtp_parameters(model)
    trained = 2 if config.precision == "bf16" else 4
    return weights * (trained + (12 if trained == 2 or config.parallel.distributed_optimizer else 8))


def _mtp_parameters(model: ModelConfig) -> int:
    """Return the parameters of layers for multi-token prediction: each is a layer, a product of two hidden states, and three norms."""
    if not model.mtp_layers:
        return 0
    one = ModelConfig.model_validate(model.model_dump() | {"num_layers": 1, "mtp_layers": 0})
    none_but_ends = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2) + model.hidden_size
    return model.mtp_layers * (count_parameters(one) - none_but_ends + 2 * model.hidden_size**2 + 3 * model.hidden_size)


def _checkpoints_kept(config: TrainConfig, steps: int | None) -> int | None:
    """Return how many are on the disk at the end; None where that depends on data."""
    rules = config.checkpoint
    if steps is None:
        return None
    saved = set(range(rules.every_steps, steps + 1, rules.every_steps)) | {steps} if rules.every_steps else {steps}
    if not rules.keep_last:
        return len(saved)
    last = set(sorted(saved)[-max(rules.keep_last, 2) :])
    if rules.keep_every_steps:
        last |= {step for step in saved if step % rules.keep_every_steps == 0}
    return min(len(saved), len(last) + (rules.keep_best or 0))
