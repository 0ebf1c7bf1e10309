"""Run folders as the trainer and the evaluation leave them, with made-up numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SETTINGS: dict[str, Any] = {"limit": 0, "problems": {"name": "p.jsonl", "sha256": "0"}, "tasks": {"sums": {"prompt": "{problem}", "max_new_tokens": 2}}}


def write_run(
    folder: Path, arm: str | None, seed: int, scores: Sequence[tuple[int, float]] = (), *, parts: bool = False, settings: dict[str, Any] | None = None
) -> Path:
    """Write a run whose checkpoint after so many tokens has so much accuracy on the task `direct`."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"seed": seed}, "arm": arm, "world_size": 1}))
    steps = []
    for step in range(1, 101):
        row = {"step": step, "tokens_seen": step * 1000, "loss": 4.0 / step**0.3 + 0.05 * ((step * 7 + seed) % 5), "gradient_norm": 1.0}
        row |= {"validation_loss": row["loss"] + 0.1} if step % 10 == 0 else {}
        row |= {"loss_document": row["loss"], "loss_thinking": row["loss"] / 2} if parts else {}
        steps.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    for tokens, accuracy in scores:
        (folder / "evaluation").mkdir(exist_ok=True)
        result = {
            "model": "m",
            "step": tokens // 1000,
            "tokens_seen": tokens,
            "arm": arm,
            "problems": 200,
            "tasks": {"direct": {"accuracy": accuracy, "correct": round(200 * accuracy), "failed_extractions": 0, "mean_new_tokens": 10.0 + 20 * accuracy}},
            "settings": {**SETTINGS, "weights": str(folder), **(settings or {})},
        }
        (folder / "evaluation" / f"iter_{tokens // 1000:07d}.json").write_text(json.dumps(result))
    return folder
