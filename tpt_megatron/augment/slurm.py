"""Workers on a Slurm cluster, through datatrove's executor: an array job, each task one worker.

Which task does which shard is not decided here: every task runs the worker that one machine runs, and claims keep them
apart. So an array may be larger or smaller than the last one, may be requeued, and may meet workers started by hand.
datatrove's own record of completed tasks is not used; the output's manifests say what is done.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from tpt_megatron.augment.generators import Ingredients
from tpt_megatron.augment.plan import make_or_read_plan
from tpt_megatron.augment.runner import complete_output
from tpt_megatron.augment.shards import finished_shards
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import MachineError, UsageError
from tpt_megatron.record_files import refuse_inputs_in_output
from tpt_megatron.storage import locate

if TYPE_CHECKING:
    from tpt_megatron.augment.slurm_array import SlurmArray


def submit(config: AugmentConfig) -> str:
    """Plan the run here, submit its workers, and return a line that says what was submitted and where its logs are.

    No more workers are submitted than there are shards left, and none when the output is complete. Raises what planning
    raises, UsageError inside a task of an array, and MachineError where there is no Slurm or no datatrove, or where sbatch
    refuses.
    """
    slurm = config.slurm
    assert slurm is not None
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UsageError("slurm: this already is a task of a Slurm array; submit from a login node, or run it here with slurm=null")
    if shutil.which("sbatch") is None:
        raise MachineError("slurm: there is no sbatch on this machine; submit from a login node, or start the same command on each machine with slurm=null")
    array_of = _import_array()
    output = locate(config.output)
    refuse_inputs_in_output(config.input, output)
    plan = make_or_read_plan(config, Ingredients.of(config).settings(), output)
    if complete_output(output) is not None:
        return f"{output}: finished before, kept; nothing was submitted"
    left = len(plan.shards) - len(finished_shards(output))
    workers = max(1, min(slurm.tasks, left))
    array = array_of(config, slurm, workers)
    array.launch_job()
    return f"Slurm job {array.job_id}: {workers} workers for {left} of {len(plan.shards)} shards of {output}; logs: {slurm.logs}/{array.job_id}_*.out"


def script(config: AugmentConfig) -> str:
    """Return the job script of an array of all the workers that the config asks for. Writes nothing. Raises MachineError without datatrove."""
    assert config.slurm is not None
    return _import_array()(config, config.slurm, config.slurm.tasks).script()


def _import_array() -> type[SlurmArray]:
    try:
        from tpt_megatron.augment.slurm_array import SlurmArray
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("tpt_megatron"):
            raise
        raise MachineError(f"slurm needs {error.name}, which is not installed; run: pip install 'tpt-megatron[scale]'") from None
    return SlurmArray
