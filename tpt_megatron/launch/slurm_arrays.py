"""Slurm arrays of the stages that share their work by themselves: augment through datatrove's executor, as `tpt augment` submits it; preprocess by shards.

LOGS/JOB_TASK.out  what a task of preprocess said, over all its starts; a job that waits for them joins the shards
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from tpt_megatron.augment import slurm as augment_slurm
from tpt_megatron.config.augment import AugmentConfig, Slurm
from tpt_megatron.config.load import check_config
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.launch.job import Job
from tpt_megatron.launch.rank import make_log_folder
from tpt_megatron.launch.slurm import UNEXPANDED, container_command, fixed_part, header, interpreter, logs_of, sbatch, step_options, stop_signal


def dry_run(job: Job) -> str:
    """Return the array's script, and of preprocess the script that joins after it."""
    if isinstance(job.config, AugmentConfig):
        return augment_slurm.script(_with_slurm(job, job.config)).rstrip("\n")
    return preprocess_script(job) + "\n" + merge_script(job).rstrip("\n")


def submit(job: Job) -> str:
    """Submit the array and return a line that says what was submitted."""
    if isinstance(job.config, AugmentConfig):
        make_log_folder(logs_of(job))
        return augment_slurm.submit(_with_slurm(job, job.config))
    assert isinstance(job.config, PreprocessConfig)
    logs = logs_of(job)
    tasks = sbatch(preprocess_script(job), logs)
    joining = sbatch(merge_script(job), logs, [f"--dependency=afterok:{tasks}", "--kill-on-invalid-dep=yes"])
    return f"Slurm job {tasks}: {job.options.nodes} shards of {job.config.output}; job {joining} joins them; logs: {logs / tasks}_*.out, {logs / joining}.out"


def preprocess_script(job: Job) -> str:
    """Return the script of an array whose tasks are shards."""
    count, options = job.options.nodes, job.options
    # To this script alone, which hands it on: a step would hear of it only through srun.
    more = {"array": f"1-{count}", "ntasks": 1, "signal": f"B:{stop_signal(job)}", "output": f"{logs_of(job)}/%A_%a.out"}
    command = ["srun", *step_options(job), *container_command(job)] if job.options.container.image is not None else []
    command += [interpreter(job), "-m", "tpt_megatron.cli", *job.arguments()]
    lines = [
        *header(job, {**more, "cpus-per-task": options.slurm.cpus_per_task}),
        f"max_restarts={options.max_restarts}",
        f"backoff_s={options.backoff_s}",
        f"max_backoff_s={options.max_backoff_s}",
        f"max_requeues={options.slurm.max_requeues}",
        f"command=({shlex.join(command)})",
        f"shards={count}",
        "",
    ]
    return "\n".join(lines) + fixed_part("slurm_array.sh")


def merge_script(job: Job) -> str:
    """Return the script that joins the shards."""
    assert isinstance(job.config, PreprocessConfig)
    command = ["srun", *step_options(job), *container_command(job)] if job.options.container.image is not None else []
    command += [interpreter(job), "-m", "tpt_megatron.cli", "preprocess", "merge", str(job.config.output)]
    lines = header(job, {"job-name": f"{job.options.name}-merge", "ntasks": 1, "output": f"{logs_of(job)}/%j.out"})
    return "\n".join([*lines, f"exec {shlex.join(command)}", ""])


def _with_slurm(job: Job, config: AugmentConfig) -> AugmentConfig:
    """Return the config with a `slurm` section that says what the options say."""
    options, slurm = job.options, job.options.slurm
    if config.slurm is not None:
        raise ConfigError(f"{job.name}: it has `slurm` settings of its own, with which tpt augment submits it; or give slurm=null")
    if options.container.image is not None:
        raise ConfigError("launch.container.image: augment's arrays run bare; let launch.slurm.setup make the environment")
    exports = [f"export {name}={shlex.quote(value)}" for name, value in options.environment.items()]
    environment = slurm.setup or f"export PATH={shlex.quote(str(Path(sys.prefix) / 'bin'))}:$PATH"
    values = {
        "tasks": options.nodes,
        "time": slurm.time,
        "partition": slurm.partition,
        "logs": logs_of(job),
        "cpus_per_task": slurm.cpus_per_task or 4,
        "gpus_per_task": options.gpus_per_node if job.asks_for_gpus else 0,
        "qos": slurm.qos,
        "setup": "\n".join([*([UNEXPANDED] if exports else []), *exports, environment]),
        "sbatch": {**({"account": slurm.account} if slurm.account else {}), **slurm.sbatch},
    }
    for key in ("time", "partition"):
        if values[key] is None:
            raise ConfigError(f"launch.slurm.{key} is missing, which arrays of augment need")
    return config.model_copy(update={"slurm": check_config(Slurm, values, "launch.slurm")})
