"""Config of `tpt train`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.checkpoint import CheckpointConfig
from tpt_megatron.config.data import DataConfig
from tpt_megatron.config.load import Config
from tpt_megatron.config.model import ModelConfig
from tpt_megatron.config.parallel import ParallelConfig


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule; every length in steps."""

    learning_rate: PositiveFloat
    min_learning_rate: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    clip_gradient_norm: float = Field(1.0, ge=0)


class TrainConfig(Config):
    """One pretraining run.

    run_dir                 metrics.jsonl, run.json and checkpoints/ go there; a run that is found there is continued
    steps                   optimizer steps in all
    global_batch_sequences  sequences a step, over all ranks
    micro_batch_sequences   sequences a forward pass on one rank
    precision               fp32 or bf16 (about 20 times slower than fp32 on a CPU)
    recompute               what is computed anew in the backward pass to save memory: nothing, core attention (selective), or whole layers (full)
    """

    run_dir: Path
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: PositiveInt
    global_batch_sequences: PositiveInt
    micro_batch_sequences: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    seed: int = Field(1234, ge=0)
    validate_every_steps: int = Field(0, ge=0)
    validation_batches: PositiveInt = 1

    @model_validator(mode="after")
    def _layout_fits_model(self) -> Self:
        self._cuts_fit()
        if self.validate_every_steps and self.data.validation is None:
            raise ValueError("validate_every_steps is set but data.validation names no dataset")
        if self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be fewer than steps={self.steps}")
        return self

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
                raise ValueError(f"parallel.tensor_parallel={tp} does not divide {name}={size}; {_could_be(common, tp)}")
        chunks = pp * parallel.virtual_pipeline
        if model.num_layers % chunks:
            if parallel.virtual_pipeline > 1:
                product = f"parallel.pipeline_parallel={pp} x parallel.virtual_pipeline={parallel.virtual_pipeline} = {chunks}"
                raise ValueError(f"{product} does not divide model.num_layers={model.num_layers}; their product {_could_be(model.num_layers, chunks)}")
            raise ValueError(f"parallel.pipeline_parallel={pp} does not divide model.num_layers={model.num_layers}; {_could_be(model.num_layers, pp)}")
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
                f"parallel.expert_parallel={ep} does not divide model.experts.num_experts={experts.num_experts}; {_could_be(experts.num_experts, ep)}"
            )
        if experts is not None and tp > 1 and not parallel.sequence_parallel:
            # megatron-core refuses it after all weights were made: the ranks would each route the same tokens.
            raise ValueError(f"parallel.tensor_parallel={tp} with model.experts needs parallel.sequence_parallel=true")


def _could_be(whole: int, wanted: int) -> str:
    """Say which sizes divide `whole`: the nearest ones to `wanted`."""
    fitting = [size for size in range(1, whole + 1) if whole % size == 0]
    below, above = [size for size in fitting if size < wanted][-2:], [size for size in fitting if size > wanted][:1]
    return f"it could be {', '.join(map(str, below + above))}"
