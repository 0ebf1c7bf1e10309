"""Config of the layout: how a model and its data are spread over ranks."""

from __future__ import annotations

from typing import Self

from pydantic import PositiveInt, model_validator

from tpt_megatron.config.load import Config
from tpt_megatron.errors import ConfigError


class ParallelConfig(Config):
    """Ranks along each axis; the data-parallel size is what is left of the world.

    virtual_pipeline       chunks of layers a pipeline stage has (interleaved schedule); 1: one
    expert_parallel        ranks that share a layer's experts; they are taken from the data-parallel ones (and context-parallel ones)
    sequence_parallel      norms and residuals, too, are cut along the sequence among tensor-parallel ranks
    distributed_optimizer  optimizer state is cut among data-parallel ranks
    overlap_grad_reduce    gradients are reduced while others are still computed
    overlap_param_gather   parameters are gathered while the first layers compute already
    """

    tensor_parallel: PositiveInt = 1
    pipeline_parallel: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    context_parallel: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model, and of one batch."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @model_validator(mode="after")
    def _axes_fit(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError("sequence_parallel=true needs tensor_parallel of at least 2")
        if self.virtual_pipeline > 1 and self.pipeline_parallel == 1:
            raise ValueError(f"virtual_pipeline={self.virtual_pipeline} needs pipeline_parallel of at least 2")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather=true needs distributed_optimizer=true and overlap_grad_reduce=true")
        return self


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a world that the layout does not divide (ConfigError)."""
    axes = [f"parallel.{name}={size}" for name in ("tensor_parallel", "pipeline_parallel", "context_parallel") if (size := getattr(parallel, name)) > 1]
    unit = parallel.model_ranks
    if world_size % unit:
        more = (world_size // unit + 1) * unit
        fits = f"{world_size // unit * unit} or {more}" if world_size > unit else str(more)
        product = f"{' x '.join(axes)} = {unit}" if len(axes) > 1 else axes[0]
        raise ConfigError(
            f"{product} does not divide the {world_size} rank(s) of this job; start it with {fits} (torchrun --nproc-per-node {more} ...) or change the layout"
        )
    # Experts are spread over all ranks of a pipeline stage, tensor-parallel ones apart.
    places = world_size // (parallel.tensor_parallel * parallel.pipeline_parallel)
    if places % parallel.expert_parallel:
        fitting = [size for size in range(1, places + 1) if places % size == 0]
        raise ConfigError(
            f"parallel.expert_parallel={parallel.expert_parallel} does not divide the {places} rank(s) that share a pipeline stage's layers "
            f"(data parallel x context parallel); it could be {', '.join(map(str, fitting))}"
        )
