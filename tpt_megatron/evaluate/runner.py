"""`tpt evaluate`: what is asked of every model, what is already there, and what is written."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from tpt_megatron.config.evaluate import EvaluateConfig, ThoughtDelimiters
from tpt_megatron.errors import ConfigError, MachineError
from tpt_megatron.evaluate.exports import model_folder, remove_stale_exports
from tpt_megatron.evaluate.problems import Problem, read_problems
from tpt_megatron.evaluate.score import Sample, fill_template, mark, summarise
from tpt_megatron.evaluate.stopping import stops_noticed
from tpt_megatron.evaluate.subjects import Subject, find_subjects, thoughts_of
from tpt_megatron.files import open_atomic, sha256_of, write_json
from tpt_megatron.log import progress_bar

if TYPE_CHECKING:
    from tpt_megatron.evaluate.benchmarks.harness import Benchmark
    from tpt_megatron.evaluate.generate import Generator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What is asked of every model. prompts: of each task, one a problem; check: raises Stopped when a signal came."""

    config: EvaluateConfig
    problems: list[Problem]
    prompts: dict[str, list[str]]
    benchmarks: list[Benchmark]
    thoughts: ThoughtDelimiters
    output: Path
    check: Callable[[], None]


def run_evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Score a model or every checkpoint of a run; return the results in the order of steps.

    Writes OUTPUT/NAME.json and OUTPUT/NAME.samples.jsonl for each, NAME being `iter_0000100` or the model folder's name.
    Results found there for the same weights, problems and settings are taken as they are. What benchmarks were answered is
    in OUTPUT/journal/NAME, from which a killed run goes on.

    Raises MachineError without transformers or what benchmarks need, ConfigError for benchmarks that do not fit, and where another process works in the
    output, RecordError and DataError for problems and models that cannot be read, CheckpointError for a run without a checkpoint, ConversionError for
    one that cannot be exported, and Stopped after a signal.
    """
    _require_packages(config)
    problems = [] if config.problems is None else read_problems(config.problems, config.answer_field, config.limit)
    prompts = {name: [fill_template(task.prompt, problem) for problem in problems] for name, task in config.tasks.items()}
    subjects = find_subjects(config)
    benchmarks = _prepare(config)
    output = config.output or (config.run_dir or subjects[0].path) / "evaluation"
    with _alone(output), stops_noticed() as check:
        remove_stale_exports(output)
        evaluation = Evaluation(config, problems, prompts, benchmarks, thoughts_of(config), output, check)
        return [_evaluate(evaluation, subject) for subject in subjects]


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Refuse to work where another run does: each would ask what the other does, and take its half-written lines for a killed run's (ConfigError)."""
    output.mkdir(parents=True, exist_ok=True)
    lock = os.open(output, os.O_RDONLY)  # the system releases it when the process ends, however that is
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output={output}: another tpt evaluate is at work there; wait for it, or give another output") from None
        yield
    finally:
        os.close(lock)


def _evaluate(evaluation: Evaluation, subject: Subject) -> dict[str, Any]:
    settings = _settings(evaluation, subject)
    result = _finished_result(evaluation.output, subject, settings)
    if result is not None:
        log.info("%s: already evaluated with these settings", subject.name)
        return result
    with model_folder(subject.path, evaluation.output) as folder:
        summaries, records = _ask(evaluation, subject, folder)
    evaluation.check()
    result = _write(evaluation, subject, settings, summaries, records)
    log.info("%s: %s", subject.name, scores_line(result))
    return result


def scores_line(result: dict[str, Any]) -> str:
    """Return a result's scores as a person reads them; those whose extraction failed often with their share."""
    said = []
    for name, task in result["tasks"].items():
        score = "see metrics" if task["accuracy"] is None else f"{task['accuracy']:.3f}"
        failed = task.get("failed_extractions", 0) / max(1, task.get("problems", result["problems"]))
        said.append(f"{name} {score}" + (f" ({failed:.0%} without an answer)" if failed >= 0.01 else ""))
    return "  ".join(said)


def _require_packages(config: EvaluateConfig) -> None:
    needed = [("torch", "evaluate"), ("transformers", "evaluate"), ("safetensors", "evaluate")]
    if config.benchmarks:
        needed.append(("lm_eval", "benchmarks"))
        needed += [("math_verify", "benchmarks")] if any(benchmark.name == "math" for benchmark in config.benchmarks) else []
        needed += [("vllm", "vllm")] if config.benchmark_options.backend == "vllm" else []
    for package, extra in needed:
        if importlib.util.find_spec(package) is None:
            raise MachineError(f"{package} is not installed; this evaluation needs it: pip install 'tpt-megatron[{extra}]'")


def _prepare(config: EvaluateConfig) -> list[Benchmark]:
    if not config.benchmarks:
        return []
    from tpt_megatron.evaluate.benchmarks.harness import prepare

    return prepare(config)


def _ask(evaluation: Evaluation, subject: Subject, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return summaries by task or benchmark, and a record of every problem. Benchmarks come first: their answers are kept as they come."""
    config, generator = evaluation.config, None
    if config.benchmark_options.backend == "transformers":
        from tpt_megatron.evaluate.generate import Generator

        generator = Generator(folder, config.dtype, config.benchmark_options.device)
    summaries: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    if evaluation.benchmarks:
        from tpt_megatron.evaluate.benchmarks.run import ask_benchmarks

        summaries, records = ask_benchmarks(evaluation, subject, folder, generator)
    if generator is None or not config.tasks:
        return summaries, records
    samples = _answer_all(generator, evaluation, subject.name)
    of_tasks = {task: summarise([sample for sample in samples if sample.task == task]) for task in config.tasks}
    return of_tasks | summaries, [sample.as_record() for sample in samples] + records


def _answer_all(generator: Generator, evaluation: Evaluation, title: str) -> list[Sample]:
    problems, prompts, batch_size = evaluation.problems, evaluation.prompts, evaluation.config.batch_size
    samples: list[Sample] = []
    with progress_bar(title, total=len(problems) * len(prompts)) as bar:
        for name, task in evaluation.config.tasks.items():
            bar.say(name)
            continuations = generator.continue_all(prompts[name], max_new_tokens=task.max_new_tokens, batch_size=batch_size, advance=bar.advance)
            samples += [
                mark(problem, name, task.answer_pattern, prompt, continuation.text, continuation.new_tokens)
                for problem, prompt, continuation in zip(problems, prompts[name], continuations, strict=True)
            ]
    return samples


def _settings(evaluation: Evaluation, subject: Subject) -> dict[str, Any]:
    """Return all that decides the scores. batch_size and the device are not among it."""
    config = evaluation.config
    settings: dict[str, Any] = {
        "problems": None if config.problems is None else {"name": str(config.problems), "sha256": sha256_of(config.problems)},
        "answer_field": config.answer_field,
        "limit": config.limit,
        "tasks": {name: task.model_dump(mode="json") for name, task in config.tasks.items()},
        "dtype": config.dtype,
        "weights": subject.fingerprint,
    }
    if evaluation.benchmarks:
        options = config.benchmark_options.model_dump(mode="json", exclude={"device"}) | {"thoughts": evaluation.thoughts.model_dump()}
        settings |= {"benchmarks": [benchmark.settings for benchmark in evaluation.benchmarks], "benchmark_options": options}
    return settings


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


def _write(evaluation: Evaluation, subject: Subject, settings: dict[str, Any], summaries: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the samples, then the result: a result that is there is whole."""
    result_path, samples_path = _result_paths(evaluation.output, subject)
    result = {
        "model": str(subject.path),
        "step": subject.step,
        "tokens_seen": subject.tokens_seen,
        "arm": subject.arm,
        "problems": len(evaluation.problems),
        "tasks": summaries,
        "settings": settings,
    }
    result_path.unlink(missing_ok=True)
    with open_atomic(samples_path) as file:
        for record in records:
            file.write(orjson.dumps(record, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
    write_json(result_path, result)
    return result
