"""What an experiment's runs are: how long each arm is trained so that it matches the baseline, and what that takes.

Tokens are counted in whole sequences, as `tpt train` counts a run's length. With E tokens in an epoch of an arm, D documents in it, f training
FLOPs a token and g FLOPs to write a document's thoughts (0 for an arm without), an arm of T tokens sees D T / E documents and takes

    f T + g D min(1, T / E)

FLOPs: thoughts are written once, however often they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpt_megatron.commands import overrides
from tpt_megatron.config.experiment import ExperimentArm, ExperimentConfig, GeneratorCost, Match
from tpt_megatron.config.load import load_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import MANIFEST_KIND, open_dataset, sidecar
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.files import read_manifest
from tpt_megatron.sequences.stream import Stream
from tpt_megatron.train.flops import flops_per_token


@dataclass(frozen=True, slots=True)
class ArmData:
    """What a matching needs to know of an arm.

    epoch_tokens      tokens of one pass through its dataset, in whole sequences
    documents         in its dataset
    train_flops       of training on one token
    generator_flops   of writing the thoughts of one document, on average; None where nobody said what wrote them
    """

    epoch_tokens: int
    documents: int
    train_flops: float
    generator_flops: float | None

    def documents_seen(self, tokens: float) -> float:
        """Return how many documents training on so many tokens sees, repeated ones each time."""
        return self.documents * tokens / self.epoch_tokens

    def generation(self, tokens: float) -> float | None:
        """Return the FLOPs of writing the thoughts that training on so many tokens reads."""
        return None if self.generator_flops is None else self.generator_flops * self.documents * min(1.0, tokens / self.epoch_tokens)


@dataclass(frozen=True, slots=True)
class PlannedArm:
    """One arm under one matching: `steps` whole steps see `tokens` tokens."""

    match: Match
    arm: str
    steps: int
    tokens: int
    epochs: float
    documents: float
    train_flops: float
    generator_flops: float | None

    @property
    def total_flops(self) -> float | None:
        """Training and writing the thoughts."""
        return None if self.generator_flops is None else self.train_flops + self.generator_flops

    def run_name(self, seed: int) -> str:
        """Return the name of its run; matchings that ask for the same tokens share it."""
        return f"{self.arm}-{self.tokens}-seed{seed}"


def plan_experiment(config: ExperimentConfig) -> list[PlannedArm]:
    """Return every matching's arms, the baseline first.

    Raises ConfigError for a length that no matching can have or that goes through a dataset too often, DataError for datasets that cannot be read.
    """
    data = {name: read_arm(config, name) for name in config.arms}
    base = data[config.baseline]
    names = sorted(config.arms, key=lambda name: name != config.baseline)
    planned = []
    for match in config.match:
        for name in names:
            tokens = float(config.tokens) if name == config.baseline else matched_tokens(match, config.tokens, base, data[name])
            planned.append(_planned(config, match, name, data[name], tokens))
    return planned


def read_arm(config: ExperimentConfig, name: str) -> ArmData:
    """Read what matters of an arm's dataset, and of the model that it trains."""
    arm = config.arms[name]
    training = train_config(config, name, config.tokens)
    dataset = open_dataset(arm.train)
    if dataset.details is None:
        raise DataError(f"{arm.train}: it has no manifest, which says how many documents and thoughts it holds; make it with tpt preprocess")
    counts = read_manifest(sidecar(Path(arm.train), "manifest.json"), MANIFEST_KIND).counts
    stream = Stream(training.data, training.data.blends, {arm.train: dataset}, training.seed)
    model = training.model
    model = model if model.vocab_size else model.model_copy(update={"vocab_size": int(dataset.details["vocabulary_size"])})
    length = training.data.sequence_length
    return ArmData(
        epoch_tokens=stream.sequences_per_epoch(arm.train) * length,
        documents=counts["documents"],
        train_flops=flops_per_token(model, length),
        generator_flops=_generator_flops(config.generator, counts),
    )


def _generator_flops(cost: GeneratorCost | None, counts: Mapping[str, int]) -> float | None:
    thinking = counts.get("tokens_thinking", 0)
    if not thinking:
        return 0.0
    if cost is None:
        return None
    thoughts = counts["documents"] - counts.get("documents_without_thoughts", 0)
    read_and_written = (counts["tokens_document"] + thinking) * cost.tokens_per_token + thoughts * cost.prompt_tokens
    return 2.0 * cost.parameters * read_and_written / cost.thoughts_kept / counts["documents"]


def matched_tokens(match: Match, tokens: int, baseline: ArmData, arm: ArmData) -> float:
    """Return how many tokens an arm is trained on to match a baseline of `tokens`."""
    if match == "tokens":
        return float(tokens)
    if match == "documents":
        return baseline.documents_seen(tokens) / arm.documents * arm.epoch_tokens
    assert arm.generator_flops is not None, "the config asks for the generator's cost"
    budget = baseline.train_flops * tokens + (baseline.generation(tokens) or 0.0)
    written = arm.generator_flops * arm.documents  # all of its thoughts
    within_an_epoch = budget / (arm.train_flops + written / arm.epoch_tokens)
    return within_an_epoch if within_an_epoch <= arm.epoch_tokens else (budget - written) / arm.train_flops


def _planned(config: ExperimentConfig, match: Match, name: str, data: ArmData, wanted: float) -> PlannedArm:
    training = train_config(config, name, max(1, round(wanted)))
    steps = training.last_step
    tokens = training.progress.tokens_after(steps)
    if steps < config.checkpoints:
        raise ConfigError(f"match={match}: {name} would be trained for {steps} step(s), fewer than checkpoints={config.checkpoints}; raise tokens, or lower it")
    epochs, most = tokens / data.epoch_tokens, config.arms[name].max_epochs
    if most is not None and epochs > most:
        fits = int(most * data.epoch_tokens)
        raise ConfigError(
            f"match={match}: {name} would go {epochs:.2f} times through {config.arms[name].train}, over its max_epochs={most:g}; "
            f"{fits:,} of its {tokens:,} tokens fit: lower tokens, or raise max_epochs"
        )
    return PlannedArm(match, name, steps, tokens, epochs, data.documents_seen(tokens), data.train_flops * tokens, data.generation(tokens))


def train_config(config: ExperimentConfig, name: str, tokens: int) -> TrainConfig:
    """Return the training config of an arm, without what is a single run's: run_dir, seed and checkpoints."""
    return load_config(TrainConfig, config.train, _settings(config, config.arms[name], tokens))


def run_config(config: ExperimentConfig, planned: PlannedArm, seed: int) -> TrainConfig:
    """Return the training config of one run."""
    every = max(1, planned.steps // config.checkpoints)
    has_validation = config.arms[planned.arm].validation is not None
    of_run = {
        "run_dir": str(run_dir(config, planned, seed)),
        "seed": seed,
        "checkpoint.every_steps": every,
        "validate_every_steps": every if has_validation else 0,
        "watch.log_every_steps": every,
    }
    return load_config(TrainConfig, config.train, [*_settings(config, config.arms[planned.arm], planned.tokens), *overrides(of_run)])


def run_dir(config: ExperimentConfig, planned: PlannedArm, seed: int) -> Path:
    """Return the folder of one run."""
    return config.output / "runs" / planned.run_name(seed)


def _settings(config: ExperimentConfig, arm: ExperimentArm, tokens: int) -> list[str]:
    data: dict[str, Any] = {"path": arm.train} | ({} if arm.max_epochs is None else {"max_epochs": arm.max_epochs})
    length = {"steps": None, "epochs": None, "tokens": tokens}
    paths = {"run_dir": "unused", "data.train": [data], "data.validation": arm.validation, "validate_every_steps": 0}
    return overrides({**config.override, **arm.override, **paths, **length})
