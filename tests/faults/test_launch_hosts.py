"""A run over two hosts, one of which dies in the middle: the other one's ranks end, and the same commands continue to the unbroken run's bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.hosts import Host, two_hosts
from tests.support.metrics import learned
from tests.support.ranks import WarmRanks, free_port
from tests.support.tensors import assert_same_tensors
from tests.support.train_runs import preprocess_corpus, write_train_config

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(shutil.which("ip") is None, reason="there is no `ip` (Debian: apt-get install iproute2)")]
STEPS = 150


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    preprocess_corpus(root)
    return root


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, datasets: Path, warm_ranks: WarmRanks) -> Path:
    """Return the folder of a run of two ranks on one host that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    ended = warm_ranks.run("train", str(config(folder, datasets)), ranks=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as hosts:
        yield hosts


def config(folder: Path, datasets: Path) -> Path:
    return write_train_config(folder, datasets, steps=STEPS, checkpoint={"every_steps": 25, "keep_last": 2})


class Launchers:
    """`tpt launch local` on each host, for a `with` block that leaves no process behind."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path, datasets: Path, **options: Any) -> None:
        self._hosts, self._config = hosts, config(folder, datasets)
        self.metrics = folder / "run" / "metrics.jsonl"
        self._port = free_port()
        self._options = [f"launch.{name}={value}" for name, value in {"backoff_s": 1, "max_restarts": 0, "stop_s": 60, **options}.items()]
        self.said = folder / "said"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Launchers:
        return self

    def __exit__(self, *_: object) -> None:
        for number, launcher in self.processes.items():
            for process in self.family(number):
                process.kill()
            launcher.wait(30)

    def start(self, number: int) -> None:
        host = self._hosts[number]
        words = [
            "launch",
            "local",
            str(self._config),
            "--nodes=2",
            "--gpus-per-node=1",
            *self._options,
            f"launch.environment.GLOO_SOCKET_IFNAME={host.interface}",
        ]
        words += [f"launch.local={{rendezvous: '{self._hosts[0].address}:{self._port}', node: {number}, address: {host.address}}}"]
        with open(self.said, "ab") as said:
            command = [*host.command, sys.executable, "-m", "tpt_megatron.cli", *words]
            self.processes[number] = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def family(self, number: int) -> list[psutil.Process]:
        """Return a launcher with all that it started."""
        if self.processes[number].poll() is not None:
            return []
        launcher = psutil.Process(self.processes[number].pid)
        return [launcher, *launcher.children(recursive=True)]

    def steps(self) -> int:
        return self.metrics.read_text().count("\n") if self.metrics.exists() else 0

    def until(self, condition: Callable[[], Any], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self.said.read_text()[-5000:]
            time.sleep(0.05)

    def ended(self, *numbers: int) -> list[int | None]:
        """Return the launchers' exit codes; the test fails where one takes longer than two minutes."""
        return [self.processes[number].wait(120) for number in numbers]


@pytest.mark.parametrize("dying", [0, 1])
def test_a_host_that_dies_ends_the_run_and_the_same_commands_continue_it(
    tmp_path: Path, datasets: Path, unbroken: Path, hosts: tuple[Host, Host], dying: int
) -> None:
    with Launchers(hosts, tmp_path, datasets) as launchers:
        for number in (0, 1):
            launchers.start(number)
        launchers.until(lambda: launchers.steps() >= 30)
        dead, others = launchers.family(dying), launchers.family(1 - dying)
        assert len(dead) >= 3, "a launcher, its agent and a rank"
        dead[0].kill()  # the launcher alone: what it started must not outlive it
        assert launchers.ended(0, 1) == ([-9, 1] if dying == 0 else [1, -9])
        _, left = psutil.wait_procs([*dead, *others], timeout=30)
        assert left == []
        assert launchers.steps() < STEPS, "it was killed too late: nothing was tested"

        for number in (0, 1):
            launchers.start(number)
        assert launchers.ended(0, 1) == [0, 0], launchers.said.read_text()[-5000:]
    assert learned(tmp_path / "run") == learned(unbroken)
    assert_same_tensors(tmp_path / "run", unbroken)


def test_a_launcher_that_may_start_again_waits_for_the_host_that_comes_back(tmp_path: Path, datasets: Path, unbroken: Path, hosts: tuple[Host, Host]) -> None:
    with Launchers(hosts, tmp_path, datasets, max_restarts=5) as launchers:
        for number in (0, 1):
            launchers.start(number)
        launchers.until(lambda: launchers.steps() >= 30)
        for process in reversed(launchers.family(1)):  # as a host that loses power
            process.kill()
        launchers.ended(1)
        launchers.until(lambda: "ranks failed" in launchers.said.read_text())
        launchers.start(1)
        assert launchers.ended(0, 1) == [0, 0], launchers.said.read_text()[-5000:]
    assert learned(tmp_path / "run") == learned(unbroken)
    assert_same_tensors(tmp_path / "run", unbroken)


def test_a_signal_to_one_host_stops_both_after_saving(tmp_path: Path, datasets: Path, hosts: tuple[Host, Host]) -> None:
    with Launchers(hosts, tmp_path, datasets) as launchers:
        for number in (0, 1):
            launchers.start(number)
        launchers.until(lambda: launchers.steps() >= 3)
        launchers.processes[1].send_signal(signal.SIGTERM)
        assert launchers.ended(0, 1) == [3, 3], launchers.said.read_text()[-5000:]
        tracker = tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
        assert int(tracker.read_text()) == launchers.steps() < STEPS
