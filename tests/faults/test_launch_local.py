"""`tpt launch local`: how a run ends is how it exits, and what fails starts again. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.metrics import learned
from tests.support.ranks import WarmRanks, end
from tests.support.train_runs import preprocess_corpus, write_train_config


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    preprocess_corpus(root)
    return root


class Launcher:
    """`tpt launch local` of two ranks."""

    def __init__(self, folder: Path, datasets: Path, *words: str, **changes: Any) -> None:
        self.folder = folder
        config = write_train_config(folder, datasets, **{"steps": 100_000, "checkpoint": {"every_steps": 5, "keep_last": 2}, **changes})
        command = [sys.executable, "-m", "tpt_megatron.cli", "launch", "local", str(config), "--gpus-per-node=2", f"launch.logs={folder}/my logs", *words]
        with open(folder / "said", "wb") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def steps(self) -> int:
        metrics = self.folder / "run" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def until(self, condition: Callable[[], Any], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def family(self) -> list[psutil.Process]:
        """Return its agent and ranks."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def ranks(self) -> list[psutil.Process]:
        (agent,) = psutil.Process(self.process.pid).children()
        return agent.children()


@pytest.fixture
def launch() -> Iterator[Callable[..., Launcher]]:
    launchers: list[Launcher] = []

    def start(*arguments: Any, **changes: Any) -> Launcher:
        launchers.append(Launcher(*arguments, **changes))
        return launchers[-1]

    yield start
    for launcher in launchers:
        end(launcher.process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_exits_3(tmp_path: Path, datasets: Path, launch: Callable[..., Launcher], number: signal.Signals) -> None:
    launcher = launch(tmp_path, datasets)
    launcher.until(lambda: launcher.steps() >= 3)
    family = launcher.family()
    launcher.process.send_signal(number)
    assert launcher.process.wait(60) == 3
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert launcher.said().splitlines()[-1].startswith("tpt: stopped by a signal; what was finished is kept")
    assert int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()) == launcher.steps()
    for rank in (0, 1):
        assert "stopped by a signal after saving step" in (tmp_path / f"my logs/attempt_1/rank_{rank}.log").read_text()


def test_a_signal_to_one_rank_stops_all_and_is_no_failure(tmp_path: Path, datasets: Path, launch: Callable[..., Launcher]) -> None:
    launcher = launch(tmp_path, datasets)
    launcher.until(lambda: launcher.steps() >= 3)
    launcher.ranks()[1].terminate()
    assert launcher.process.wait(60) == 3
    assert "start 1 of" not in launcher.said()


def test_ranks_that_die_start_again_as_often_as_is_said_with_longer_and_longer_pauses(
    tmp_path: Path, datasets: Path, launch: Callable[..., Launcher], warm_ranks: WarmRanks
) -> None:
    launcher = launch(tmp_path, datasets, "launch.max_restarts=2", "launch.backoff_s=1")
    for attempt in (1, 2, 3):
        log = tmp_path / f"my logs/attempt_{attempt}/rank_0.log"
        launcher.until(lambda log=log: log.exists() and log.read_text().count(": complete, ") >= 2)  # type: ignore[misc]
        launcher.ranks()[0].kill()
    assert launcher.process.wait(60) == 1
    said = [line for line in launcher.said().splitlines() if line.startswith("tpt")]
    assert [line for line in said if "; start " in line] == [
        "tpt launch: ranks failed (exit code 137); start 1 of max_restarts=2 in 1 s",
        "tpt launch: ranks failed (exit code 137); start 2 of max_restarts=2 in 2 s",
    ]
    assert said[-1].startswith("tpt: ranks failed (exit code 137) and max_restarts=2 are used up; what was saved is kept")
    assert [line for line in said if "logs: " in line] == [f"tpt launch: logs: {tmp_path}/my logs/attempt_{attempt}/rank_*.log" for attempt in (1, 2, 3)]
    assert len([line for line in said if "rank 0 was killed by SIGKILL; " in line]) == 3
    last = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text()) + 1
    for folder in (tmp_path, tmp_path / "unbroken"):
        config = write_train_config(folder, datasets, steps=last)
        assert warm_ranks.run("train", str(config), ranks=2).returncode == 0
    assert learned(tmp_path / "run") == learned(tmp_path / "unbroken/run")


def test_a_config_that_ranks_refuse_is_not_started_again(tmp_path: Path, datasets: Path, launch: Callable[..., Launcher]) -> None:
    launcher = launch(tmp_path, datasets, "model.vocab_size=16")
    assert launcher.process.wait(120) == 2
    *_, reason, last = launcher.said().splitlines()
    assert "ended with exit code 2; " in reason and "model.vocab_size=16 is smaller than the vocabulary" in reason
    assert last == "tpt: the ranks refused the config, see above; it is not started again"


def test_ranks_that_do_not_save_in_time_are_killed(tmp_path: Path, datasets: Path, launch: Callable[..., Launcher]) -> None:
    launcher = launch(tmp_path, datasets, "launch.stop_s=2", "launch.max_restarts=0")
    launcher.until(lambda: launcher.steps() >= 3)
    family = launcher.family()
    launcher.ranks()[1].suspend()
    launcher.process.terminate()
    assert launcher.process.wait(60) == 1
    assert "has not ended after 2 s; it is killed" in launcher.said()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path, datasets: Path, launch: Callable[..., Launcher]) -> None:
    launcher = launch(tmp_path, datasets)
    launcher.until(lambda: launcher.steps() >= 3)
    family = launcher.family()
    assert len(family) >= 3
    launcher.process.kill()
    launcher.process.wait(10)
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_a_signal_ends_a_pause(tmp_path: Path, datasets: Path, launch: Callable[..., Launcher]) -> None:
    launcher = launch(tmp_path, datasets, "launch.backoff_s=600")
    launcher.until(lambda: launcher.steps() >= 3)
    launcher.ranks()[0].kill()
    launcher.until(lambda: "start 1 of max_restarts=3 in 600 s" in launcher.said())
    launcher.process.terminate()
    assert launcher.process.wait(30) == 3


def test_a_stage_with_processes_of_its_own_becomes_the_command(tmp_path: Path, datasets: Path) -> None:
    words = ["launch", "local", str(datasets / "datasets.yaml"), f"output={tmp_path / 'my data'}"]
    ended = subprocess.run([sys.executable, "-m", "tpt_megatron.cli", *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("append/train: 400 documents")
