"""What a run saves and what it continues from: its checkpoints, and what must be the same for a run to be the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import TokenDataset, sidecar
from tpt_megatron.errors import CheckpointError
from tpt_megatron.mcore import checkpoint
from tpt_megatron.mcore.engine import Engine
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON
from tpt_megatron.train.data import RunData

log = logging.getLogger(__name__)


class Saving:
    """The checkpoints of one run, under run_dir/checkpoints."""

    def __init__(self, config: TrainConfig, engine: Engine, data: RunData) -> None:
        self._config, self._engine, self._data = config, engine, data
        self._checkpoints = config.run_dir / "checkpoints"

    def resume(self) -> tuple[int, int]:
        """Load what there is to continue from; return the number of steps done and the tokens that they saw."""
        step = checkpoint.latest_step(self._checkpoints)
        if step is None:
            if self._config.checkpoint.load_from is not None:
                self._load(self._config.checkpoint.load_from)
            return 0, 0
        folder = checkpoint.iteration_folder(self._checkpoints, step)
        description = self._load(folder)
        if description["step"] != step:
            raise CheckpointError(f"{folder}: it says it holds step {description['step']}, not {step}")
        log.info("%s: continuing after step %d", self._config.run_dir, step)
        return step, int(description["tokens_seen"])

    def _load(self, folder: Path) -> dict[str, Any]:
        description = checkpoint.read_description(folder)
        ours = self._config.model.model_dump(mode="json")
        for key, value in description["model"].items():
            if ours.get(key) != value and not key.endswith(("init_std", "vocab_divisor")):
                raise CheckpointError(
                    f"{folder}: the checkpoint has model.{key}={value}, the config {ours.get(key)}; use the checkpoint's value, or another run_dir"
                )
        if description["precision"] != self._config.precision:
            raise CheckpointError(f"{folder}: the checkpoint was trained in {description['precision']}, the config says precision={self._config.precision}")
        if folder.parent == self._checkpoints and description["data"] != self._data_fingerprint():
            differs = ", ".join(sorted(_differing(description["data"], self._data_fingerprint())))
            read = ", ".join(self._config.data.train_paths)
            raise CheckpointError(f"{folder}: the run was trained on other data than {read} as this config reads it ({differs}); use that, or another run_dir")
        checkpoint.load_checkpoint(self._engine, folder)
        return description

    def _data_fingerprint(self) -> dict[str, Any]:
        return {**self._data.train.stream.fingerprint(), "global_batch_sequences": self._config.global_batch_sequences}

    def save(self, step: int, tokens_seen: int) -> None:
        """Write a checkpoint of what the engine holds after `step`, and make it the latest."""
        config, datasets = self._config, self._data.datasets
        path, details = next(((path, dataset.details) for path, dataset in datasets.items() if dataset.details is not None), ("", None))
        keys = ("tokenizer_fingerprint", "end_of_document", "eod_id", "vocabulary_size")
        tokenizer = None if details is None else {key.removeprefix("tokenizer_"): details[key] for key in keys}
        beside = {name: sidecar(Path(path or config.data.train_paths[0]), name) for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL)}
        checkpoint.save_checkpoint(
            self._engine,
            self._checkpoints,
            step,
            {
                "tokens_seen": tokens_seen,
                "model": config.model.model_dump(mode="json"),
                "sequence_length": config.data.sequence_length,
                "precision": config.precision,
                "arm": arm_of(datasets),
                "tokenizer": tokenizer,
                "data": self._data_fingerprint(),
            },
            {name: path for name, path in beside.items() if path.is_file()},
        )


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    return {key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)}


def arm_of(datasets: Mapping[str, TokenDataset]) -> str | None:
    """Return the arm that the datasets' manifests name, several joined by +; None without a manifest."""
    return "+".join(dict.fromkeys(str(dataset.details["arm"]) for dataset in datasets.values() if dataset.details is not None)) or None
