"""What Slurm runs: datatrove's executor for an array of workers. Imports datatrove, which the extra `scale` installs.

    LOGS/JOB_TASK.out        what a worker said
    LOGS/TIME-xxxxxx/        one submission: job script, pickled workers, datatrove's own records

Made and seen with datatrove 0.10 and Slurm 22.05. Three things differ from datatrove's own way to launch. The worker is
the job script's process (`exec`), not a step below it: `scancel` and the time limit send SIGTERM to the whole job, which
ends a shell and `srun` at once, and with them the worker's exit code and its last lines. Every submission has a folder of
its own, since tasks that still wait load what was pickled for them. And no second job is sent to merge statistics.
"""

from __future__ import annotations

import pickle
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
from datatrove.executor import SlurmPipelineExecutor
from datatrove.utils.logging import logger as datatrove_logger

from tpt_megatron.augment.runner import run_augment
from tpt_megatron.config.augment import AugmentConfig, Slurm
from tpt_megatron.errors import MachineError, Stopped, TptError
from tpt_megatron.log import set_up_logging
from tpt_megatron.storage import explain, locate

_MEMORY_OPTIONS = {"mem", "mem-per-cpu", "mem-per-gpu"}


class SlurmArray(SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove's types are not read
    """An array job of `workers` workers. `launch_job` submits it; in a task of it, `run` does the work. Nothing is written before that."""

    def __init__(self, config: AugmentConfig, slurm: Slurm, workers: int) -> None:
        self._logs = slurm.logs.resolve()
        self._folder = self._logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        super().__init__(
            pipeline=[ArrayWorker(config)],
            tasks=workers,
            time=slurm.time,
            partition=slurm.partition,
            cpus_per_task=slurm.cpus_per_task,
            mem_per_cpu_gb=slurm.memory_per_cpu_gb,
            gpus_per_task=slurm.gpus_per_task,
            job_name="tpt-augment",
            qos=slurm.qos,
            env_command=slurm.setup or f"export PATH={shlex.quote(str(Path(sys.prefix) / 'bin'))}:$PATH",
            sbatch_args={"open-mode": "append"} | slurm.sbatch,  # a task that Slurm starts again keeps what it said before
            max_array_size=workers,  # what the cluster allows, sbatch says
            logging_dir=str(self._folder),
            slurm_logs_folder=tempfile.gettempdir(),  # datatrove makes it when it is asked for options; where logs go is said there
            skip_completed=False,  # the output's manifests say what is done
            requeue_signals=None,  # workers stop on SIGTERM in good order, whatever it was sent for
            requeue="no-requeue" not in slurm.sbatch,
        )

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, str]:
        """Return the job script's options: datatrove's, without two that exclude each other, quoted for paths with spaces."""
        output = {name: f"{self._logs}/%A_%a.out" for name in ("output", "error") if name not in self._sbatch_args}
        options: dict[str, Any] = super().get_sbatch_args(max_array) | output
        if self._sbatch_args.keys() & (_MEMORY_OPTIONS - {"mem-per-cpu"}):  # sbatch takes one of them
            del options["mem-per-cpu"]
        return {name: shlex.quote(str(value)) if value else "" for name, value in options.items()}

    def run(self) -> None:
        """Do this task's work, inside a task. datatrove is silent: its statistics of a pipeline say nothing of a worker."""
        datatrove_logger.disable("datatrove")
        super().run()

    def script(self) -> str:
        """Return the job script."""
        command = f"exec launch_pickled_pipeline {shlex.quote(str(self._folder / 'executor.pik'))}"
        return str(self.get_launch_file_contents(self.get_sbatch_args(self.tasks), command))

    def launch_job(self) -> None:
        """Write the script and what it loads, and submit it; `job_id` is set then. Raises MachineError with sbatch's own words."""
        self._folder.mkdir(parents=True)
        (self._folder / "executor.pik").write_bytes(pickle.dumps(self))
        (self._folder / "ranks_to_run.json").write_bytes(orjson.dumps(list(range(self.tasks))))
        script = self._folder / "launch_script.slurm"
        script.write_text(self.script())
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(self._folder)
            raise MachineError(f"slurm: {' '.join(done.stderr.split()) or f'sbatch ended with exit code {done.returncode}'}")
        self.job_id = done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER


class ArrayWorker:
    """A step of a datatrove pipeline that is one worker of an output that is planned."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config.model_copy(update={"slurm": None})

    def __repr__(self) -> str:
        return f"a worker of {self.config.output}"

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        """Work, and end the process with the command's exit code when that fails.

        No exception leaves: datatrove would log it with the values of all variables, whatever they hold.
        """
        set_up_logging()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)  # the worker replaces it
        try:
            if not (locate(self.config.output) / "plan.json").is_file():
                raise MachineError(
                    f"output={self.config.output}: node {socket.gethostname()} does not see the plan.json that was made when the job was submitted; "
                    "inputs and output must lie on a disk that all nodes share, or in object storage"
                )
            run_augment(self.config, rank / world_size)
        except Exception as error:  # noqa: BLE001  (none leaves, see above)
            line = explain(error)
            if line is None:
                traceback.print_exc()
            else:
                print(f"tpt: {line}", file=sys.stderr)
            raise SystemExit(error.exit_code if isinstance(error, TptError) else 1) from None


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
