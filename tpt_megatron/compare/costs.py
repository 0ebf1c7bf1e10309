"""What an arm's training tokens cost in all: FLOPs of training on them, and of writing the thoughts among them, once however often they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpt_megatron.compare.crossings import Floats
from tpt_megatron.errors import DataError
from tpt_megatron.files import read_json


@dataclass(frozen=True, slots=True)
class ArmCost:
    """FLOPs of an arm.

    train_flops      of training on one token
    epoch_tokens     of one pass through its data
    generator_flops  of writing all thoughts of these; 0 without thoughts
    """

    train_flops: float
    epoch_tokens: float
    generator_flops: float

    def __call__(self, tokens: Floats) -> Floats:
        """Return what training on so many tokens cost, from 0 to infinity."""
        return self.train_flops * tokens + self.generator_flops * np.minimum(tokens / self.epoch_tokens, 1.0)


def read_costs(plan: Path) -> dict[str, ArmCost]:
    """Read the costs of those arms of which `tpt experiment` knew all, from its plan.json. DataError where it is none, or is damaged."""
    described = read_json(plan)
    costs: dict[str, ArmCost] = {}
    try:
        for arm in described["arms"]:
            if arm["generator_flops"] is None:
                continue
            tokens, epochs = float(arm["tokens"]), float(arm["epochs"])
            costs[arm["arm"]] = ArmCost(float(arm["train_flops"]) / tokens, tokens / epochs, float(arm["generator_flops"]) / min(1.0, epochs))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise DataError(f"{plan}: not the plan.json that tpt experiment writes; give that one, or no --costs") from None
    return costs
