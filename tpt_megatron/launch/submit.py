"""Where a job goes: its text for people who look first, or the thing itself."""

from __future__ import annotations

from typing import Literal

from tpt_megatron.launch.job import Job

Where = Literal["local", "slurm", "kubernetes"]


def launch(where: Where, job: Job, dry_run: bool) -> str:
    """Run or submit a job and return a line that says so; with `dry_run` return what would be run or submitted."""
    if where == "local":
        from tpt_megatron.launch import local

        if dry_run:
            return local.dry_run(job)
        local.run(job)
        return ""
    if where == "slurm":
        from tpt_megatron.launch import slurm

        return slurm.dry_run(job) if dry_run else slurm.submit(job)
    from tpt_megatron.launch import kubernetes

    return kubernetes.manifest(job) if dry_run else kubernetes.apply(job)
