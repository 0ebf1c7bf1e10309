"""Config of `tpt launch`: which machines, how often to start again, and what Slurm and Kubernetes want to know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, field_validator, model_validator

from tpt_megatron.config.load import Config
from tpt_megatron.config.slurm import SlurmTime


def _text(value: Any) -> Any:
    """Return a number as text: the environment and options know nothing else. A bool is left, and refused: nobody knows whether it means 1 or true."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_text)]

_SAID_BY_THE_SCRIPT = {
    **dict.fromkeys(("nodes", "ntasks", "array"), "give nodes instead"),
    **dict.fromkeys(("gpus", "gpus-per-node", "ntasks-per-node"), "give gpus_per_node instead"),
    **{key.replace("_", "-"): f"give slurm.{key} instead" for key in ("partition", "account", "qos", "time", "cpus_per_task")},
    **dict.fromkeys(("requeue", "no-requeue"), "give slurm.max_requeues instead"),
    "job-name": "give name instead",
    "output": "give logs instead",
    "signal": "give stop_s instead",
    "open-mode": "leave it out",
}
"""Options of sbatch that the launch depends on, by name, and what to do about them."""


class Container(Config):
    """Where ranks run in a container: pyxis (`srun --container-image`) or apptainer on Slurm; on Kubernetes they always do.

    image     what to run: a URL as the runtime wants it, or a file
    mounts    SOURCE:TARGET, or a path that is the same inside
    workdir   folder inside that relative paths are taken from; Slurm's default is the one that you submit from, which must be mounted then
    python    the interpreter inside
    """

    image: str | None = None
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    mounts: tuple[str, ...] = ()
    workdir: str | None = None
    python: str = "python3"

    @model_validator(mode="after")
    def _has_an_image(self) -> Self:
        if self.image is None and (others := self.model_fields_set - {"image"}):
            raise ValueError(f"{min(others)} is given without image, and counts inside of one only; give image, or leave it out")
        return self


class LocalOptions(Config):
    """Several machines without a scheduler: the same command on each, with its own `node`.

    rendezvous  HOST:PORT of node 0, as the others reach it
    node        number of this machine, from 0
    address     this machine, as the others reach it; default: its name
    """

    rendezvous: str | None = None
    node: int = Field(0, ge=0)
    address: str | None = None

    @field_validator("rendezvous")
    @classmethod
    def _is_an_address(cls, rendezvous: str | None) -> str | None:
        if rendezvous is not None and not re.fullmatch(r"\S+:[0-9]{1,5}", rendezvous):
            raise ValueError(f"{rendezvous!r} must be HOST:PORT of node 0, such as 10.0.0.1:29500")
        return rendezvous


class SlurmOptions(Config):
    """What sbatch is told. Times are Slurm's own, in quotes: "24:00:00".

    setup         shell lines before the start, such as `module load cuda`
    health_check  shell line that every node must pass before ranks start there; its last line of output is the reason. Default: as many GPUs as wanted,
                  and a log folder that can be written to. "true" checks nothing
    max_requeues  how often the job may go back to the queue (time limit, preemption, bad nodes) before it fails
    sbatch        further sbatch options by name, such as {exclusive: "", constraint: h100}; those that the script says already are refused
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: SlurmTime | None = None
    cpus_per_task: PositiveInt | None = None
    setup: str = ""
    health_check: str | None = None
    max_requeues: int = Field(100, ge=0)
    sbatch: dict[str, Text] = Field(default={})

    @field_validator("sbatch")
    @classmethod
    def _further_options(cls, sbatch: dict[str, str]) -> dict[str, str]:
        for option in sbatch:
            if not re.fullmatch(r"[a-z][a-z0-9]+(-[a-z0-9]+)*", option):
                raise ValueError(f"{option!r} is no name of an option; write its long name without the dashes before it, such as exclusive")
            if option in _SAID_BY_THE_SCRIPT:
                raise ValueError(f"the script has {option!r} already; {_SAID_BY_THE_SCRIPT[option]}")
        return sbatch


class KubernetesOptions(Config):
    """What the manifest says.

    kind              training as a JobSet (jobset.x-k8s.io/v1alpha2, 0.10 or newer) or a PyTorchJob (kubeflow.org/v1)
    claims            PersistentVolumeClaims by name, and where they are mounted: {datasets: /data}
    secrets           Secrets whose keys become environment variables
    shared_memory_gb  size of /dev/shm
    cpus, memory_gb   of a node's pod
    resources         further resources of a pod, such as {rdma/ib: 8}
    """

    kind: Literal["jobset", "pytorchjob"] = "jobset"
    namespace: str | None = None
    service_account: str | None = None
    claims: dict[str, str] = Field(default={})
    secrets: tuple[str, ...] = ()
    shared_memory_gb: PositiveInt = 64
    cpus: PositiveInt | None = None
    memory_gb: PositiveInt | None = None
    resources: dict[str, Text] = Field(default={})
    labels: dict[str, Text] = Field(default={})
    node_selector: dict[str, Text] = Field(default={})

    @field_validator("claims")
    @classmethod
    def _mounted_at_full_paths(cls, claims: dict[str, str]) -> dict[str, str]:
        for claim, path in claims.items():
            if not path.startswith("/"):
                raise ValueError(f"{claim}={path!r} must be a full path, of a folder in the pod, such as /{path}")
        return claims


class LaunchConfig(Config):
    """Options of `tpt launch`: a file (--options), and `launch.KEY=VALUE` on the command line.

    name           of the job; letters, digits and dashes
    nodes          machines; of augment and preprocess: tasks that share the work
    gpus_per_node  ranks a machine has
    device         cpu: ranks without GPUs, and none are asked for
    logs           folder of logs, on a disk that all nodes share: JOB/attempt_N/rank_R.log on Slurm, attempt_N/rank_R.log elsewhere. Without it
                   Slurm takes `logs`, and elsewhere ranks write to the terminal
    environment    variables that ranks get: NCCL's and the fabric's. Keys and passwords do not belong here
    python         interpreter on the nodes; default: this one
    max_restarts   how often ranks that failed are started again; stops after saving (exit code 3) do not count, wrong configs (2) are not repeated
    backoff_s      pause before the first of these; each one is twice the last, up to max_backoff_s
    stop_s         how long ranks may take to save after a signal; on Slurm the signal comes this long before the time limit
    """

    name: str = "tpt"
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    device: Literal["gpu", "cpu"] = "gpu"
    logs: Path | None = None
    environment: dict[str, Text] = Field(default={})
    python: str | None = None
    max_restarts: int = Field(3, ge=0)
    backoff_s: int = Field(30, ge=0)
    max_backoff_s: int = Field(600, ge=0)
    stop_s: PositiveInt = 300
    container: Container = Container()
    local: LocalOptions = LocalOptions()
    slurm: SlurmOptions = SlurmOptions()
    kubernetes: KubernetesOptions = KubernetesOptions()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise ValueError(f"name={self.name!r} must be of small letters, digits and dashes, begin with a letter, and have at most 40 of them")
        for variable in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                raise ValueError(f"environment: {variable!r} is no name of a variable")
        if self.local.node >= self.nodes:
            raise ValueError(f"local.node={self.local.node} must be less than nodes={self.nodes}; nodes are counted from 0")
        return self

    @property
    def ranks(self) -> int:
        """Ranks of a training run."""
        return self.nodes * self.gpus_per_node
