"""Whether a document sees those before it in its sequence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parents[1] / "distributed/leak_worker.py"


def losses_before_and_after(folder: Path, attention: str, **changes: Any) -> tuple[list[float], list[float]]:
    """Return the summed losses of three documents of each sequence, as they are, and with other tokens in the first one; labels stay."""
    values = {
        "run_dir": "unused",
        "model": {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 384, "num_heads": 4, "num_query_groups": 2, "vocab_size": 250},
        "data": {"train": "unused", "sequence_length": 64, "attention": attention},
        "optimizer": {"learning_rate": 1e-3},
        "steps": 1,
        "global_batch_sequences": 2,
        "micro_batch_sequences": 2,
        **changes,
    }
    command = [sys.executable, str(WORKER), json.dumps(values), str(folder / "losses.json")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-3000:]
    before, after = json.loads((folder / "losses.json").read_text())
    return before, after
