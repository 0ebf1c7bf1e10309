"""Every layout of a model that a cluster of N GPUs allows, those that fit, the fastest first as far as speed.py can tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.launch.activations import activations
from tpt_megatron.launch.gpus import Gpu
from tpt_megatron.launch.plan import TrainingPlan, plan_training
from tpt_megatron.launch.speed import StepTime, step_time
from tpt_megatron.mcore.machine import check_supported_on_cuda
from tpt_megatron.mcore.model import count_parameters

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE = ("none", "full")
CONTEXT = (1, 2, 4, 8, 16)
VIRTUAL = (1, 2, 4, 5, 8)


@dataclass(frozen=True, slots=True)
class Found:
    """A layout that fits: its config, its plan, and the estimated time of a step."""

    config: TrainConfig
    plan: TrainingPlan
    time: StepTime


def search(config: TrainConfig, world_size: int, gpu: Gpu, mfu: float, *, most: int = 10, gpus_per_node: int = 8) -> tuple[list[Found], int]:
    """Return the `most` fastest layouts that fit, and how many were possible at all.

    Kept of the config: model, data, batch, precision, and whether communication is overlapped. Tried: tensor parallelism within a node, always
    with sequence parallelism; pipeline, with and without interleaving; context; experts; micro-batches; and recomputation. Memory is counted for
    those that are shown.
    """
    timed = []
    possible = 0
    for candidate in candidates(config, world_size, gpus_per_node):
        possible += 1
        parameters = _of_rank(candidate)
        if _least_bytes(candidate, world_size, parameters) < gpu.usable:
            timed.append((step_time(candidate, world_size, gpu, parameters, gpus_per_node), candidate))
    timed.sort(key=lambda entry: entry[0].total)
    found: list[Found] = []
    for time, candidate in timed:
        plan = plan_training(candidate, world_size, gpu, mfu)
        if plan.fullest.total <= gpu.usable:
            found.append(Found(candidate, plan, time))
        if len(found) == most:
            break
    return found, possible


def candidates(config: TrainConfig, world_size: int, gpus_per_node: int) -> Iterator[TrainConfig]:
    """Yield the config under every layout that the trainer takes."""
    model = config.model
    base = config.model_dump()
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    tensor = [size for size in sizes if size <= gpus_per_node and model.num_query_groups % size == 0]
    pipeline = [size for size in sizes if model.num_layers % size == 0]
    expert = [1] if model.experts is None else [size for size in sizes if model.experts.num_experts % size == 0]
    for tp, pp, cp, ep in product(tensor, pipeline, CONTEXT, expert):
        # What follows would be refused by the checks below, which take a millisecond each.
        if world_size % (tp * pp * cp) or (world_size // (tp * pp)) % ep or config.global_batch_sequences % (world_size // (tp * pp * cp)):
            continue
        parallel = {"tensor_parallel": tp, "pipeline_parallel": pp, "context_parallel": cp, "expert_parallel": ep, "sequence_parallel": tp > 1}
        each = config.global_batch_sequences // (world_size // (tp * pp * cp))
        for chunks, micro, recompute in product(VIRTUAL if pp > 1 else (1,), MICRO_BATCHES, RECOMPUTE):
            if model.num_layers % (pp * chunks) or each % micro or (chunks > 1 and each // micro % pp):
                continue
            changed = {"parallel": base["parallel"] | parallel | {"virtual_pipeline": chunks}, "micro_batch_sequences": micro, "recompute": recompute}
            candidate = _checked(base | changed, world_size)
            if candidate is not None:
                yield candidate


def _checked(values: dict[str, Any], world_size: int) -> TrainConfig | None:
    try:
        config = TrainConfig.model_validate(values)
        config.check_world(world_size)
        check_supported_on_cuda(config)
    except (ValidationError, ConfigError):
        return None
    return config


def _of_rank(config: TrainConfig) -> int:
    """Return about how many parameters the first rank has: without padding, and less those of experts that other ranks have."""
    model, parallel = config.model, config.parallel
    ends = model.vocab_size * model.hidden_size
    layers = count_parameters(model) - ends * (1 if model.tie_embeddings else 2)
    experts = 0
    if model.experts is not None:
        experts = model.num_layers * model.experts.num_experts * 3 * model.hidden_size * model.experts.ffn_hidden_size
    split = parallel.tensor_parallel * parallel.pipeline_parallel
    return (layers - experts) // split + experts // (split * parallel.expert_parallel) + ends // parallel.tensor_parallel


def _least_bytes(config: TrainConfig, world_size: int, parameters: int) -> float:
    """Return a little less than what the first stage needs, to leave out what cannot fit without building it."""
    width = 2 if config.precision == "bf16" else 4
    shared = world_size // (config.parallel.tensor_parallel * config.parallel.pipeline_parallel) if config.parallel.distributed_optimizer else 1
    state = parameters * (width + 4 + (8 if width == 4 else 12) / shared)
    count = config.global_batch_sequences // (config.micro_batch_sequences * (world_size // config.parallel.model_ranks))
    return 0.97 * state + activations(config, 0, count).kept
