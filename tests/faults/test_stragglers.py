"""A rank that is slower than the others is found by the resiliency extension. Two real ranks, one of which is slowed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tpt_megatron.config.watching import StragglerConfig
from tpt_megatron.errors import MachineError
from tpt_megatron.train.stragglers import Stragglers

STEPS = 6


def test_without_the_extension_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(MachineError, match=r"watch.stragglers needs nvidia-resiliency-ext .*pip install 'tpt-megatron\[resiliency\]'"):
        Stragglers(StragglerConfig(every_steps=1))
    assert Stragglers(None).compare(1) == {}


def write_config(folder: Path) -> Path:
    thoughts = [{"text": f"document {i} says {i % 7}", "thoughts": [{"text": f"{i} mod 7 is {i % 7}", "generator": "g"}]} for i in range(400)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in thoughts))
    (folder / "preprocess.yaml").write_text(f"input: {folder}/documents.jsonl\noutput: {folder}/data\ntokenizer: byte\narms: [append]\n")
    subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(folder / "preprocess.yaml")], check=True, capture_output=True)
    config: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2},
        "data": {"train": str(folder / "data/append/train"), "sequence_length": 32},
        "optimizer": {"learning_rate": 1e-3},
        "steps": STEPS,
        "global_batch_sequences": 4,
        "watch": {"stragglers": {"every_steps": 3, "threshold": 0.5}},
    }
    (folder / "train.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "train.yaml"


def test_the_slow_rank_of_two_is_named(tmp_path: Path) -> None:
    pytest.importorskip("nvidia_resiliency_ext")
    config, slow_rank = write_config(tmp_path), Path(__file__).with_name("slow_rank.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(slow_rank), "train", str(config)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    compared = {line["step"]: (line["slowest_rank"], line["slowest_rank_speed"]) for line in lines if "slowest_rank" in line}
    assert sorted(compared) == [3, 6]
    rank, speed = compared[6]
    assert rank == 1
    assert speed < 0.5
    assert f"step 6: slower than 0.5 of the fastest rank's speed: rank 1 at {speed:.2f}" in ended.stderr
