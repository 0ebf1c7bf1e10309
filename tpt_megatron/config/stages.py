"""Which stage a config is of: the keys say so."""

from __future__ import annotations

from typing import Any

from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.config.evaluate import EvaluateConfig
from tpt_megatron.config.experiment import ExperimentConfig
from tpt_megatron.config.load import Config
from tpt_megatron.config.losses import LossesConfig
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.config.value import ValueConfig

CONFIGS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "augment": AugmentConfig,
    "preprocess": PreprocessConfig,
    "evaluate": EvaluateConfig,
    "experiment": ExperimentConfig,
    "losses": LossesConfig,
    "value": ValueConfig,
}


def likely_stages(values: dict[str, Any]) -> list[str]:
    """Return the stages that know most of these keys: several where the keys do not tell them apart, all for a config without keys."""
    unknown = {stage: len(values.keys() - kind.model_fields.keys()) for stage, kind in CONFIGS.items()}
    if isinstance(values.get("arms"), dict):
        unknown["preprocess"] += 1  # its arms are a list
    return [stage for stage, count in unknown.items() if count == min(unknown.values())]


def kind_to_plan(values: dict[str, Any]) -> str:
    """Return the stage that a config is of; train where its keys do not tell."""
    likely = likely_stages(values)
    return "train" if "train" in likely else likely[0]
