"""The learning rate at every step: a pure function of the config."""

from __future__ import annotations

import math

from tpt_megatron.config.train import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of `step`, from 1 to the run's last.

    Linear warm-up, whose first step already learns and whose last has the full rate; then as config.optimizer.schedule says.
    """
    optimizer, last, warmup = config.optimizer, config.last_step, config.warmup_steps
    if step <= warmup:
        return optimizer.learning_rate * step / warmup
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    if optimizer.schedule == "wsd":
        before = last - config.decay_steps  # the last step at the full rate
        share = _left(optimizer.decay_shape, max(0, step - before) / config.decay_steps)
    else:
        share = _left(optimizer.schedule, (step - 1 - warmup) / max(1, last - 1 - warmup))
    return optimizer.min_learning_rate + share * (optimizer.learning_rate - optimizer.min_learning_rate)


def _left(shape: str, progress: float) -> float:
    """Return which share of the fall is still to come when `progress`, 0 to 1, of the way is gone."""
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - math.sqrt(progress) if shape == "sqrt" else 1 - progress
