"""Config of when checkpoints are written, which are kept, and what a run starts from."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tpt_megatron.config.load import Config


class CheckpointConfig(Config):
    """When checkpoints are written, which are kept, and what a run starts from. docs/train.md tells the whole of it.

    every_steps       one every so many steps, and one at the end; 0: only at the end
    asynchronous      written by other processes while training goes on, at the price of memory for what changes meanwhile
    keep_last         how many of the latest are kept, at least 2; 0: all of them
    keep_every_steps  besides, those of every so many steps, for ever
    keep_best         besides, so many with the lowest validation_loss
    mirror            where every checkpoint is copied to behind training's back, and fetched from on a machine that has none: a folder or a URL
                      of object storage, such as s3://bucket/runs/append
    load_from         an iter_ folder that a new run starts from, or a folder of these, of which it is the latest; or the URL of either
    load              what is taken from it: the weights, with a fresh optimizer, or the optimizer's state too
    """

    every_steps: int = Field(0, ge=0)
    asynchronous: bool = False
    keep_last: int = Field(0, ge=0)
    keep_every_steps: int = Field(0, ge=0)
    keep_best: int = Field(0, ge=0)
    mirror: str | None = None
    load_from: str | None = None
    load: Literal["weights", "all"] = "all"

    @model_validator(mode="after")
    def _rules_have_effect(self) -> Self:
        if self.keep_last == 1:
            raise ValueError("checkpoint.keep_last=1 would delete a checkpoint that another process may be continuing from; it could be 2, or 0 to keep all")
        for name in ("keep_every_steps", "keep_best"):
            if getattr(self, name) and not self.keep_last:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} has no effect, since checkpoint.keep_last=0 keeps all; set keep_last=2 or more")
        if self.keep_every_steps and (not self.every_steps or self.keep_every_steps % self.every_steps):
            raise ValueError(
                f"checkpoint.keep_every_steps={self.keep_every_steps} is not a multiple of checkpoint.every_steps={self.every_steps}: "
                "there would be no checkpoints of those steps to keep"
            )
        if self.load == "weights" and self.load_from is None:
            raise ValueError("checkpoint.load=weights says what to take, but checkpoint.load_from names no checkpoint to take it from")
        return self
