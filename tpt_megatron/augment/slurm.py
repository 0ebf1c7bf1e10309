"""Workers on a Slurm cluster, through datatrove's executor: an array job, each task one worker.

Which task does which shard is not decided here: every task runs the worker that one machine runs, and claims keep them
apart. So an array may be larger or smaller than the last one, may be requeued, and may meet workers started by hand.
datatrove's own record of completed tasks is not used; the output's manifests say what is done.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpt_megatron.augment.generators import Ingredients
from tpt_megatron.augment.plan import make_or_read_plan
from tpt_megatron.augment.runner import run_augment
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import MachineError, UsageError
from tpt_megatron.log import set_up_logging
from tpt_megatron.record_files import refuse_inputs_in_output
from tpt_megatron.storage import locate

if TYPE_CHECKING:
    from datatrove.executor import SlurmPipelineExecutor


def submit(config: AugmentConfig) -> str:
    """Plan the run here, submit its workers, and return a line that says what was submitted.

    Raises what planning raises, and MachineError where there is no Slurm or no datatrove.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UsageError("slurm: this already is a task of a Slurm array; submit from a login node, or run it here with slurm=null")
    executor = make_executor(config)
    output = locate(config.output)
    refuse_inputs_in_output(config.input, output)
    plan = make_or_read_plan(config, Ingredients.of(config).settings(), output)
    executor.run()
    assert config.slurm is not None
    return f"Slurm job {executor.job_id}: {config.slurm.tasks} workers for {len(plan.shards)} shards of {output}; logs in {config.slurm.logs}"


def make_executor(config: AugmentConfig) -> SlurmPipelineExecutor:
    """Return datatrove's executor for a config that has `slurm`. Raises MachineError where sbatch or datatrove is missing."""
    try:
        from datatrove.executor import SlurmPipelineExecutor
    except ImportError:
        raise MachineError("slurm needs datatrove, which is not installed; run: pip install 'tpt-megatron[scale]'") from None
    if shutil.which("sbatch") is None:
        raise MachineError("slurm: there is no sbatch on this machine; submit from a login node, or start the same command on each machine with slurm=null")
    slurm = config.slurm
    assert slurm is not None
    return SlurmPipelineExecutor(
        pipeline=[_Worker(config)],
        tasks=slurm.tasks,
        time=slurm.time,
        partition=slurm.partition,
        cpus_per_task=slurm.cpus_per_task,
        mem_per_cpu_gb=slurm.memory_per_cpu_gb,
        gpus_per_task=slurm.gpus_per_task,
        job_name="tpt-augment",
        qos=slurm.qos,
        env_command=slurm.setup or f"export PATH={Path(sys.prefix) / 'bin'}:$PATH",
        sbatch_args=dict(slurm.sbatch),
        logging_dir=str(slurm.logs.resolve()),
        skip_completed=False,
    )


class _Worker:
    """A step of a datatrove pipeline that is one worker of an output."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config.model_copy(update={"slurm": None})

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        set_up_logging()
        run_augment(self.config, rank / world_size)
