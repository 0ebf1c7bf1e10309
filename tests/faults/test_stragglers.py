"""A rank that is slower than the others is found by the resiliency extension. Two real ranks, one of which is slowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.train_runs import preprocess_corpus, write_train_config
from tpt_megatron.config.watching import StragglerConfig
from tpt_megatron.errors import MachineError
from tpt_megatron.train.stragglers import Stragglers

STEPS = 6


def test_without_the_extension_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    with pytest.raises(MachineError, match=r"watch.stragglers needs nvidia-resiliency-ext .*pip install 'tpt-megatron\[resiliency\]'"):
        Stragglers(StragglerConfig(every_steps=1))
    assert Stragglers(None).compare(1) == {}


def test_the_slow_rank_of_two_is_named(tmp_path: Path) -> None:
    pytest.importorskip("nvidia_resiliency_ext")
    preprocess_corpus(tmp_path)
    config = write_train_config(tmp_path, tmp_path, steps=STEPS, watch={"stragglers": {"every_steps": 3, "threshold": 0.5}})
    slow_rank = Path(__file__).with_name("slow_rank.py")
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
