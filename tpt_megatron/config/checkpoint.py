"""Config of when checkpoints are written, and what a run starts from."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tpt_megatron.config.load import Config


class CheckpointConfig(Config):
    """When checkpoints are written: every so many steps, and at the end; every_steps 0 means only at the end.

    load_from  an iter_ folder whose weights and optimizer state a new run starts from
    """

    every_steps: int = Field(0, ge=0)
    load_from: Path | None = None
