"""Config of what a run shows of itself, and of what it does when something goes wrong."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.load import Config


class WandbConfig(Config):
    """Weights & Biases; mode=offline writes to run_dir/wandb, for `wandb sync` later."""

    project: str
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class ProfileConfig(Config):
    """A trace of some steps by torch's profiler, for Perfetto or chrome://tracing, in run_dir/profile; on CUDA also NVTX ranges for nsys.

    first_step, steps  what is traced
    ranks              which ranks write one
    """

    first_step: PositiveInt
    steps: PositiveInt = 2
    ranks: tuple[int, ...] = (0,)


class StragglerConfig(Config):
    """Ranks that are slower than the others, found by NVIDIA's resiliency extension.

    every_steps  how often the ranks' forward passes are compared, by the median of those since
    threshold    ranks whose speed is less than so much of the fastest rank's are named in the log
    """

    every_steps: PositiveInt
    threshold: float = Field(0.7, gt=0, lt=1)


class WatchConfig(Config):
    """What a run shows of itself. metrics.jsonl is written always.

    log_every_steps   a line in the log, from one rank
    stragglers        ranks that are slower than the others; needs tpt-megatron[resiliency]
    peak_tflops       of one GPU, for the model FLOP/s utilisation, where the chip is none of those known
    """

    log_every_steps: PositiveInt = 1
    tensorboard: bool = False
    wandb: WandbConfig | None = None
    profile: ProfileConfig | None = None
    stragglers: StragglerConfig | None = None
    peak_tflops: PositiveFloat | None = None


class FaultConfig(Config):
    """What a run does when something goes wrong.

    spike_factor      a step whose gradient norm is more than so many times the median of the last 100 is skipped like one that is not
                      finite: nothing is learned from it, and its documents are recorded in skipped.jsonl; none: no limit
    skips_in_a_row    after so many the run goes back to its last checkpoint and goes on with later data
    rollbacks         how often it may do that in one session; then it ends
    stall_seconds     a rank that takes so long for one step writes all its stacks to run_dir/stalls and ends the job; 0: never
    """

    spike_factor: float | None = Field(None, gt=1)
    skips_in_a_row: PositiveInt = 3
    rollbacks: int = Field(1, ge=0)
    stall_seconds: float = Field(1800, ge=0)

    @model_validator(mode="after")
    def _stall_is_no_step(self) -> Self:
        if 0 < self.stall_seconds < 1:
            raise ValueError(f"stall_seconds={self.stall_seconds} is less than a step may take; give seconds, or 0 for never")
        return self
