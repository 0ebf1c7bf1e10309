"""`tpt plan`: from a config of any stage that costs something to what it will take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from tpt_megatron.config.experiment import ExperimentConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.experiment.plan import plan_experiment, train_config
from tpt_megatron.launch.gpus import Gpu
from tpt_megatron.launch.plan import TrainingPlan, plan_training
from tpt_megatron.launch.printing import experiment_table, layout_text, memory_table, overrides_of, run_table, search_table
from tpt_megatron.launch.search import search
from tpt_megatron.train.data import open_run_data, resolve_vocabulary


def with_data(config: TrainConfig) -> TrainConfig:
    """Return the config with what its datasets say, where they are there. Those of validation, which change neither length nor memory, may be missing."""
    if not _are_there(config.data.train_paths):
        return config
    wanted = {"validate_every_steps": config.validate_every_steps, "checkpoint": config.checkpoint}
    if config.validate_every_steps and not _are_there(config.data.validation_sets.values()):
        config = config.model_copy(update={"validate_every_steps": 0, "checkpoint": config.checkpoint.model_copy(update={"keep_best": 0})})
    data = open_run_data(config)
    return resolve_vocabulary(data.config, data.opened).model_copy(update=wanted)


def _are_there(prefixes: Iterable[str]) -> bool:
    return all(Path(f"{prefix}.idx").is_file() for prefix in prefixes)


def plan_run(config: TrainConfig, world_size: int, gpu: Gpu, mfu: float) -> tuple[TrainingPlan, list[Table]]:
    """Plan one training run, and return it with what is to be shown."""
    plan = plan_training(config, world_size, gpu, mfu)
    return plan, [run_table(config, plan, gpu), memory_table(plan, gpu)]


def refuse_what_does_not_fit(config: TrainConfig, plan: TrainingPlan, gpu: Gpu) -> None:
    """Raise ConfigError when a rank needs more than its GPU has for it."""
    fullest = plan.fullest
    if fullest.total > gpu.usable:
        raise ConfigError(
            f"{layout_text(config, plan.data_parallel)} does not fit: pipeline stage {fullest.held.pipeline_stage} needs GPUs of {fullest.total / 1e9:.1f} GB, "
            f"and an {gpu.name} has {gpu.usable / 1e9:.1f} GB for it; --search shows layouts that fit"
        )


def plan_search(config: TrainConfig, world_size: int, gpu: Gpu, mfu: float) -> tuple[Table, list[str]]:
    """Return the fastest layouts that fit, and the overrides that make the first one; ConfigError when none fits."""
    if config.model.vocab_size == 0:
        raise ConfigError("model.vocab_size=0 takes the dataset's, which is not there yet; give model.vocab_size, or data.train that exists")
    gpu.check_fp8(config.fp8)
    found, possible = search(config, world_size, gpu, mfu)
    if not possible:
        raise ConfigError(
            f"no layout of this model is possible on {world_size} GPU(s) with global_batch_sequences={config.global_batch_sequences}: data-parallel ranks must "
            f"divide the batch, and layers, heads and tokens the rest; try powers of two"
        )
    if not found:
        raise ConfigError(f"no layout of this model fits on {world_size} x {gpu.name}, of {possible} that are possible; give it more GPUs, or larger ones")
    return search_table(found, possible, world_size, gpu), overrides_of(found[0].config)


def plan_arms(config: ExperimentConfig, world_size: int, gpu: Gpu, mfu: float) -> tuple[TrainConfig, TrainingPlan, list[Table]]:
    """Plan an experiment: the model's memory, which all arms share, and every run's time.

    Where an arm's data are not there yet, only runs of equal tokens are known.
    """
    training = with_data(train_config(config, config.baseline, config.tokens))
    plan, tables = plan_run(training, world_size, gpu, mfu)
    has_data = all(Path(f"{arm.train}.idx").is_file() for arm in config.arms.values())
    runs = [(arm.match, arm.arm, arm.tokens) for arm in plan_experiment(config)] if has_data else _without_data(config, plan)
    return training, plan, [tables[1], experiment_table(config, runs, plan)]


def _without_data(config: ExperimentConfig, plan: TrainingPlan) -> list[tuple[str, str, int | None]]:
    """Return (what is equal, arm, tokens) of every run, as far as these are known."""
    return [(match, arm, plan.tokens if match == "tokens" or arm == config.baseline else None) for match in config.match for arm in config.arms]


def as_json(plan: TrainingPlan, gpu: Gpu) -> str:
    """Return a plan as JSON text."""
    return json.dumps(plan.to_json() | {"gpu": asdict(gpu) | {"usable": gpu.usable}, "fits": plan.fullest.total <= gpu.usable}, indent=2)
