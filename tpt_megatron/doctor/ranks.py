"""The ranks of a job together: what each node found, versions, clocks, the folder they share, and how fast they are."""

from __future__ import annotations

import fcntl
import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpt_megatron.doctor import collectives, judging
from tpt_megatron.doctor.findings import Finding, listed, merge_hosts, ok, problem, warning
from tpt_megatron.doctor.packages import version

COMPARED = ("tpt-megatron", "megatron-core", "transformer-engine", "numpy", "nvidia-resiliency-ext")
"""Besides torch and what is in it."""


@dataclass(frozen=True, slots=True)
class Together:
    """What all ranks found, the same on each; only this machine's findings where the ranks did not meet."""

    findings: list[Finding]
    met: bool = True
    measurements: dict[str, Any] = field(default_factory=dict)


def examine_together(findings: list[Finding], path: Path, quick: bool, tell: Callable[[Together], None]) -> Together:
    """Return every node's findings and those about all ranks. findings: this machine's, on one of its ranks. Every rank must call this.

    `tell` is called on rank 0 while the others wait: torchrun ends all ranks when one has ended with a problem.
    """
    try:
        collectives.meet()
        try:
            together = _examine(findings, path, quick)
            if os.environ["RANK"] == "0":
                tell(together)
            collectives.share(None)
            return together
        finally:
            collectives.part()
    except (RuntimeError, ValueError, OSError) as error:
        at = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        do = f"see that every node reaches {at}, and that GLOO_SOCKET_IFNAME, where set, names an interface of each"
        return Together([*findings, problem("ranks", f"did not stay together: {_first_line(error)}", do)], met=False)


def _examine(findings: list[Finding], path: Path, quick: bool) -> Together:
    host = socket.gethostname()
    shared = collectives.share((host, findings, _versions(), collectives.device_type()))
    hosts = [one[0] for one in shared]
    merged = merge_hosts([(one[0], finding) for one in shared for finding in one[1]])
    merged += judging.versions_finding([one[2] for one in shared], hosts)
    merged.append(judging.clocks_finding(collectives.share(collectives.clock_at_once()), hosts))
    merged.append(_folder(path, hosts))
    kinds = [one[3] for one in shared]
    if len(set(kinds)) > 1:
        without = [judging.name(rank, hosts) for rank, kind in enumerate(kinds) if kind == "cpu"]
        merged.append(problem("ranks", f"without a GPU of its own: {listed(without)}", "start as many ranks on a node as it has GPUs (--nproc-per-node gpu)"))
    if quick:
        return Together(merged)
    kind = "cuda" if set(kinds) == {"cuda"} else "cpu"
    about_speed, measured = _measure(kind, hosts)
    return Together(merged + about_speed, measurements={"device": kind, "hosts": hosts, "ranks": measured})


def _versions() -> dict[str, str]:
    return {**{name: here for name in COMPARED if (here := version(name)) is not None}, **collectives.build_of_torch()}


def _measure(kind: str, hosts: list[str]) -> tuple[list[Finding], list[Any]]:
    measured, why = None, ""
    try:
        measured = collectives.measure(kind)
    except RuntimeError as error:
        why = _first_line(error)
    shared = collectives.share((measured, why))
    failed = [f"{judging.name(rank, hosts)}: {why}" for rank, (_, why) in enumerate(shared) if why]
    if failed:
        return [problem("all-reduce", listed(failed), "run with NCCL_DEBUG=INFO: its first warning says which rank and which transport")], []
    times = [one for one, _ in shared]
    return judging.speed_findings(times, hosts, kind), times


def _folder(path: Path, hosts: list[str]) -> Finding:
    """Have rank 0 hold a locked file in the folder, and every other rank look for it and try the lock."""
    hidden = path / f".tpt-doctor-{collectives.share(uuid.uuid4().hex)[0]}"
    with _held(hidden if os.environ["RANK"] == "0" else None) as why:
        if any(failed := collectives.share(why)):
            return warning("shared folder", f"{path} on rank 0: {next(filter(None, failed))}", "give a --path that rank 0 can write to")
        seen = collectives.share(_look(hidden))  # rank 0 lets go after this, when all have looked
    absent = [judging.name(rank, hosts) for rank, how in enumerate(seen) if how == "absent"]
    unlocked = [judging.name(rank, hosts) for rank, how in enumerate(seen) if how == "unlocked"]
    if absent:
        found = f"what rank 0 writes to {path.absolute()} is not seen by {listed(absent)}"
        return warning("shared folder", found, "give runs a folder that all nodes mount: checkpoints are written by all ranks and read by all")
    if unlocked:
        found = f"what rank 0 has locked in {path.absolute()} can be locked by {listed(unlocked)}"
        return warning("shared folder", found, "mount it with locks (NFS: version 4, or without nolock; Lustre: flock)")
    return ok("shared folder", f"{path.absolute()} is one for all ranks, and so are its locks")


@contextmanager
def _held(file: Path | None) -> Iterator[str]:
    """Hold a locked file; yield why that cannot be, if so. None: nothing to hold."""
    if file is None:
        yield ""
        return
    try:
        opened = open(file, "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        yield error.strerror or str(error)
        return
    with opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            why = ""
        except OSError as error:
            why = f"no locks: {error.strerror}"
        try:
            yield why
        finally:
            file.unlink(missing_ok=True)


def _look(file: Path) -> str:
    if os.environ["RANK"] == "0":
        return "locked"
    try:
        with open(file, "r+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "locked"
    except OSError:
        return "absent"
    return "unlocked"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
