"""Config of the optimizer and its learning-rate schedule."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.load import Config


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule; lengths in steps or in tokens, which are the same where batches do not grow.

    schedule                   after the warm-up: constant; cosine or linear, which fall to min_learning_rate at the last step; or wsd (warm-up,
                               stable, decay), which stays and falls over the last decay_steps or decay_tokens
    warmup_steps, _tokens      the rate rises from 0 in a line; its first step already learns
    decay_steps, _tokens       of wsd alone
    decay_shape                of wsd: linear, cosine, or sqrt (1 - the square root of how far the decay is)
    weight_decay               of matrices, embeddings among them; norms and biases have none
    clip_gradient_norm         0: none
    """

    learning_rate: PositiveFloat
    min_learning_rate: float = Field(0.0, ge=0)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    warmup_tokens: PositiveInt | None = None
    decay_steps: PositiveInt | None = None
    decay_tokens: PositiveInt | None = None
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    clip_gradient_norm: float = Field(1.0, ge=0)

    @model_validator(mode="after")
    def _lengths_are_stated_once(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is larger than learning_rate={self.learning_rate}")
        if self.min_learning_rate and self.schedule == "constant":
            raise ValueError(f"min_learning_rate={self.min_learning_rate} has no effect with schedule=constant; set cosine, linear or wsd, or leave it out")
        if self.warmup_steps and self.warmup_tokens is not None:
            raise ValueError("warmup_steps and warmup_tokens state the same; give one of them")
        given = [name for name in ("decay_steps", "decay_tokens") if getattr(self, name) is not None]
        if self.schedule == "wsd" and len(given) != 1:
            raise ValueError(f"schedule=wsd needs decay_steps or decay_tokens, one of them; {'both' if given else 'neither'} is given")
        if self.schedule != "wsd" and (given or self.decay_shape != "linear"):
            raise ValueError(f"{given[0] if given else 'decay_shape'} is for schedule=wsd, not for schedule={self.schedule}")
        return self
