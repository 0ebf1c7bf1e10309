"""`tpt experiment`: plan the runs, train and score each, compare what matches. Every stage is the command that a user would type."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.markup import escape
from rich.table import Table

from tpt_megatron import commands
from tpt_megatron.config.experiment import ExperimentConfig
from tpt_megatron.errors import ConfigError
from tpt_megatron.experiment.plan import PlannedArm, plan_experiment, run_config, run_dir
from tpt_megatron.files import read_json, write_json, write_text
from tpt_megatron.log import console

PLAN = "plan.json"
FREE = ("seeds", "match", "notes", "difficulty", "difficulty_field", "evaluate_with", "ranks")
"""Keys that may change when an experiment goes on: they add runs, or change none."""


def prepare(config: ExperimentConfig) -> list[PlannedArm]:
    """Plan the runs, and write OUTPUT/plan.json, a training config for each run in configs/, and commands.sh, which does all of it.

    Raises ConfigError where OUTPUT holds another experiment or the arms cannot be matched, and DataError for datasets that cannot be read.
    """
    _claim(config)
    planned = plan_experiment(config)
    for arm, seed in _runs(config, planned):
        values = run_config(config, arm, seed).model_dump(mode="json", exclude_defaults=True)
        write_text(_config_path(config, arm, seed), yaml.safe_dump(values, sort_keys=False, width=160))
    write_json(config.output / PLAN, {"experiment": config.model_dump(mode="json"), "arms": [_as_data(arm) for arm in planned]})
    script = (f"# {title}\n{shlex.join(command)}\n" for title, command in _commands(config, planned))
    write_text(config.output / "commands.sh", "#!/bin/sh\nset -e\n" + "".join(script))
    return planned


def carry_out(config: ExperimentConfig, planned: list[PlannedArm]) -> None:
    """Do what commands.sh says; what is finished is not done again. TptError when a command fails; its own message is above."""
    for title, command in _commands(config, planned):
        console.print(f"\n[bold cyan]{escape(title)}[/]")
        commands.run(command, leave_out=config.notes)


def plan_table(config: ExperimentConfig, planned: list[PlannedArm]) -> Table:
    """Return the plan for the terminal: what training and writing the thoughts take, over what the baseline takes in all."""
    runs = len(list(_runs(config, planned)))
    caption = "training, thoughts, both: FLOPs over the baseline's; thoughts are not known without generator.parameters"
    table = Table(title=f"{runs} runs of {config.output}", title_justify="left", caption=caption, caption_justify="left")
    for column in ("equal", "arm", "tokens", "steps", "epochs", "documents", "training", "thoughts", "both"):
        table.add_column(column, justify="left" if column in ("equal", "arm") else "right")
    of_baseline = {arm.match: arm for arm in planned if arm.arm == config.baseline}
    for arm in planned:
        whole = of_baseline[arm.match].total_flops
        flops = (arm.train_flops, arm.generator_flops, arm.total_flops)
        relative = ("?" if whole is None or value is None else f"{value / whole:.2f}" for value in flops)
        table.add_row(arm.match, arm.arm, f"{arm.tokens:,}", f"{arm.steps:,}", f"{arm.epochs:.2f}", f"{arm.documents:,.0f}", *relative)
    return table


def _as_data(arm: PlannedArm) -> dict[str, object]:
    names = ("match", "arm", "steps", "tokens", "epochs", "documents", "train_flops", "generator_flops")
    return {name: getattr(arm, name) for name in names}


def _runs(config: ExperimentConfig, planned: list[PlannedArm]) -> Iterator[tuple[PlannedArm, int]]:
    """Yield every run once, seed by seed, so that what is finished first can be compared."""
    for seed in config.seeds:
        yield from {arm.run_name(seed): (arm, seed) for arm in planned}.values()


def _commands(config: ExperimentConfig, planned: list[PlannedArm]) -> Iterator[tuple[str, list[str]]]:
    """Yield all commands in their order, each with a title."""
    for arm, seed in _runs(config, planned):
        what = f"{arm.arm}, {arm.tokens:,} tokens, seed {seed}"
        yield f"Train: {what}", commands.torchrun(config.ranks, "train", str(_config_path(config, arm, seed)))
        evaluation = config.arms[arm.arm].evaluate
        if evaluation is not None:
            settings = commands.overrides({**config.evaluate_with, "run_dir": str(run_dir(config, arm, seed))})
            yield f"Evaluate: {what}, every checkpoint", commands.tpt("evaluate", evaluation, *settings)
    for match in config.match:
        folders = [str(run_dir(config, arm, seed)) for arm in planned if arm.match == match for seed in config.seeds]
        costs = [] if config.generator is None else ["--costs", str(config.output / PLAN)]
        hard = [] if config.difficulty is None else ["--difficulty", str(config.difficulty)]
        hard += [] if config.difficulty_field is None else ["--difficulty-field", config.difficulty_field]
        notes = [] if config.notes is None else ["--notes", config.notes]
        yield f"Compare: equal {match}", commands.tpt("compare", *folders, "--output", str(report_folder(config.output, match)), *costs, *hard, *notes)


def report_folder(output: Path, match: str) -> Path:
    """Return the folder of the report on the runs that have as much of `match`."""
    return output / f"report-{match}"


def _config_path(config: ExperimentConfig, arm: PlannedArm, seed: int) -> Path:
    return config.output / "configs" / f"{arm.run_name(seed)}.yaml"


def _claim(config: ExperimentConfig) -> None:
    """Refuse a folder that holds another experiment (ConfigError)."""
    path = config.output / PLAN
    if not path.is_file():
        return
    written, now = read_json(path), config.model_dump(mode="json")
    before = written.get("experiment") if isinstance(written, dict) else None
    if not isinstance(before, dict):
        raise ConfigError(f"{path}: not a plan of tpt experiment; give another output")
    if differing := [key for key in now if key not in FREE and before.get(key) != now[key]]:
        raise ConfigError(f"{config.output}: holds an experiment with another {', '.join(differing)}; give another output, or remove it")
