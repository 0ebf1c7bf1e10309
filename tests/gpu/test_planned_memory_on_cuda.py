"""What `tpt plan` says a GPU holds, against what CUDA's allocator had at its most in a step. Real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.launch.gpus import find_gpu

WORKER = Path(__file__).parents[1] / "distributed/held_worker.py"
MODEL = {"num_layers": 8, "hidden_size": 2048, "ffn_hidden_size": 5632, "num_heads": 16, "num_query_groups": 4, "vocab_size": 32_000}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    "changes", [{}, {"recompute": "full"}, {"fp8": "tensorwise"}, {"data": {"train": "unused", "sequence_length": 4096, "attention": "sequence"}}]
)
def test_a_gpu_holds_what_was_planned(changes: dict[str, Any], tmp_path: Path) -> None:
    """Within a tenth, and no more than what a plan leaves free: the formula is from reading, and this is the first to ask a GPU."""
    values = {
        "run_dir": "unused",
        "model": MODEL,
        "data": {"train": "unused", "sequence_length": 4096},
        "optimizer": {"learning_rate": 1e-4},
        "precision": "bf16",
        "steps": 1,
        "global_batch_sequences": 2,
        "micro_batch_sequences": 1,
        **changes,
    }
    (tmp_path / "job.json").write_text(json.dumps({"config": values, "output": str(tmp_path / "rank"), "save": None, "watch": False}))
    ended = subprocess.run([sys.executable, str(WORKER), str(tmp_path / "job.json")], capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    real = json.loads((tmp_path / "rank.0.json").read_text())
    check_config(TrainConfig, values, "job")
    (tmp_path / "train.json").write_text(json.dumps(values))
    command = [sys.executable, "-m", "tpt_megatron.cli", "plan", str(tmp_path / "train.json"), "--world-size", "1", "--gpu", "h200", "--json"]
    planned = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=400).stdout)
    (stage,) = planned["stages"]
    counted = {name: stage["held"][name] for name in ("parameters", "parameter_bytes", "gradient_bytes", "optimizer_bytes")}
    assert counted == {name: real[name] for name in counted}
    assert real["allocated"] == pytest.approx(stage["total"], rel=0.1)
    gpu = find_gpu("h200")
    assert real["allocated"] - stage["total"] < gpu.memory - gpu.usable
