"""On this machine: the agent of its ranks, started again after failures; with several nodes the same command runs on each."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from tpt_megatron.errors import ConfigError, Stopped, TptError, UsageError
from tpt_megatron.launch.job import Job
from tpt_megatron.launch.rank import make_log_folder
from tpt_megatron.log import console

AGENT = ("-m", "tpt_megatron.launch.agent")


def dry_run(job: Job) -> str:
    """Return what would be run, as a line for a shell."""
    environment = [f"{name}={shlex.quote(value)}" for name, value in _environment(job).items()]
    return " ".join([*environment, shlex.join(_command(job, attempt=1))])


def run(job: Job) -> None:
    """Run the job to its end, starting ranks that fail again after a pause, as often as the options say.

    Raises Stopped when ranks stopped after saving, UsageError when they refused their config, and TptError when they failed once too often.
    Of augment and preprocess, which have processes of their own, nothing comes back: this process becomes theirs.
    """
    if job.stage != "train":
        os.environ |= _environment(job)
        os.execv(sys.executable, _command(job, attempt=1))
    options, attempt = job.options, _first_attempt(job)
    for restart in range(options.max_restarts + 1):
        command = _command(job, attempt + restart)
        if options.logs is not None:
            folder = _logs_of(options.logs, attempt + restart)
            make_log_folder(folder)
            _say(f"logs: {folder}/rank_*.log")
        with _Agent(command, _environment(job)) as agent:
            code = agent.wait()
            if code == 0:
                return
            if code == Stopped.exit_code:
                raise Stopped
            if code == ConfigError.exit_code:
                raise UsageError("the ranks refused the config, see above; it is not started again")
            if restart == options.max_restarts:
                break
            pause = min(options.backoff_s * 2**restart, options.max_backoff_s)
            _say(f"ranks failed (exit code {code}); start {restart + 1} of max_restarts={options.max_restarts} in {pause} s")
            agent.pause(pause)
    raise TptError(f"ranks failed (exit code {code}) and max_restarts={options.max_restarts} are used up; what was saved is kept, run it again to continue")


def _say(line: str) -> None:
    console.print(f"tpt launch: {line}", markup=False, highlight=False)


class _Agent:
    """The agent's process, for a `with` block in which SIGTERM and SIGINT are handed to it, or end a pause."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
        # Of its own session: Ctrl-C reaches it once, through here.
        command = [*command[:3], f"--parent={os.getpid()}", *command[3:]]
        self._process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)

    def __enter__(self) -> _Agent:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        code = self._process.wait()
        return 128 - code if code < 0 else code

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        if self._process.poll() is not None:
            raise Stopped
        self._process.send_signal(number)


def _command(job: Job, attempt: int) -> list[str]:
    if job.options.container.image is not None:
        image = job.options.container.image
        raise UsageError(f"launch.container.image={image}: tpt launch local runs ranks as they are; start it inside the container, with launch.container={{}}")
    python = job.options.python or sys.executable
    if job.stage != "train":
        if job.options.nodes > 1:
            raise UsageError(f"{job.stage} on nodes={job.options.nodes}: start it on each machine by itself; its docs say how they share the work")
        return [python, "-m", "tpt_megatron.cli", *job.arguments()]
    options, local = job.options, job.options.local
    words = [python, *AGENT, f"--ranks={options.gpus_per_node}", f"--stop-s={options.stop_s}"]
    if options.nodes > 1:
        if local.rendezvous is None:
            raise UsageError(f"nodes={options.nodes}: give launch.local.rendezvous=HOST:PORT, where node 0 is reached, and launch.local.node=K on each machine")
        words += [f"--nodes={options.nodes}", f"--node={local.node}", f"--rendezvous={local.rendezvous}", f"--id={options.name}"]
        if local.address is not None:
            words += [f"--address={local.address}"]
    if options.logs is not None:
        words += [f"--logs={_logs_of(options.logs, attempt)}"]
    return [*words, "--", *job.arguments()]


def _environment(job: Job) -> dict[str, str]:
    """Return the ranks' variables. On several machines ranks that are started again must not find the addresses of the dead in the old store."""
    several = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if job.options.nodes > 1 and job.stage == "train" else {}
    return several | job.options.environment


def _first_attempt(job: Job) -> int:
    """Return the first number whose folder of logs is free: logs of earlier starts stay."""
    number = 1
    while job.options.logs is not None and os.path.exists(_logs_of(job.options.logs, number)):  # Path.exists raises where it may not look
        number += 1
    return number


def _logs_of(logs: Path, attempt: int) -> Path:
    return logs / f"attempt_{attempt}"
