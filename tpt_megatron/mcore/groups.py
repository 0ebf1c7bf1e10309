"""Process groups: joining the job, and the few questions about ranks that other rooms may ask."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from tpt_megatron.config.parallel import ParallelConfig, check_world
from tpt_megatron.errors import TptError
from tpt_megatron.processes import die_with_parent


@dataclass(frozen=True, slots=True)
class Layout:
    """This rank's place in the job."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int


def join(parallel: ParallelConfig) -> Layout:
    """Join the job that torchrun describes in the environment, or be a job of one; make megatron-core's groups.

    Backend: nccl on CUDA, gloo on CPU. Raises ConfigError when the layout does not fit the world.
    """
    for key, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, alone)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())  # torchrun's agent, which, killed, would leave its ranks to go on
    world_size = int(os.environ["WORLD_SIZE"])
    check_world(parallel, world_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    else:
        backend = "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    else:
        dist.init_process_group(backend, store=_store_of_this_attempt(), rank=int(os.environ["RANK"]), world_size=world_size)
    make(parallel)
    return Layout(
        rank=dist.get_rank(),
        world_size=world_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def make(parallel: ParallelConfig) -> None:
    """Make megatron-core's groups of the ranks that there are."""
    parallel_state.initialize_model_parallel(
        parallel.tensor_parallel,
        parallel.pipeline_parallel,
        parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context_parallel,
        expert_model_parallel_size=parallel.expert_parallel,
        create_gloo_process_groups=False,
    )


def _store_of_this_attempt() -> Store:
    """Return the store in which ranks find each other, without what an attempt before left in it.

    torchrun's agent keeps one store over all restarts (pytorch issue 135712), where a rank that it restarted would find the addresses of the dead.
    It counts restarts on each node apart, so that only the ranks of one node can tell attempts apart by that; docs/train.md says what helps on several.
    """
    store, _, _ = next(rendezvous("env://"))
    on_one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store) if on_one_node else store


def leave() -> None:
    """Leave the job: take the process groups down, with the sockets that what is left of an engine would hold."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()


def any_rank(flag: bool) -> bool:
    """Say whether any rank says so; every rank must ask at the same point."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answer = torch.tensor([int(flag)], device=device)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer.item())


T = TypeVar("T")


def from_rank_0(value: T) -> T:
    """Return rank 0's value on every rank; every rank must ask at the same point."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def ask_rank_0(question: Callable[[], T]) -> T:
    """Have rank 0 alone call `question`, and return its answer, or raise its TptError or OSError, on every rank; every rank must ask at the same point."""
    answer: T | None = None
    problem: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer = question()
        except (TptError, OSError) as error:
            problem = error
    answer, problem = from_rank_0((answer, problem))
    if problem is not None:
        raise problem
    return answer  # type: ignore[return-value]
