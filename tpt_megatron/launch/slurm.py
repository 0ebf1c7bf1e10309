"""Slurm: one job of the whole run, whose script starts an agent on every node, watches how they end, and goes back to the queue.

    LOGS/JOB.out                    what the script said, over all its starts
    LOGS/JOB/attempt_N/rank_R.log   what a rank said; attempts are counted over all starts
    LOGS/JOB/bad_nodes              nodes that did not pass the health check

Made and seen with Slurm 22.05. The script's fixed part is slurm_common.sh and slurm_train.sh.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from tpt_megatron.config.slurm import seconds_of
from tpt_megatron.errors import ConfigError, MachineError
from tpt_megatron.launch.job import Job
from tpt_megatron.launch.local import AGENT
from tpt_megatron.launch.rank import make_log_folder

LOGS = Path("logs")
UNEXPANDED = "# shellcheck disable=SC2016 # what is in single quotes, nodes and programs expand"


def dry_run(job: Job) -> str:
    """Return the script, or the scripts in their order, that would be submitted."""
    if job.stage == "train":
        return train_script(job).rstrip("\n")
    from tpt_megatron.launch import slurm_arrays

    return slurm_arrays.dry_run(job)


def submit(job: Job) -> str:
    """Submit the job and return a line that says what was submitted. MachineError where there is no Slurm, or where sbatch refuses, in its words."""
    if job.stage != "train":
        from tpt_megatron.launch import slurm_arrays

        return slurm_arrays.submit(job)
    logs = logs_of(job)
    number = sbatch(train_script(job), logs)
    return f"Slurm job {number}: {job.options.nodes} node(s) of {job.options.gpus_per_node} rank(s); logs: {logs / number}.out, {logs / number}/"


def train_script(job: Job) -> str:
    """Return the script of a training run."""
    options, slurm = job.options, job.options.slurm
    asked: dict[str, object] = {"nodes": options.nodes, "ntasks-per-node": 1, "cpus-per-task": slurm.cpus_per_task}
    if job.asks_for_gpus:
        asked["gpus-per-node"] = options.gpus_per_node
    # To the steps, not to this script: ranks save, and the script sees how they ended.
    asked |= {"signal": stop_signal(job), "output": f"{logs_of(job)}/%j.out"}
    command = [interpreter(job), *AGENT, f"--nodes={options.nodes}", f"--ranks={options.gpus_per_node}", f"--stop-s={options.stop_s}"]
    variables = {
        "logs": str(logs_of(job).resolve()),
        "health_check": _health_check(job),
        **{name: getattr(options, name) for name in ("stop_s", "max_restarts", "backoff_s", "max_backoff_s")},
        "max_requeues": slurm.max_requeues,
    }
    arrays = {
        "srun_nodes": [f"--nodes={options.nodes}", f"--ntasks={options.nodes}", "--ntasks-per-node=1"],
        "srun_options": step_options(job),
        "command": [*container_command(job), *command],
        "arguments": job.arguments(),
    }
    lines = [
        *header(job, asked),
        *(f"{name}={shlex.quote(str(value))}" for name, value in variables.items()),
        *(f"{name}=({shlex.join(words)})" for name, words in arrays.items()),
        "",
    ]
    return "\n".join(lines) + fixed_part("slurm_train.sh")


def fixed_part(name: str) -> str:
    """Return what is the same in every script of a kind, after what is the same in all."""
    return "".join((resources.files(__package__) / part).read_text(encoding="utf-8") for part in ("slurm_common.sh", name))


def sbatch(script: str, logs: Path, options: Sequence[str] = ()) -> str:
    """Submit a script and return the job's number."""
    if shutil.which("sbatch") is None:
        raise MachineError("slurm: there is no sbatch on this machine; submit from a login node, or see the script with --dry-run")
    make_log_folder(logs)
    done = subprocess.run(["sbatch", "--parsable", *options], input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MachineError(f"slurm: {' '.join(done.stderr.split()) or f'sbatch ended with exit code {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER


def stop_signal(job: Job) -> str:
    """Return the signal before the time limit. ConfigError where it would come at once: the job would go back to the queue again and again."""
    time, stop_s = job.options.slurm.time, job.options.stop_s
    if time is not None and 0 < seconds_of(time) <= stop_s:
        raise ConfigError(
            f"launch.slurm.time={time!r} is not longer than launch.stop_s={stop_s}: ranks would be stopped as soon as they start; "
            "make the time longer, or stop_s shorter"
        )
    return f"TERM@{stop_s}"


def logs_of(job: Job) -> Path:
    """Return the folder of logs."""
    return job.options.logs or LOGS


def header(job: Job, more: Mapping[str, object]) -> list[str]:
    """Return the first lines of a script: options of sbatch, the environment, and the user's set-up."""
    slurm = job.options.slurm
    given = {
        "job-name": f"{job.options.name}-{job.stage}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "requeue": "",
        "open-mode": "append",  # a job that starts again keeps what it said before
        **more,
        **slurm.sbatch,
    }
    named = [f"#SBATCH --{name}{f'={shlex.quote(str(value))}' if value != '' else ''}" for name, value in given.items() if value is not None]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in job.options.environment.items()]
    # A job whose output has no folder fails without a word. `sbatch` below makes it; people who print the script must.
    folder = f"# Before sbatch, which does not make it: mkdir -p {shlex.quote(str(logs_of(job)))}"
    return ["#!/bin/bash", folder, *named, UNEXPANDED, *exports, *([slurm.setup.rstrip("\n")] if slurm.setup else [])]


def interpreter(job: Job) -> str:
    """Return the Python that nodes run."""
    if job.options.container.image is not None:
        return job.options.container.python
    return job.options.python or sys.executable


def _health_check(job: Job) -> str:
    """Return the shell line that a node must pass."""
    options = job.options
    if options.slurm.health_check is not None:
        return options.slurm.health_check
    logs = shlex.quote(str(logs_of(job).resolve()))
    writes = f'file=$(mktemp {logs}/.health-XXXXXX) && echo ok >"$file" && rm "$file" || {{ echo "cannot write to "{logs}; exit 1; }}'
    if options.device == "cpu":
        return writes
    wanted = options.gpus_per_node
    return f'found=$(nvidia-smi --list-gpus | wc -l); [ "$found" -ge {wanted} ] || {{ echo "nvidia-smi lists $found of {wanted} GPUs"; exit 1; }}; {writes}'


def step_options(job: Job) -> list[str]:
    """Return what srun is told of CPUs, which since 22.05 it does not take over from the job, and of a container (pyxis)."""
    words = [] if job.options.slurm.cpus_per_task is None else [f"--cpus-per-task={job.options.slurm.cpus_per_task}"]
    container = job.options.container
    if container.image is None or container.runtime != "pyxis":
        return words
    words += [f"--container-image={container.image}"]
    words += [f"--container-mounts={','.join(mount if ':' in mount else f'{mount}:{mount}' for mount in container.mounts)}"] if container.mounts else []
    return [*words, f"--container-workdir={container.workdir or Path.cwd()}"]


def container_command(job: Job) -> list[str]:
    """Return what stands before the command in a container of apptainer's."""
    container = job.options.container
    if container.image is None or container.runtime != "apptainer":
        return []
    binds = [word for mount in container.mounts for word in ("--bind", mount)]
    workdir = container.workdir or str(Path.cwd())
    return ["apptainer", "exec", *(["--nv"] if job.options.device == "gpu" else []), *binds, "--pwd", workdir, container.image]
