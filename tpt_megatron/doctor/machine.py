"""Limits of this machine and of this process: processors, memory, shared memory, open files, locked memory, clock."""

from __future__ import annotations

import os
import resource
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tpt_megatron.doctor.findings import Finding, in_bytes, ok, problem, warning

OPEN_FILES = 4096
"""Fewer are soon used up: memory-mapped shards, data loaders, sockets of every pair of ranks."""
SHARED_MEMORY = 1_000_000_000
"""NCCL and data loaders pass data between a machine's processes there; containers often begin with 64 MB."""
MEMORY_A_RANK = 4_000_000_000
CGROUP = Path("/sys/fs/cgroup")
INFINIBAND = Path("/sys/class/infiniband")


def local_ranks() -> int:
    """Return how many ranks of this job run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def machine_findings() -> list[Finding]:
    """Return what limits this machine and this process."""
    return [_processors(), _memory(), *_shared_memory(Path("/dev/shm")), _open_files(), _locked_memory(), _clock()]


def usable_processors() -> float:
    """Return how many processors this process may use: its affinity, and its container's quota."""
    here = float(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    quota = _first_line(CGROUP / "cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        here = min(here, int(quota[0]) / int(quota[1]))
    return here


def _processors() -> Finding:
    usable, all_of_them, ranks = usable_processors(), os.cpu_count() or 1, local_ranks()
    found = f"{usable:g} of {all_of_them} usable" if usable < all_of_them else f"{all_of_them}"
    found += f" for {ranks} rank{'s' * (ranks > 1)}"
    if usable < ranks:
        return warning("processors", found, "start fewer ranks here, or give the job or container a processor a rank at least: ranks wait for one another")
    return ok("processors", found)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = _first_line(CGROUP / "memory.max") or _first_line(CGROUP / "memory" / "memory.limit_in_bytes")
    found = ""
    if limit.isdigit() and int(limit) < total:
        used = _first_line(CGROUP / "memory.current") or _first_line(CGROUP / "memory" / "memory.usage_in_bytes")
        total = int(limit)
        free = min(free, total - int(used or 0))
        found = ", the container's limit"
    ranks = local_ranks()
    found = f"{in_bytes(free)} free of {in_bytes(total)}{found}"
    if free < MEMORY_A_RANK * ranks:
        need = in_bytes(MEMORY_A_RANK * ranks)
        return warning(
            "memory", found, f"end other processes, or raise the container's limit: {ranks} rank(s) with their checkpoint writers may want {need} or more"
        )
    return ok("memory", found)


def _shared_memory(place: Path) -> list[Finding]:
    try:
        status = os.statvfs(place)
    except OSError:
        return []  # no Linux
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{in_bytes(free)} free of {in_bytes(size)}"
    if free < SHARED_MEMORY:
        do = "start the container with --ipc=host or --shm-size=16g" if size < SHARED_MEMORY else f"remove what ended processes left in {place}"
        return [warning(str(place), found, f"{do}: NCCL and data loaders need it")]
    return [ok(str(place), found)]


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        reachable = hard == resource.RLIM_INFINITY or hard >= OPEN_FILES
        do = f"ulimit -n {65536 if hard in (resource.RLIM_INFINITY,) or hard >= 65536 else hard}"
        if not reachable:
            do = "raise nofile in /etc/security/limits.conf, or start the container with --ulimit nofile=65536"
        return warning("open files", f"at most {soft} (RLIMIT_NOFILE)", do)
    return ok("open files", f"at most {'any number' if soft == resource.RLIM_INFINITY else soft}")


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return ok("locked memory", "no limit")
    adapters = sorted(entry.name for entry in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    found = f"at most {in_bytes(soft)} (RLIMIT_MEMLOCK)"
    if adapters:
        return warning("locked memory", f"{found}, and {', '.join(adapters)} must lock buffers", "ulimit -l unlimited; in a container --ulimit memlock=-1")
    return ok("locked memory", f"{found}; no InfiniBand here that needs more")


def _clock() -> Finding:
    now = time.time()
    installed = Path(__file__).stat().st_mtime
    found = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if now < installed - 1:
        return problem("clock", f"{found}, before this package was installed", "set the clock: timedatectl set-ntp true")
    return ok("clock", found)


def _first_line(path: Path) -> str:
    try:
        return path.read_text().split("\n", 1)[0].strip()
    except OSError:
        return ""
