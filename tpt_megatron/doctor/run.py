"""The story: this machine is examined, and under torchrun every node's, and then the ranks together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpt_megatron.doctor import disk, gpus, machine, packages, variables
from tpt_megatron.doctor.findings import Finding, healthy, problem


@dataclass(frozen=True, slots=True)
class Report:
    """What was found on one machine, or by the ranks of a job."""

    findings: list[Finding]
    measurements: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1

    @property
    def healthy(self) -> bool:
        """Whether nothing is a problem."""
        return healthy(self.findings)


def run_doctor(path: Path, quick: bool, tell: Callable[[Report], None]) -> bool:
    """Examine this machine and the disk of `path`; with WORLD_SIZE above 1 all ranks, which must all call this. Say whether nothing is a problem.

    quick: without speeds. `tell` is called once with what was found: on one rank, or where ranks do not meet on one rank of each machine.
    """
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size == 1:
        alone = Report(examine(path, quick))
        tell(alone)
        return alone.healthy
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    findings = examine(path, quick) if is_first_here else []
    try:
        from tpt_megatron.doctor.ranks import Together, examine_together
    except (ImportError, OSError) as error:  # no torch, or one whose libraries do not load
        found = f"WORLD_SIZE={world_size}, and without torch ranks cannot meet: {error}"
        report = Report([*findings, problem("ranks", found, f"pip install '{packages.DISTRIBUTION}[train]'")], ranks=world_size)
    else:

        def tell_together(found: Together) -> None:
            tell(Report(found.findings, found.measurements, world_size))

        together = examine_together(findings, path, quick, tell_together)
        if together.met:
            return healthy(together.findings)
        report = Report(together.findings, ranks=world_size)
    if is_first_here:
        tell(report)
    return report.healthy


def examine(path: Path, quick: bool) -> list[Finding]:
    """Return what is found on this machine by itself."""
    about_torch, build = packages.torch_findings()
    about_gpus, count = gpus.gpu_findings(build)
    findings = [packages.python_finding(), *about_torch, *about_gpus]
    findings += [packages.megatron_finding(), packages.transformer_engine_finding(build), *packages.apex_findings(), *packages.extra_findings()]
    findings += machine.machine_findings()
    findings += disk.disk_findings(path, quick)
    return findings + variables.variable_findings(os.environ, count)
