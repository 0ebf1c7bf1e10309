"""A Slurm cluster of one machine for tests: a controller and two node daemons, with all their files in one folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Its commands find it through SLURM_CONF, which must be in the environment: `environment`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def tasks(self, job: str) -> dict[int, tuple[str, str]]:
        """Return (state, exit code) of each task of an array, as in {0: ("COMPLETED", "0:0")}; a task that waits has none yet."""
        found = {}
        for line in self.ask("scontrol", "--oneliner", "show", "job", job).splitlines():
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if fields["ArrayTaskId"].isdigit():
                found[int(fields["ArrayTaskId"])] = fields["JobState"], fields["ExitCode"]
        return found

    def wait(self, job: str, timeout_s: float = 60) -> dict[int, tuple[str, str]]:
        """Return `tasks` once all have ended."""
        deadline = time.monotonic() + timeout_s
        while self.ask("squeue", "--noheader", "--jobs", job).strip():
            assert time.monotonic() < deadline, self.ask("squeue")
            time.sleep(0.2)
        return self.tasks(job)


@contextlib.contextmanager
def running_slurm(cpus: int = 4, memory_mb: int = 8000, extra: tuple[str, ...] = ()) -> Iterator[Cluster]:
    """Run a cluster of two nodes of so many CPUs and so much memory (on paper) in the block. Nothing outside its folder changes.

    extra: further lines of slurm.conf, such as partitions
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        configuration = folder / "slurm.conf"
        configuration.write_text(_configuration(folder, cpus, memory_mb, extra))
        (folder / "state").mkdir()
        commands = [["slurmctld", "-D", "-f", str(configuration)]]
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            commands.append(["slurmd", "-D", "-f", str(configuration), "-N", node])
        with open(folder / "daemons.out", "wb") as said:
            processes += [subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said) for command in commands]
        _wait_until_idle(cluster, processes)
        yield cluster
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):  # where the controller is gone, jobs end with their nodes' daemons
            _end_jobs(cluster)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder)


def _configuration(folder: Path, cpus: int, memory_mb: int, extra: tuple[str, ...]) -> str:
    host = socket.gethostname().partition(".")[0]
    controller, *ports = _free_ports(1 + len(NODES))
    lines = [
        *("ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={controller}"),
        *(f"SlurmUser={getpass.getuser()}", f"SlurmdUser={getpass.getuser()}"),
        # No munge, no cgroups, no accounting: none of them can be had without changing the machine.
        *("AuthType=auth/none", "CredType=cred/none", "ProctrackType=proctrack/pgid", "TaskPlugin=task/none"),
        *("JobAcctGatherType=jobacct_gather/none", "MpiDefault=none", "SlurmdParameters=config_overrides"),
        *("SelectType=select/cons_tres", "SelectTypeParameters=CR_Core_Memory"),
        *(f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool-%n"),
        *(f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd-%n.pid"),
        *(f"SlurmctldLogFile={folder}/slurmctld.log", f"SlurmdLogFile={folder}/slurmd-%n.log"),
    ]
    for node, port in zip(NODES, ports, strict=True):
        lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory_mb}")
    lines.append(f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
    lines += extra
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait_until_idle(cluster: Cluster, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 30
    states = ""
    while True:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            states = cluster.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t")
        if states.split() == ["idle"] * len(NODES):
            return
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in (cluster.folder / "daemons.out", *sorted(cluster.folder.glob("*.log"))))
        assert all(process.poll() is None for process in processes), f"a Slurm daemon ended: {logs}"
        assert time.monotonic() < deadline, f"the nodes are {states.split()}: {logs}"
        time.sleep(0.1)


def _end_jobs(cluster: Cluster) -> None:
    jobs = cluster.ask("squeue", "--noheader", "--format=%A").split()
    if jobs:
        subprocess.run(["scancel", "--full", "--signal=KILL", *jobs], env=os.environ | cluster.environment, timeout=30, check=False, capture_output=True)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and cluster.ask("squeue", "--noheader").strip():
        time.sleep(0.2)
