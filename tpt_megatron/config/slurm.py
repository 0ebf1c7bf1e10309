"""What configs that speak to Slurm have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _quoted(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(f'YAML read a number, {value}; put the time in quotes: time: "24:00:00"')
    return value


SlurmTime = Annotated[str, BeforeValidator(_quoted)]
"""A time limit as sbatch takes it. YAML reads 24:00:00 without quotes as a number, of seconds."""
