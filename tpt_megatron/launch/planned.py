"""The config of a run that is planned before all of it is there. Needs no torch: a mistake is told at once."""

from __future__ import annotations

from collections.abc import Sequence

from tpt_megatron.config.load import check_config, read_values
from tpt_megatron.config.train import TrainConfig

NOT_YET = "not-there-yet"
"""Stands for what a recipe leaves to the user: what a run takes does not depend on it."""


def planned_config(name: str, overrides: Sequence[str]) -> TrainConfig:
    """Return the training config of a file or recipe. One that leaves run folder, data or the checkpoint to start from to the user is one, too."""
    values, origin = read_values(name, overrides)
    values.setdefault("run_dir", NOT_YET)
    data, checkpoint = values.setdefault("data", {}), values.get("checkpoint")
    if isinstance(data, dict):
        if not {"train", "stages"} & data.keys():
            data["train"] = NOT_YET
        if values.get("validate_every_steps"):
            data.setdefault("validation", NOT_YET)
    if isinstance(checkpoint, dict) and "load" in checkpoint:
        checkpoint.setdefault("load_from", NOT_YET)
    return check_config(TrainConfig, values, origin)
