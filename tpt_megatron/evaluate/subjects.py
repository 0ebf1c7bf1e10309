"""What is scored: exported models, and checkpoints of runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tpt_megatron.config.evaluate import EvaluateConfig, ThoughtDelimiters
from tpt_megatron.config.preprocess import Delimiters
from tpt_megatron.datasets import sidecar
from tpt_megatron.errors import CheckpointError, ConfigError, DataError
from tpt_megatron.files import read_json, sha256_of

log = logging.getLogger(__name__)

_ALSO_OF_THE_MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Subject:
    """What is scored: a Hugging Face folder, or a checkpoint that becomes one for the time of scoring.

    `name` names its result files; `fingerprint` changes when its weights do.
    """

    name: str
    path: Path
    fingerprint: str
    step: int | None = None
    tokens_seen: int | None = None
    arm: str | None = None


def find_subjects(config: EvaluateConfig) -> list[Subject]:
    """Return the model, or every checkpoint of the run in the order of steps. CheckpointError and DataError for what is missing or incomplete."""
    if config.model is not None:
        return [_model_subject(config.model)]
    from tpt_megatron.convert.checkpoint_reader import iteration_folders, read_record

    assert config.run_dir is not None, "the config has exactly one of model and run_dir"
    folders = iteration_folders(config.run_dir / "checkpoints")
    if not folders:
        raise CheckpointError(f"{config.run_dir}: holds no finished checkpoint in checkpoints/; train it first, or give an exported folder as model")
    subjects = []
    for folder in folders:
        record, metadata = read_record(folder), folder / ".metadata"
        if not metadata.is_file():
            raise CheckpointError(f"{metadata}: no such file; the checkpoint is incomplete, remove its folder")
        # torch writes an id of its own into the metadata at every save: another run's checkpoint of this step differs.
        subjects.append(Subject(folder.name, folder, sha256_of(metadata), record.step, record.tokens_seen, record.arm))
    return sorted(subjects, key=lambda subject: subject.step or 0)


def _model_subject(model: Path) -> Subject:
    weights = sorted([*model.glob("*.safetensors"), *model.glob("*.bin")])
    if not model.is_dir() or not weights:
        raise DataError(f"{model}: not a Hugging Face model folder (no weights in it); give one, or a run as run_dir")
    others = [model / name for name in _ALSO_OF_THE_MODEL if (model / name).is_file()]
    fingerprint = " ".join(sha256_of(path)[:16] for path in [*weights, *others])
    return Subject(model.resolve().name, model, fingerprint)


def thoughts_of(config: EvaluateConfig) -> ThoughtDelimiters:
    """Return what thoughts stand between: as the config says, as the run's datasets have it where they are still there, or as preprocessing's default.

    ConfigError when the run's datasets have several.
    """
    if config.benchmark_options.thoughts is not None:
        return config.benchmark_options.thoughts
    found = {} if config.run_dir is None else _delimiters_of_datasets(config.run_dir)
    if len(found) > 1:
        listed = ", ".join(f"{opening} and {closing}" for opening, closing in found)
        raise ConfigError(f"benchmark_options.thoughts is missing: the run's datasets have several delimiters ({listed}); say which ones count")
    default = Delimiters()
    opening, closing = next(iter(found), (default.open, default.close))
    log.info(
        "thoughts stand between %s and %s%s", opening, closing, ", as in the run's datasets" if found else "; benchmark_options.thoughts may say otherwise"
    )
    return ThoughtDelimiters(open=opening, close=closing)


def _delimiters_of_datasets(run_dir: Path) -> dict[tuple[str, str], None]:
    """Return the delimiters (open, close) of a run's training datasets, each once; of those that have a manifest that says so."""
    if not (run_dir / "run.json").is_file():
        return {}
    data = (read_json(run_dir / "run.json").get("config") or {}).get("data") or {}
    blends = [data.get("train") or [], *(stage.get("train") or [] for stage in data.get("stages") or [])]
    found: dict[tuple[str, str], None] = {}
    for path in dict.fromkeys(share["path"] for blend in blends for share in blend):
        manifest = sidecar(Path(path), "manifest.json")
        delimiters = read_json(manifest).get("settings", {}).get("delimiters") if manifest.is_file() else None
        if delimiters is not None:
            found[delimiters["open"], delimiters["close"]] = None
    return found
