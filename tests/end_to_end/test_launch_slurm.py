"""`tpt launch slurm` on a real Slurm: a controller and two node daemons on this machine, which run, preempt and requeue a tiny run of two nodes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.augment_runs import output_of
from tests.support.metrics import learned
from tests.support.ranks import WarmRanks
from tests.support.slurm import Cluster, running_slurm
from tests.support.tensors import assert_same_tensors
from tests.support.train_runs import preprocess_corpus, write_train_config

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="Slurm is not installed (Debian: tests/support/packages.sh)"),
]
STEPS = 150
PREEMPTING = (
    "PreemptType=preempt/partition_prio",
    "PreemptMode=REQUEUE",
    # A job that goes back to the queue waits until what it was started with has expired, two minutes by default.
    "AuthInfo=cred_expire=5",
    "SchedulerParameters=sched_interval=2",
    "PartitionName=low Nodes=n1,n2 PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE State=UP",
    "PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_slurm(extra=PREEMPTING) as cluster, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        yield cluster


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    preprocess_corpus(root)
    return root


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, datasets: Path, warm_ranks: WarmRanks) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    ended = warm_ranks.run("train", str(config(folder, datasets)), ranks=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / "run"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that jobs are submitted from; its name has a space."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def config(folder: Path, datasets: Path, **changes: Any) -> Path:
    return write_train_config(folder, datasets, **{"steps": STEPS, "checkpoint": {"every_steps": 25, "keep_last": 2}, **changes})


class Run:
    """A job, and what is seen of it."""

    def __init__(self, cluster: Cluster, folder: Path, config: Path, nodes: int = 2, **slurm: Any) -> None:
        self._cluster, self._folder = cluster, folder
        options = {"device": "cpu", "logs": "my logs", "backoff_s": 1, "stop_s": 30, "slurm": {"partition": "low", **slurm}}
        words = [
            "launch",
            "slurm",
            str(config),
            f"--nodes={nodes}",
            "--gpus-per-node=1",
            *(f"launch.{key}={json.dumps(value)}" for key, value in options.items()),
        ]
        ended = subprocess.run([sys.executable, "-m", "tpt_megatron.cli", *words], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        submitted = re.fullmatch(rf"Slurm job (\d+): {nodes} node\(s\) of 1 rank\(s\); logs: my logs/\1\.out, my logs/\1/\n", ended.stdout)
        assert submitted, ended.stdout
        self.job = submitted.group(1)
        self.logs = folder / "my logs" / self.job

    def said(self) -> str:
        path = self.logs.with_suffix(".out")
        return path.read_text() if path.exists() else ""

    def steps(self) -> int:
        metrics = self._folder / "run" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def until(self, condition: Callable[[], Any], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{self._cluster.ask('squeue')}\n{self.said()[-5000:]}"
            time.sleep(0.1)

    def shown(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S*)", self._cluster.ask("scontrol", "--oneliner", "show", "job", self.job))
        assert found
        return found.group(1)

    def ended(self) -> tuple[str, str]:
        """Wait for its end; return state and exit code."""
        self.until(lambda: not self._cluster.ask("squeue", "--noheader", "--jobs", self.job).strip(), timeout_s=240)
        return self.shown("JobState"), self.shown("ExitCode")

    def attempts(self) -> list[str]:
        return sorted(path.parent.name for path in self.logs.glob("attempt_*/rank_0.log"))


def test_a_preempted_run_saves_goes_back_to_the_queue_and_ends_with_the_unbroken_runs_bits(
    cluster: Cluster, folder: Path, datasets: Path, unbroken: Path
) -> None:
    run = Run(cluster, folder, config(folder, datasets))
    run.until(lambda: run.steps() >= 30)
    preempting = cluster.ask("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1").strip()
    run.until(lambda: "the job goes back to the queue (requeue 1 of at most 100)" in run.said())
    assert 30 <= run.steps() < STEPS
    assert run.ended() == ("COMPLETED", "0:0")
    assert preempting and run.shown("Restarts") == "1"
    assert run.attempts() == ["attempt_1", "attempt_2"]
    assert "stopped by a signal after saving step" in (run.logs / "attempt_1/rank_1.log").read_text()
    assert "continuing after step" in (run.logs / "attempt_2/rank_0.log").read_text()
    assert run.said().count("this node's ranks stopped by a signal after saving") == 2, "each node ends as its ranks did"
    assert learned(folder / "run") == learned(unbroken)
    assert_same_tensors(folder / "run", unbroken)


def test_a_rank_that_is_killed_has_all_started_again_in_the_same_job(cluster: Cluster, folder: Path, datasets: Path, unbroken: Path) -> None:
    run = Run(cluster, folder, config(folder, datasets))
    run.until(lambda: run.steps() >= 30)
    ranks = [process for process in psutil.process_iter(["cmdline"]) if f"{run.logs}/attempt_1" in (process.info["cmdline"] or ())]
    assert len(ranks) == 2
    ranks[1].kill()
    assert run.ended() == ("COMPLETED", "0:0")
    assert run.shown("Restarts") == "0"
    assert run.attempts() == ["attempt_1", "attempt_2"]
    assert re.search(r"^tpt launch: ranks failed \(exit code 137\); start 1 of max_restarts=3 in 1 s$", run.said(), re.MULTILINE), run.said()
    assert re.search(r"^tpt launch: rank [01] was killed by SIGKILL; ", run.said(), re.MULTILINE), run.said()
    assert learned(folder / "run") == learned(unbroken)
    assert_same_tensors(folder / "run", unbroken)


def test_a_run_that_is_asked_to_end_saves_and_does_not_come_back(cluster: Cluster, folder: Path, datasets: Path) -> None:
    run = Run(cluster, folder, config(folder, datasets, steps=100_000))
    run.until(lambda: run.steps() >= 3)
    cluster.ask("scancel", "--batch", "--signal=TERM", run.job)
    assert run.ended() == ("FAILED", "3:0")
    assert run.shown("Restarts") == "0"
    assert int((folder / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()) == run.steps()


def test_a_cancelled_run_saves_in_the_time_that_slurm_leaves_it(cluster: Cluster, folder: Path, datasets: Path) -> None:
    run = Run(cluster, folder, config(folder, datasets, steps=100_000, checkpoint={}))
    run.until(lambda: run.steps() >= 3)
    cluster.ask("scancel", run.job)
    assert run.ended()[0] == "CANCELLED"
    run.until(lambda: "stopped by a signal after saving" in (run.logs / "attempt_1/rank_0.log").read_text())
    assert int((folder / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()) == run.steps()


def test_a_bad_node_is_named_excluded_and_the_job_goes_elsewhere(cluster: Cluster, folder: Path, datasets: Path) -> None:
    check = '[ "$SLURMD_NODENAME" != n1 ] || { echo hm; echo "GPU 3 has fallen off the bus"; exit 1; }'
    run = Run(cluster, folder, config(folder, datasets, steps=2), nodes=1, health_check=check)
    run.until(lambda: run.said().count("\n") >= 2)
    assert run.said().splitlines()[:2] == [
        "tpt launch: bad node n1: GPU 3 has fallen off the bus",
        "tpt launch: excluding bad nodes; the job goes back to the queue (requeue 1 of at most 100)",
    ]
    assert run.ended() == ("COMPLETED", "0:0")
    assert (run.shown("ExcNodeList"), run.shown("NodeList")) == ("n1", "n2")
    assert run.steps() == 2


def test_a_config_that_ranks_refuse_is_not_started_again(cluster: Cluster, folder: Path, datasets: Path) -> None:
    data = {"train": str(datasets / "datasets" / "append" / "train"), "sequence_length": 32}
    run = Run(cluster, folder, config(folder, datasets, data=data, model={"preset": "cpu-small", "vocab_size": 16}))
    assert run.ended() == ("FAILED", "2:0")
    assert run.attempts() == ["attempt_1"]
    assert re.search(r"^tpt launch: rank [01] ended with exit code 2; .*rank_[01]\.log: tpt: model\.vocab_size=16 is smaller", run.said(), re.MULTILINE), (
        run.said()
    )


def test_preprocess_is_an_array_of_shards_and_a_job_that_joins_them(cluster: Cluster, folder: Path, datasets: Path) -> None:
    stated = f"input: {datasets}/datasets.jsonl\noutput: my data\ntokenizer: byte\narms: [append]\npiece_megabytes: 0.01\n"
    Path("preprocess.yaml").write_text(stated)
    words = ["launch", "slurm", "preprocess.yaml", "--nodes=2", "launch.device=cpu", "launch.logs=my logs", "launch.slurm.cpus_per_task=1"]
    ended = subprocess.run([sys.executable, "-m", "tpt_megatron.cli", *words], capture_output=True, text=True, check=False)
    submitted = re.fullmatch(r"Slurm job (\d+): 2 shards of my data; job (\d+) joins them; logs: my logs/\1_\*\.out, my logs/\2\.out\n", ended.stdout)
    assert submitted, ended.stdout + ended.stderr
    array, joining = submitted.groups()
    assert cluster.wait(array) == {1: ("COMPLETED", "0:0"), 2: ("COMPLETED", "0:0")}
    deadline = time.monotonic() + 60
    while cluster.ask("squeue", "--noheader", "--jobs", joining).strip():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    made = (datasets / "datasets/append/train.bin").read_bytes()
    assert (folder / "my data/append/train.bin").read_bytes() == made


def test_augment_is_the_array_that_tpt_augment_submits(cluster: Cluster, folder: Path) -> None:
    lines = [{"id": str(number), "text": f"text {number}", "thought": f"thought {number}"} for number in range(6)]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("augment.yaml").write_text("input: in.jsonl\noutput: out\ngenerator: {kind: field, field: thought}\nshard: {documents: 2}\n")
    words = ["launch", "slurm", "augment.yaml", "--nodes=2", "launch.logs=my logs"]
    words += ["launch.slurm={partition: main, time: '00:10:00', cpus_per_task: 1}", "launch.environment.A=x y"]
    ended = subprocess.run([sys.executable, "-m", "tpt_megatron.cli", *words], capture_output=True, text=True, check=False)
    submitted = re.fullmatch(r"Slurm job (\d+): 2 workers for 3 of 3 shards of out; logs: my logs/\1_\*\.out\n", ended.stdout)
    assert submitted, ended.stdout + ended.stderr
    assert cluster.wait(submitted.group(1)) == {0: ("COMPLETED", "0:0"), 1: ("COMPLETED", "0:0")}
    assert [augmented.document.id for augmented in output_of("out")] == [str(number) for number in range(6)]
