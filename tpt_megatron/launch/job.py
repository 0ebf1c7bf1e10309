"""What is launched: a stage, its config, and the options. Everything that can be refused before a machine is asked for is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.config.launch import LaunchConfig
from tpt_megatron.config.load import Config, apply_override, check_config, read_values
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.config.stages import likely_stages
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError

Stage = Literal["augment", "preprocess", "train"]
_STAGES: dict[Stage, type[Config]] = {"train": TrainConfig, "augment": AugmentConfig, "preprocess": PreprocessConfig}
PREFIX = "launch."


@dataclass(frozen=True, slots=True)
class Job:
    """A command of one stage, to be run on `options.nodes` machines."""

    stage: Stage
    config: TrainConfig | AugmentConfig | PreprocessConfig
    name: str
    overrides: tuple[str, ...]
    options: LaunchConfig

    def arguments(self, *more: str, config: str | None = None) -> list[str]:
        """Return what `tpt` is given: stage, config, overrides. A file has its full path; config: another place of it."""
        path = Path(self.name)
        return [self.stage, config or (str(path.resolve()) if path.is_file() else self.name), *self.overrides, *more]

    @property
    def asks_for_gpus(self) -> bool:
        """Whether machines must have GPUs. preprocess has no use for any; augment has where it runs an engine itself: those who name a number ask for them."""
        named = "gpus_per_node" in self.options.model_fields_set
        return self.options.device == "gpu" and (self.stage == "train" or (self.stage == "augment" and named))


def make_job(name: str, words: Sequence[str], options_file: str | None, flags: dict[str, Any]) -> Job:
    """Return the job that a command line describes: a config's name, `key=value` words, a file of options and flags that count over it.

    Raises ConfigError for what either config refuses, for a layout or batch that the ranks do not divide, and for a config of no stage.
    """
    mine = [word.removeprefix(PREFIX) for word in words if word.startswith(PREFIX)]
    overrides = tuple(word for word in words if not word.startswith(PREFIX))
    values, origin = ({}, "tpt launch") if options_file is None else read_values(options_file)
    values |= {key: value for key, value in flags.items() if value is not None}
    options = check_config(LaunchConfig, _overridden(values, mine), origin)
    stage, config = _load(name, overrides)
    job = Job(stage, config, name, overrides, options)
    if isinstance(config, TrainConfig):
        _check_world(config, options)
    if isinstance(config, PreprocessConfig) and config.shard is not None:
        raise ConfigError(f"shard={config.shard}: tpt launch gives each task its own; leave it out")
    return job


def _overridden(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    for word in words:
        apply_override(values, word)
    return values


def _load(name: str, overrides: Sequence[str]) -> tuple[Stage, Any]:
    """Return the stage whose keys a config has, and the config."""
    values, origin = read_values(name, overrides)
    likely = likely_stages(values)
    fitting = [stage for stage in _STAGES if stage in likely]
    if not fitting:
        instead = "; tpt experiment CONFIG --plan writes one of train for each of its runs" if "experiment" in likely else ""
        raise ConfigError(f"{origin}: a config of tpt {' or '.join(likely)}, and those of train, augment and preprocess are launched{instead}")
    if len(fitting) > 1:
        raise ConfigError(f"{origin}: neither a config of train, nor of augment, nor of preprocess: it has {', '.join(sorted(values)) or 'no keys'}")
    return fitting[0], check_config(_STAGES[fitting[0]], values, origin)


def _check_world(config: TrainConfig, options: LaunchConfig) -> None:
    try:
        config.check_world(options.ranks)
    except ConfigError as error:
        raise ConfigError(f"nodes={options.nodes} x gpus_per_node={options.gpus_per_node} = {options.ranks} rank(s): {error}") from None
