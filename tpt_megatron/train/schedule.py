"""The learning rate at every step: a pure function of the config."""

from __future__ import annotations

import math

from tpt_megatron.config.train import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of `step` (from 0) of `steps`.

    Linear warm-up over warmup_steps, whose first step already learns; then constant, or from learning_rate down to
    min_learning_rate at the last step along a cosine or a line.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.min_learning_rate + share * (config.learning_rate - config.min_learning_rate)
