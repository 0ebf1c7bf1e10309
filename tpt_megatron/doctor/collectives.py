"""Ranks that speak to one another: meeting, exchanging what they know, and how fast each computes and they communicate.

The only file of this room that imports torch. Ranks meet over gloo, which needs no GPU, so that what is wrong with one can be told by all; what is
measured on GPUs goes over NCCL, in a group of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MEET_TIMEOUT = timedelta(minutes=10)
"""The slowest machine's own examination, imports among it, comes before."""
MEASURE_TIMEOUT = timedelta(minutes=2)
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Load:
    """How much is computed and sent for a measurement."""

    matrix: int
    matmuls: int
    all_reduce_mb: tuple[int, ...]
    all_reduces: int
    exchange_mb: int
    exchanges: int


LOADS = {"cuda": Load(8192, 50, (1, 32, 512), 20, 64, 10), "cpu": Load(512, 20, (1, 8, 32), 5, 4, 5)}


@dataclass(slots=True)
class Measured:
    """One rank's times, in seconds an operation. `pairs`: the other rank, and the time of an exchange with it."""

    matmul: float = 0.0
    all_reduce: dict[int, float] = field(default_factory=dict)
    pairs: dict[int, float] = field(default_factory=dict)


def meet() -> None:
    """Join the job that the environment describes. Raises RuntimeError or ValueError, as torch does."""
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a collective operation that hangs raises an error, and does not end the process
    dist.init_process_group("gloo", timeout=MEET_TIMEOUT)


def part() -> None:
    """Leave the job."""
    dist.destroy_process_group()


def share(value: Any) -> list[Any]:
    """Return every rank's value; every rank must call this at the same point."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def clock_at_once() -> float:
    """Return this machine's time at a moment that all ranks share to within a few milliseconds."""
    dist.barrier()
    return time.time()


def device_type() -> str:
    """Return what this rank has to compute on: cuda, or cpu. Raises nothing, and uses no GPU yet."""
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() > int(os.environ.get("LOCAL_RANK", "0")) else "cpu"


def build_of_torch() -> dict[str, str]:
    """Return torch's version, and the CUDA and NCCL in it."""
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version()) if torch.version.cuda else "none"  # type: ignore[no-untyped-call]
    return {"torch": str(torch.__version__), "CUDA of torch": torch.version.cuda or "none", "NCCL": nccl}


def measure(kind: str) -> dict[str, Any]:
    """Return this rank's times, a Measured as a dict; every rank must call this with the same kind. Raises RuntimeError, as torch does."""
    load = LOADS[kind]
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device(kind)
    group = dist.new_group(backend="nccl" if kind == "cuda" else "gloo", timeout=MEASURE_TIMEOUT)
    finish: Callable[[], object] = torch.cuda.synchronize if kind == "cuda" else (lambda: None)
    measured = Measured(_matmul(load, device, finish))
    for megabytes in load.all_reduce_mb:
        data = torch.ones(megabytes * MB // 4, device=device)
        dist.barrier(group)
        measured.all_reduce[megabytes] = _timed(lambda data=data: dist.all_reduce(data, group=group), load.all_reduces, finish)  # type: ignore[misc]
    for even in (True, False):
        dist.barrier(group)
        other = neighbour(dist.get_rank(), dist.get_world_size(), even)
        if other is not None:
            measured.pairs[other] = _exchange(other, load, device, group, finish)
    dist.barrier(group)
    finish()
    dist.destroy_process_group(group)
    return asdict(measured)


def neighbour(rank: int, world_size: int, even: bool) -> int | None:
    """Return whom a rank exchanges with: pairs (0, 1), (2, 3) ..., then the pairs between them; around the corner where that makes a pair."""
    other = rank + 1 if (rank % 2 == 0) == even else rank - 1
    if world_size % 2 == 0 and world_size > 2:
        return other % world_size
    return other if 0 <= other < world_size else None


def _matmul(load: Load, device: torch.device, finish: Callable[[], object]) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(load.matrix, load.matrix, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    return _timed(lambda: torch.matmul(a, b, out=c), load.matmuls, finish)


def _exchange(other: int, load: Load, device: torch.device, group: Any, finish: Callable[[], object]) -> float:
    mine = torch.ones(load.exchange_mb * MB // 4, device=device)
    theirs = torch.empty_like(mine)

    def exchange() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, other, group), dist.P2POp(dist.irecv, theirs, other, group)]):
            work.wait()

    return _timed(exchange, load.exchanges, finish)


def _timed(operation: Callable[[], object], times: int, finish: Callable[[], object]) -> float:
    """Return the seconds that an operation takes, after two that do not count."""
    for _ in range(2):
        operation()
    finish()
    began = time.perf_counter()
    for _ in range(times):
        operation()
    finish()
    return (time.perf_counter() - began) / times
