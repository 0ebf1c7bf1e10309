"""Twenty SIGKILLs of one run of two ranks, a third of them within saves. It ends with the unbroken run's bits. Real processes."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.metrics import learned
from tests.support.ranks import WarmRanks, end
from tests.support.tensors import assert_same_tensors
from tpt_megatron.checkpoints import damages, finished_steps, iteration_folder, latest_step, read_checksums

GROUP_KILLS, RANK_KILLS = 16, 4
TRAINING_S, SAVING_S = 2.0, 0.15
"""How long after a start, or after a save was seen to begin, a kill comes at most."""


class Run:
    """One run folder: starts of it, and kills."""

    def __init__(self, folder: Path, datasets: Path) -> None:
        self.folder, self.checkpoints = folder / "run", folder / "run" / "checkpoints"
        self.config = folder / "train.yaml"
        config = {
            "run_dir": str(self.folder),
            "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2},
            "data": {"train": str(datasets / "datasets" / "append" / "train"), "sequence_length": 32},
            "optimizer": {"learning_rate": 1e-3},
            "steps": 100_000,  # never reached: every start but the last is killed
            "global_batch_sequences": 4,
            "checkpoint": {"every_steps": 2, "keep_last": 3},
        }
        folder.mkdir(exist_ok=True)
        self.config.write_text(json.dumps(config))  # JSON is YAML
        self.kills = self.within_saves = self.writers_seen = 0

    def torchrun(self, *overrides: str, restarts: int) -> subprocess.Popen[bytes]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
        command = [*torchrun, "-m", "tpt_megatron.cli", "train", str(self.config), *overrides]
        with open(self.folder.parent.parent / "stderr", "ab") as stderr:
            return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=stderr, stderr=stderr)

    def said(self) -> str:
        return (self.folder.parent.parent / "stderr").read_text(errors="replace")[-4000:]

    def sessions(self) -> int:
        path = self.folder / "run.json"
        return len(json.loads(path.read_text())["sessions"]) if path.exists() else 0

    def wait_for_moment(self, process: psutil.Process, sessions: int) -> None:
        """Return at a moment to kill: of any kind, or while a save is under way, in every third round."""
        self.wait_until(process, lambda: self.sessions() > sessions)
        if self.kills % 3 == 0:
            self.wait_until(process, lambda: any(self.checkpoints.glob(".iter_*.tmp")))
            time.sleep(random.uniform(0, SAVING_S))
        else:
            time.sleep(random.uniform(0, TRAINING_S))

    def wait_until(self, process: psutil.Process, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)

    def kill(self, trainers: list[psutil.Process], others: Sequence[psutil.Process] = ()) -> None:
        """Kill these, and see that the writers of checkpoints that they forked die with them, without being killed. `others` end by themselves."""
        writers = [child for trainer in trainers for child in trainer.children(recursive=True)]
        for trainer in trainers:
            trainer.kill()
        self.kills += 1
        self.writers_seen += len(writers)
        _, alive = psutil.wait_procs([*writers, *trainers], timeout=2)
        assert not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE], "a writer outlived its trainer"
        _, alive = psutil.wait_procs(others, timeout=60)
        assert not alive, "the other rank did not end"
        self.within_saves += any(self.checkpoints.glob(".iter_*.tmp"))
        for step in finished_steps(self.checkpoints):
            folder = iteration_folder(self.checkpoints, step)
            assert damages(folder, read_checksums(folder) or pytest.fail(f"{folder} has no checksums")) == []

    def metrics(self) -> list[dict[str, Any]]:
        return learned(self.folder)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    thoughts = [{"text": f"document {i} says {i % 7}", "thoughts": [{"text": f"{i} mod 7 is {i % 7}", "generator": "g"}]} for i in range(2000)]
    (root / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in thoughts))
    (root / "preprocess.yaml").write_text(f"input: {root}/documents.jsonl\noutput: {root}/datasets\ntokenizer: byte\narms: [append]\n")
    subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(root / "preprocess.yaml")], check=True, capture_output=True)
    return root


@pytest.mark.slow
def test_twenty_kills_change_no_bit(tmp_path: Path, datasets: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)  # of the moments, as far as they are ours to choose
    random.seed(seed)
    run, unbroken = Run(tmp_path / "killed", datasets), Run(tmp_path / "unbroken", datasets)
    with WarmRanks(tmp_path) as warm:
        for number in range(GROUP_KILLS):  # all ranks at once
            sessions = run.sessions()
            ranks = warm.start("train", str(run.config), f"checkpoint.asynchronous={'true' if number % 2 else 'false'}")
            run.wait_for_moment(ranks[0], sessions)
            run.kill(ranks)
        kill_single_ranks(run)
        last = (latest_step(run.checkpoints) or 0) + 3
        for one, overrides in ((run, ()), (unbroken, ("checkpoint.every_steps=0",))):
            psutil.wait_procs(warm.start("train", str(one.config), f"steps={last}", *overrides), timeout=120)
            assert latest_step(one.checkpoints) == last, one.said()
    print(f"{run.kills} kills, {run.within_saves} within saves, {run.writers_seen} writers died with them, {run.sessions()} starts, {last} steps")
    assert run.kills == 20
    assert run.within_saves >= 6
    assert run.metrics() == unbroken.metrics()
    assert_same_tensors(run.folder, unbroken.folder)
    assert not list(run.checkpoints.glob(".*"))


def test_ranks_end_with_their_torchrun(tmp_path: Path, datasets: Path) -> None:
    run = Run(tmp_path / "orphaned", datasets)
    torchrun = run.torchrun(restarts=0)
    agent = psutil.Process(torchrun.pid)
    ranks: list[psutil.Process] = []
    try:
        run.wait_until(agent, lambda: run.sessions() > 0)
        ranks = agent.children()
        torchrun.kill()
        _, alive = psutil.wait_procs(ranks, timeout=20)
        assert not alive, "they train on"
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.kill()
        end(torchrun)


def kill_single_ranks(run: Run) -> None:
    """Kill one rank of two, again and again, while torchrun starts both again by itself."""
    sessions, torchrun = run.sessions(), run.torchrun("checkpoint.asynchronous=true", restarts=RANK_KILLS)
    try:
        agent = psutil.Process(torchrun.pid)
        for number in range(RANK_KILLS):
            run.wait_for_moment(agent, sessions + number)
            first, second = random.sample(agent.children(), 2)
            run.kill([first], [second])
        run.wait_until(agent, lambda: run.sessions() > sessions + RANK_KILLS)
    finally:
        end(torchrun)
