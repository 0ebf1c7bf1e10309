"""What configs that speak to Slurm have in common."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def _quoted(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError(f'YAML read a number, {value}; put the time in quotes: time: "24:00:00"')
    return value


def _time(text: str) -> str:
    if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-5]?[0-9]){0,2}", text):
        raise ValueError(
            f"{text!r} is no time of Slurm's; write minutes, minutes:seconds, hours:minutes:seconds, "
            "days-hours, days-hours:minutes or days-hours:minutes:seconds; 0 sets no limit"
        )
    return text


SlurmTime = Annotated[str, AfterValidator(_time), BeforeValidator(_quoted)]
"""A time limit in the ways that sbatch's manual has. YAML reads 24:00:00 without quotes as a number, of seconds."""


def seconds_of(time: SlurmTime) -> int:
    """Return a time limit in seconds; 0 where there is none."""
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    first_is_hours = dash or len(numbers) == 3
    units = (3600, 60, 1) if first_is_hours else (60, 1)
    return int(days or 0) * 86_400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))
