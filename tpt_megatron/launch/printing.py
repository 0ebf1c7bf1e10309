"""Plans as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from tpt_megatron.config.experiment import ExperimentConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.launch.gpus import Gpu
from tpt_megatron.launch.plan import TrainingPlan
from tpt_megatron.launch.search import Found

GB = 1e9


def memory_table(plan: TrainingPlan, gpu: Gpu) -> Table:
    """Return what a rank of each pipeline stage holds; stages that hold the same are one row."""
    usable = f"{gpu.usable / GB:.1f} GB of an {gpu.name}'s {gpu.memory / GB:.1f}"
    table = Table(title="memory of a GPU, GB", caption=f"a plan may fill {usable}; parameters, gradients and optimizer are counted, the others by formula")
    for name in ("stage", "parameters", "weights", "gradients", "optimizer", "activations", "logits", "working", "total"):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, ...], list[int]] = {}
    for stage in plan.stages:
        held, kept = stage.held, stage.activations
        sizes = (held.parameter_bytes + stage.fp8_bytes, held.gradient_bytes, held.optimizer_bytes, kept.kept, kept.logits, kept.working, stage.total)
        rows.setdefault((f"{held.parameters:,}", *(f"{size / GB:.2f}" for size in sizes)), []).append(held.pipeline_stage)
    for cells, stages in rows.items():
        table.add_row(str(stages[0]) if len(stages) == 1 else f"{stages[0]} to {stages[-1]}", *cells)
    return table


def run_table(config: TrainConfig, plan: TrainingPlan, gpu: Gpu) -> Table:
    """Return what the run is, one fact a row."""
    unknown = "unknown without the data" if plan.steps is None else f"unknown: no peak of {gpu.name} at this precision"
    table = Table(title=f"{layout_text(config, plan.data_parallel)} on {plan.world_size:,} x {gpu.name}", show_header=False)
    table.add_column(style="dim")
    table.add_column()
    checkpoints = f"{plan.checkpoint_bytes / GB:,.1f} GB each"
    if plan.checkpoints_kept is not None:
        checkpoints += f"; at most {plan.checkpoints_kept} kept, {plan.checkpoints_kept * plan.checkpoint_bytes / GB:,.0f} GB"
    facts = {
        "parameters": f"{plan.parameters:,}",
        "tokens a step": f"{plan.tokens_a_step:,}: {plan.micro_batches} micro-batch(es) of {config.micro_batch_sequences} sequence(s) a data-parallel rank",
        "steps": unknown if plan.steps is None else f"{plan.steps:,}",
        "tokens": unknown if plan.tokens is None else f"{plan.tokens:,}",
        "pipeline bubble": f"{plan.bubble:.1%} of a step" if plan.bubble else "none",
        "FLOPs": f"{plan.flops_a_token:.4g} a token" + ("" if plan.flops is None else f", {plan.flops:.4g} in all"),
        f"time at MFU {plan.mfu:g}": unknown if plan.seconds is None else f"{_duration(plan.seconds)}, {plan.seconds_a_step:.3g} s a step",
        "GPU-hours": unknown if plan.gpu_hours is None else _hours(plan.gpu_hours),
        "checkpoints": checkpoints,
    }
    for name, fact in facts.items():
        table.add_row(name, fact)
    return table


def search_table(found: Sequence[Found], possible: int, world_size: int, gpu: Gpu) -> Table:
    """Return the layouts that fit, the fastest first."""
    table = Table(
        title=f"layouts for {world_size:,} x {gpu.name}",
        caption=f"{possible:,} layouts are possible. Seconds and MFU are estimates to rank by: what they take for granted is in launch/speed.py",
    )
    for name in ("", "layout", "micro-batch", "recompute", "fullest GPU, GB", "bubble", "s a step", "MFU"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for number, entry in enumerate(found, 1):
        plan = entry.plan
        assert plan.seconds_a_step is not None
        table.add_row(
            str(number),
            layout_text(entry.config, plan.data_parallel),
            str(entry.config.micro_batch_sequences),
            entry.config.recompute,
            f"{plan.fullest.total / GB:.1f}",
            f"{plan.bubble:.1%}",
            f"{entry.time.total:.2f}",
            f"{plan.seconds_a_step * plan.mfu / entry.time.total:.2f}",
        )
    return table


def experiment_table(config: ExperimentConfig, runs: Sequence[tuple[str, str, int | None]], plan: TrainingPlan) -> Table:
    """Return the time on the cluster of every run (what is equal, arm, tokens, None where unknown), of training alone."""
    table = Table(title=f"runs of {config.output}, {len(config.seeds)} seed(s) each", caption="training alone: scoring, and writing the thoughts, come on top")
    for name in ("equal", "arm", "tokens", "time a run", "GPU-hours, all seeds"):
        table.add_column(name, justify="left" if name in ("equal", "arm") else "right")
    for match, arm, tokens in runs:
        seconds = None if plan.seconds_a_step is None or tokens is None else tokens / plan.tokens_a_step * plan.seconds_a_step
        cells = ("unknown", "unknown") if seconds is None else (_duration(seconds), _hours(seconds * plan.world_size * len(config.seeds) / 3600))
        table.add_row(match, arm, "unknown without the data" if tokens is None else f"{tokens:,}", *cells)
    return table


def layout_text(config: TrainConfig, data_parallel: int) -> str:
    """Return a layout as the field writes it: TP4 · PP2 · DP8."""
    parallel = config.parallel
    named = {
        "TP": parallel.tensor_parallel,
        "PP": parallel.pipeline_parallel,
        "VP": parallel.virtual_pipeline,
        "CP": parallel.context_parallel,
        "EP": parallel.expert_parallel,
    }
    axes = [f"{name}{size}" + ("+SP" if name == "TP" and parallel.sequence_parallel else "") for name, size in named.items() if size > 1]
    return " · ".join([*axes, f"DP{data_parallel}"])


def overrides_of(config: TrainConfig) -> list[str]:
    """Return what makes a layout of the config, as the command line takes it."""
    sizes = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "context_parallel", "expert_parallel", "sequence_parallel")
    values = {f"parallel.{name}": getattr(config.parallel, name) for name in sizes}
    values |= {"micro_batch_sequences": config.micro_batch_sequences, "recompute": config.recompute}
    return [f"{name}={str(value).lower()}" for name, value in values.items()]


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} seconds"
