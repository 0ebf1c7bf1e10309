"""A model that the engine trained and saved, and the same as transformers reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parents[1] / "end_to_end/export_worker.py"


def train_and_save(folder: Path, **changes: Any) -> float:
    """Train and save in `folder/checkpoints`, with this in the config, and return the loss that the engine then has."""
    command = [sys.executable, str(WORKER), str(folder), json.dumps(changes)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-3000:]
    return float(json.loads((folder / "theirs.json").read_text())["loss"])


def loss_of_export(folder: Path) -> tuple[float, Any]:
    """Export what was saved to `folder/model`, and return the loss, on the same tokens, of transformers' model in fp32, and the model."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from tpt_megatron.convert.export import export_checkpoint

    export_checkpoint(folder / "checkpoints", folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    rows = torch.tensor(json.loads((folder / "theirs.json").read_text())["rows"])
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    assert logits.size(-1) == model.config.vocab_size
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item(), model
