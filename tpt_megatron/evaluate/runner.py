"""`tpt evaluate`: which models are scored, what is already there, and what is written."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from tpt_megatron.config.evaluate import EvaluateConfig
from tpt_megatron.errors import CheckpointError, DataError, MachineError
from tpt_megatron.evaluate.problems import Problem, read_problems
from tpt_megatron.evaluate.score import Sample, fill_template, mark, summarise
from tpt_megatron.files import open_atomic, sha256_of, write_json
from tpt_megatron.log import progress_bar

if TYPE_CHECKING:
    from tpt_megatron.evaluate.generate import Generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is scored: a Hugging Face folder, or a checkpoint that becomes one for the time of scoring.

    `name` names its result files; `fingerprint` changes when its weights do.
    """

    name: str
    path: Path
    fingerprint: str
    is_checkpoint: bool
    step: int | None = None
    tokens_seen: int | None = None
    arm: str | None = None


def run_evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Score a model or every checkpoint of a run; return the results in the order of steps.

    Writes OUTPUT/NAME.json and OUTPUT/NAME.samples.jsonl for each, NAME being `iter_0000100` or the model folder's name.
    Results found there for the same weights, problems and settings are taken as they are.

    Raises MachineError without transformers, RecordError and DataError for problems and models that cannot be read,
    CheckpointError for a run without a checkpoint, ConversionError for one that cannot be exported.
    """
    _require_packages()
    problems = read_problems(config.problems, config.answer_field, config.limit)
    prompts = {name: [fill_template(task.prompt, problem) for problem in problems] for name, task in config.tasks.items()}
    subjects = _subjects(config)
    output = config.output or (config.run_dir or subjects[0].path) / "evaluation"
    results = []
    for subject in subjects:
        settings = _settings(config, subject)
        result = _finished_result(output, subject, settings)
        if result is not None:
            log.info("%s: already evaluated with these settings", subject.name)
        else:
            with _hugging_face_folder(subject, output) as folder:
                samples = _answer_all(folder, config, problems, prompts, subject.name)
            result = _write(output, subject, settings, samples, len(problems))
            log.info("%s: %s", subject.name, ", ".join(f"{task} {summary['accuracy']:.3f}" for task, summary in result["tasks"].items()))
        results.append(result)
    return results


def _require_packages() -> None:
    for package in ("torch", "transformers", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MachineError(f"{package} is not installed; evaluation needs it: pip install 'tpt-megatron[evaluate]'")


def _subjects(config: EvaluateConfig) -> list[Subject]:
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
        subjects.append(Subject(folder.name, folder, sha256_of(metadata), True, record.step, record.tokens_seen, record.arm))
    return sorted(subjects, key=lambda subject: subject.step or 0)


def _model_subject(model: Path) -> Subject:
    weights = sorted([*model.glob("*.safetensors"), *model.glob("*.bin")])
    if not model.is_dir() or not weights:
        raise DataError(f"{model}: not a Hugging Face model folder (no weights in it); give one, or a run as run_dir")
    fingerprint = " ".join(sha256_of(path)[:16] for path in [*weights, *model.glob("config.json")])
    return Subject(model.resolve().name, model, fingerprint, False)


@contextmanager
def _hugging_face_folder(subject: Subject, output: Path) -> Iterator[Path]:
    """Yield the subject's model folder; a checkpoint's is made beside the results, where there is room, and removed."""
    if not subject.is_checkpoint:
        yield subject.path
        return
    from tpt_megatron.convert.export import export_checkpoint

    output.mkdir(parents=True, exist_ok=True)
    for leftover in output.glob(f".{subject.name}.*"):  # of an evaluation that was killed
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=f".{subject.name}.", dir=output) as temporary:
        folder = Path(temporary) / "hf"
        export_checkpoint(subject.path, folder)
        yield folder


def _answer_all(folder: Path, config: EvaluateConfig, problems: list[Problem], prompts: dict[str, list[str]], title: str) -> list[Sample]:
    from tpt_megatron.evaluate.generate import Generator

    generator: Generator = Generator(folder, config.dtype)
    samples: list[Sample] = []
    with progress_bar(title, total=len(problems) * len(prompts)) as bar:
        for name, task in config.tasks.items():
            bar.say(name)
            continuations = generator.continue_all(prompts[name], max_new_tokens=task.max_new_tokens, batch_size=config.batch_size, advance=bar.advance)
            samples += [
                mark(problem, name, task.answer_pattern, prompt, continuation.text, continuation.new_tokens)
                for problem, prompt, continuation in zip(problems, prompts[name], continuations, strict=True)
            ]
    return samples


def _settings(config: EvaluateConfig, subject: Subject) -> dict[str, Any]:
    """Return all that decides the scores. batch_size is not among it."""
    return {
        "problems": {"name": str(config.problems), "sha256": sha256_of(config.problems)},
        "answer_field": config.answer_field,
        "limit": config.limit,
        "tasks": {name: task.model_dump(mode="json") for name, task in config.tasks.items()},
        "dtype": config.dtype,
        "weights": subject.fingerprint,
    }


def _result_paths(output: Path, subject: Subject) -> tuple[Path, Path]:
    return output / f"{subject.name}.json", output / f"{subject.name}.samples.jsonl"


def _finished_result(output: Path, subject: Subject, settings: dict[str, Any]) -> dict[str, Any] | None:
    result_path, samples_path = _result_paths(output, subject)
    if not result_path.is_file() or not samples_path.is_file():
        return None
    try:
        result = json.loads(result_path.read_bytes())
    except ValueError:
        return None  # it is made again and replaced
    return result if isinstance(result, dict) and result.get("settings") == settings else None


def _write(output: Path, subject: Subject, settings: dict[str, Any], samples: list[Sample], problems: int) -> dict[str, Any]:
    """Write the samples, then the result: a result that is there is whole."""
    result_path, samples_path = _result_paths(output, subject)
    result = {
        "model": str(subject.path),
        "step": subject.step,
        "tokens_seen": subject.tokens_seen,
        "arm": subject.arm,
        "problems": problems,
        "tasks": {task: summarise([sample for sample in samples if sample.task == task]) for task in settings["tasks"]},
        "settings": settings,
    }
    result_path.unlink(missing_ok=True)
    with open_atomic(samples_path) as file:
        for sample in samples:
            file.write(orjson.dumps(sample.as_record(), option=orjson.OPT_APPEND_NEWLINE))
    write_json(result_path, result)
    return result
