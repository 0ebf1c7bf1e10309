"""Config of `tpt train`."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.checkpoint import CheckpointConfig
from tpt_megatron.config.data import DataConfig
from tpt_megatron.config.fp8 import check_fp8_sizes
from tpt_megatron.config.load import Config
from tpt_megatron.config.model import ModelConfig
from tpt_megatron.config.optimizer import OptimizerConfig
from tpt_megatron.config.parallel import ParallelConfig, check_world
from tpt_megatron.config.progress import BatchRamp, Progress
from tpt_megatron.config.watching import FaultConfig, WatchConfig
from tpt_megatron.errors import ConfigError


class TrainConfig(Config):
    """One pretraining run.

    run_dir                 metrics.jsonl, run.json and checkpoints/ go there; a run that is found there is continued
    steps, tokens, epochs   how long to train, by one of them: optimizer steps in all; as many as see these tokens; or as many as go so often, 2.5 times
                            for instance, through the sequences of the one dataset data.train (the last step is a whole one)
    global_batch_sequences  sequences a step, over all ranks
    batch_ramp              smaller batches to begin with
    micro_batch_sequences   sequences a forward pass on one rank
    precision               fp32 or bf16 (about 20 times slower than fp32 on a CPU)
    fp8                     Transformer Engine's recipe for matrix products, over bf16: delayed scaling, tensorwise (current scaling), blockwise, or
                            mxfp8 where the chip has it; fp8_parameters: parameters, too, are kept in it
    recompute               what is computed anew in the backward pass to save memory: nothing, core attention (selective), or whole layers (full)
    """

    run_dir: Path
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watch: WatchConfig = WatchConfig()
    faults: FaultConfig = FaultConfig()
    steps: PositiveInt | None = None
    tokens: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    global_batch_sequences: PositiveInt
    batch_ramp: BatchRamp | None = None
    micro_batch_sequences: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    fp8: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    fp8_parameters: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    seed: int = Field(1234, ge=0, lt=2**32)
    validate_every_steps: int = Field(0, ge=0)
    validation_batches: PositiveInt = 1

    @model_validator(mode="after")
    def _layout_fits_model(self) -> Self:
        self._cuts_fit()
        if self.fp8 != "none" and self.precision != "bf16":
            raise ValueError(f"fp8={self.fp8} goes over precision=bf16, not precision={self.precision}")
        if self.fp8_parameters and self.fp8 == "none":
            raise ValueError("fp8_parameters=true needs a recipe: set fp8")
        if self.fp8_parameters and not self.parallel.distributed_optimizer:
            raise ValueError("fp8_parameters=true needs parallel.distributed_optimizer=true, whose fp32 copies they are made from")
        if self.fp8_parameters and self.fp8 == "mxfp8" and self.parallel.overlap_param_gather:
            raise ValueError("fp8=mxfp8 with fp8_parameters=true is not supported with parallel.overlap_param_gather=true; set one of them to false")
        if self.fp8 != "none":
            check_fp8_sizes(self.fp8, self.model, self.parallel, self.micro_batch_sequences, self.data.sequence_length)
        if self.validate_every_steps and self.data.validation is None:
            raise ValueError("validate_every_steps is set but data.validation names no dataset")
        self._lengths_fit()
        profile = self.watch.profile
        if self.epochs is None and profile is not None and profile.first_step > self.last_step:
            raise ValueError(f"watch.profile.first_step={profile.first_step} is never reached: the run has {self.last_step} steps")
        if self.epochs is None:
            self.data.check_lengths(self.progress.sequences_before(self.last_step + 1))
        if self.checkpoint.keep_best and isinstance(self.data.validation, dict):
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} goes by validation_loss, which named sets do not have; name no set, or keep none"
            )
        if self.checkpoint.keep_best and (not self.validate_every_steps or self.checkpoint.every_steps % self.validate_every_steps):
            raise ValueError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} needs a validation_loss for every checkpoint: checkpoint.every_steps="
                f"{self.checkpoint.every_steps} must be a multiple of validate_every_steps={self.validate_every_steps}, which must not be 0"
            )
        return self

    @cached_property
    def progress(self) -> Progress:
        """Steps, sequences and tokens of this run."""
        return Progress(self.global_batch_sequences, self.data.sequence_length, self.batch_ramp)

    @property
    def last_step(self) -> int:
        """Optimizer steps in all; of a length in epochs, see `in_steps`."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None, "epochs are steps only once the data is open"
        return self.progress.steps_for(self.tokens)

    def in_steps(self, sequences_per_epoch: int) -> Self:
        """Return this config, whose length is in epochs, with the steps that they are; a ValidationError where the schedule does not fit into them."""
        assert self.epochs is not None
        sequences = math.ceil(Fraction(str(self.epochs)) * sequences_per_epoch)  # of the decimal that was written
        steps = self.progress.steps_for(sequences * self.data.sequence_length)
        return type(self).model_validate(self.model_dump() | {"steps": steps, "epochs": None})

    @property
    def warmup_steps(self) -> int:
        """Steps of the learning rate's warm-up."""
        tokens = self.optimizer.warmup_tokens
        return self.optimizer.warmup_steps if tokens is None else self.progress.steps_for(tokens)

    @property
    def decay_steps(self) -> int:
        """Steps over which the learning rate falls at the end of schedule=wsd."""
        tokens = self.optimizer.decay_tokens
        if tokens is None:
            return self.optimizer.decay_steps or 0
        # Counted from the end, where batches are full.
        return -(-tokens // (self.global_batch_sequences * self.data.sequence_length))

    def check_world(self, world_size: int) -> None:
        """Refuse a world that the layout or the batch does not divide (ConfigError)."""
        check_world(self.parallel, world_size)
        self.check_batches(world_size // self.parallel.model_ranks)

    def check_batches(self, data_parallel: int) -> None:
        """Raise ConfigError for a batch that so many data-parallel ranks cannot share."""
        unit = self.micro_batch_sequences * data_parallel
        for batch in reversed(self.progress.batches):
            if batch % unit:
                which = f"global_batch_sequences={batch}" if batch == self.global_batch_sequences else f"batch_ramp: a batch of {batch}"
                above = (batch // unit + 1) * unit
                nearest = f"the nearest that are: {batch // unit * unit} and {above}" if batch > unit else f"the least that is one: {above}"
                raise ConfigError(
                    f"{which} is not a multiple of micro_batch_sequences={self.micro_batch_sequences} "
                    f"x {data_parallel} data-parallel rank(s) = {unit}; {nearest}"
                )
            stages = self.parallel.pipeline_parallel
            if self.parallel.virtual_pipeline > 1 and batch // unit % stages:
                raise ConfigError(
                    f"parallel.virtual_pipeline={self.parallel.virtual_pipeline} needs micro-batches in multiples of parallel.pipeline_parallel={stages}, "
                    f"and a batch of {batch} gives each data-parallel rank {batch // unit}; make it a multiple of {stages * unit}, or virtual_pipeline=1"
                )

    def _lengths_fit(self) -> None:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given)} state the same; give one of them" if given else "give steps, tokens or epochs, how long to train")
        ramp = self.batch_ramp
        if ramp is not None and (self.global_batch_sequences - ramp.start_sequences) % ramp.increment_sequences:
            raise ValueError(
                f"batch_ramp from {ramp.start_sequences} by {ramp.increment_sequences} does not reach global_batch_sequences={self.global_batch_sequences}"
            )
        if ramp is not None and ramp.start_sequences >= self.global_batch_sequences:
            raise ValueError(f"batch_ramp.start_sequences={ramp.start_sequences} must be fewer than global_batch_sequences={self.global_batch_sequences}")
        if self.epochs is not None:
            self._epochs_are_of_one_dataset()
            return
        last = f"steps={self.steps}" if self.steps is not None else f"the {self.last_step} steps of tokens={self.tokens}"
        warmup = f"optimizer.warmup_steps={self.warmup_steps}"
        if self.optimizer.warmup_tokens is not None:
            warmup = f"optimizer.warmup_tokens={self.optimizer.warmup_tokens}, {self.warmup_steps} step(s),"
        if self.warmup_steps >= self.last_step:
            raise ValueError(f"{warmup} must be fewer than {last}")
        if self.warmup_steps + self.decay_steps > self.last_step:
            raise ValueError(f"{warmup} and the decay, {self.decay_steps} step(s), are together more than {last}")

    def _epochs_are_of_one_dataset(self) -> None:
        """Refuse epochs of more than one dataset, and lengths that state the same again."""
        if self.data.stages or len(self.data.train) > 1:
            where = "data.stages names" if self.data.stages else "data.train names"
            raise ValueError(f"epochs={self.epochs:g} are of one dataset, and {where} {', '.join(self.data.train_paths)}; give steps or tokens")
        for name in ("tokens", "max_epochs"):
            if getattr(self.data.train[0], name) is not None:
                raise ValueError(f"epochs={self.epochs:g} and data.train.{name}={getattr(self.data.train[0], name)} state the same; give one of them")

    def _cuts_fit(self) -> None:
        """Refuse a layout that cannot cut this model or its sequences, with the nearest sizes that can."""
        model, parallel = self.model, self.parallel
        tp, pp, cp, ep = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel, parallel.expert_parallel
        experts = model.experts
        ffn = ("model.ffn_hidden_size", model.ffn_hidden_size) if experts is None else ("model.experts.ffn_hidden_size", experts.ffn_hidden_size)
        heads = {"model.num_heads": model.num_heads, "model.num_query_groups": model.num_query_groups}
        for name, size in (*heads.items(), ffn):
            if size % tp:
                common = math.gcd(*heads.values(), ffn[1])
                raise ValueError(f"parallel.tensor_parallel={tp} does not divide {name}={size}; it {_could_be(common, tp)}")
        chunks = pp * parallel.virtual_pipeline
        if model.num_layers % chunks:
            if parallel.virtual_pipeline > 1:
                product = f"parallel.pipeline_parallel={pp} x parallel.virtual_pipeline={parallel.virtual_pipeline} = {chunks}"
                raise ValueError(f"{product} does not divide model.num_layers={model.num_layers}; their product {_could_be(model.num_layers, chunks)}")
            raise ValueError(f"parallel.pipeline_parallel={pp} does not divide model.num_layers={model.num_layers}; it {_could_be(model.num_layers, pp)}")
        length = self.data.sequence_length
        pieces = (2 * cp if cp > 1 else 1) * (tp if parallel.sequence_parallel else 1)
        if length % pieces:
            why = [f"2 x parallel.context_parallel={cp}"] * (cp > 1) + [f"parallel.tensor_parallel={tp} with sequence_parallel"] * parallel.sequence_parallel
            nearest = f"{length // pieces * pieces} or {(length // pieces + 1) * pieces}" if length > pieces else str(pieces)
            raise ValueError(f"data.sequence_length={length} is not a multiple of {' x '.join(why)} = {pieces}; the nearest: {nearest}")
        if ep > 1 and experts is None:
            raise ValueError(f"parallel.expert_parallel={ep}, but the model has no experts; set model.experts, or expert_parallel=1")
        if experts is not None and experts.num_experts % ep:
            raise ValueError(
                f"parallel.expert_parallel={ep} does not divide model.experts.num_experts={experts.num_experts}; it {_could_be(experts.num_experts, ep)}"
            )
        if model.mtp_layers and model.tie_embeddings and pp > 1:
            # Its last stage has the embedding twice then, and cannot say so in a checkpoint; and with gradients added up by the products, megatron-core
            # drops the embedding's own there.
            raise ValueError("model.mtp_layers with model.tie_embeddings=true needs parallel.pipeline_parallel=1: megatron-core 0.16 cannot save it otherwise")
        if experts is not None and tp > 1 and not parallel.sequence_parallel:
            # megatron-core refuses it after all weights were made: the ranks would each route the same tokens.
            raise ValueError(f"parallel.tensor_parallel={tp} with model.experts needs parallel.sequence_parallel=true")


def _could_be(whole: int, wanted: int) -> str:
    """Say which sizes divide `whole`: the nearest ones to `wanted`."""
    fitting = [size for size in range(1, whole + 1) if whole % size == 0]
    below, above = [size for size in fitting if size < wanted][-2:], [size for size in fitting if size > wanted][:1]
    return f"could be {', '.join(map(str, below + above))}"
