"""Reading metrics.jsonl of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURED = ("tokens_per_second", "tokens_per_second_per_gpu", "model_tflops_per_gpu", "mfu", "memory_gb")


def learned(run: Path) -> list[dict[str, Any]]:
    """Return each step's metrics without what depends on the machine's speed: what two runs of the same must have in common."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in MEASURED and not key.endswith("_time_s")} for line in lines]
