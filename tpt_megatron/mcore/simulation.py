"""One rank of a job of any size, built for real and without its numbers: parameters, gradients and optimizer as torch's meta tensors.

Process groups are torch's fake ones, which know their ranks and send nothing. What a rank holds is so what the trainer would hold, padding and
shards included, and is counted rather than computed by a formula. A rank of a 70B model on 512 takes a fifth of a second.

Where there is CUDA, other layers are built and on the GPU: a process that simulates hides it first (CUDA_VISIBLE_DEVICES="").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from tpt_megatron.config.parallel import check_world
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import MachineError
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.engine import Engine

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class HeldByRank:
    """What one rank holds from the first step on, in bytes; every byte is in one place only.

    rank, pipeline_stage  which one
    parameters            its number of parameters, the vocabulary's padding included
    parameter_bytes       what the forward pass reads, with the padding of the buffers that they lie in
    gradient_bytes        buffers of gradients, fp32
    optimizer_bytes       fp32 copies of parameters, where these are bf16, and Adam's two moments: of the rank's shard
    """

    rank: int
    pipeline_stage: int
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


def held_by(engine: Engine) -> HeldByRank:
    """Count what an engine holds, real or simulated."""
    counted: set[int] = set()

    def new_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
        total = 0
        for tensor in tensors:
            storage = None if tensor is None else tensor.untyped_storage()
            if storage is not None and storage._cdata not in counted:
                counted.add(storage._cdata)
                total += storage.nbytes()
        return total

    chunks = engine.model
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    adam = [part.optimizer for part in optimizers if part.optimizer is not None]
    return HeldByRank(
        rank=dist.get_rank(),
        pipeline_stage=parallel_state.get_pipeline_model_parallel_rank(),
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=new_bytes(parameters),
        gradient_bytes=new_bytes(buffer.grad_data for buffer in buffers),
        optimizer_bytes=new_bytes(parameter for part in adam for group in part.param_groups for parameter in group["params"])
        + new_bytes(value for part in adam for state in part.state.values() for value in state.values() if torch.is_tensor(value)),
    )


def simulate(config: TrainConfig, world_size: int, ranks: Iterable[int]) -> list[HeldByRank]:
    """Return what some ranks of `world_size` hold.

    `config.model.vocab_size` must be resolved. What FP8 adds is not in it. Raises ConfigError when the layout does not divide the world.
    """
    check_world(config.parallel, world_size)
    plain = config.model_copy(update={"fp8": "none", "fp8_parameters": False})
    found = []
    for rank in ranks:
        with _rank_of(config, world_size, rank):
            found.append(held_by(Engine(plain, kinds=1)))
    return found


def simulate_stages(config: TrainConfig, world_size: int) -> list[HeldByRank]:
    """Return what the first rank of each pipeline stage holds; others of its stage differ by padding alone, if at all.

    The first, second and last stage are built; those between have the second one's layers, as many of them. Raises ConfigError like `simulate`.
    """
    stages = config.parallel.pipeline_parallel
    check_world(config.parallel, world_size)
    in_a_stage = world_size // stages
    chosen = sorted({0, min(1, stages - 1), stages - 1})
    built = dict(zip(chosen, simulate(config, world_size, (stage * in_a_stage for stage in chosen)), strict=True))
    return [built.get(stage) or replace(built[1], rank=stage * in_a_stage, pipeline_stage=stage) for stage in range(stages)]


@contextmanager
def _rank_of(config: TrainConfig, world_size: int, rank: int) -> Iterator[None]:
    """Be rank `rank` of a job that is not there, and make nothing but meta tensors."""
    if torch.cuda.is_available():
        raise MachineError('a rank cannot be simulated in a process that sees a GPU; set CUDA_VISIBLE_DEVICES=""')
    current_device, normal = torch.cuda.current_device, torch.nn.init.normal_
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        torch.cuda.current_device = lambda: _META  # type: ignore[assignment,return-value]  # where megatron-core puts its buffers
        torch.nn.init.normal_ = lambda tensor, *_, **__: tensor  # numbers for no place, and half of the time
        groups.make(config.parallel)
        with _META:
            yield
    finally:
        torch.cuda.current_device, torch.nn.init.normal_ = current_device, normal
        groups.leave()
