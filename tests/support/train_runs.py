"""What tests of the trainer train on, and how: a small corpus with thoughts, and a run of a tiny model on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def preprocess_corpus(root: Path, name: str = "datasets", seed: int = 1) -> None:
    """Make the dataset `root/NAME/append/train` of 400 documents; another seed makes another corpus."""
    texts = [{"text": f"document {i * seed} says {i % 7}", "thoughts": [{"text": f"{i} mod 7 is {i % 7}", "generator": "g"}]} for i in range(400)]
    (root / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (root / f"{name}.yaml").write_text(f"input: {root}/{name}.jsonl\noutput: {root}/{name}\ntokenizer: byte\narms: [append]\n")
    subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(root / f"{name}.yaml")], check=True, capture_output=True)


def write_train_config(folder: Path, datasets: Path, **changes: Any) -> Path:
    """Write the config of a run in `folder/run` on `datasets/datasets/append/train`, and return its path."""
    config = {
        "run_dir": str(folder / "run"),
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2},
        "data": {"train": str(datasets / "datasets" / "append" / "train"), "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-3},
        "global_batch_sequences": 4,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path
