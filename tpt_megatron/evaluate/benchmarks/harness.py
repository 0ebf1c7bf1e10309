"""Benchmarks as lm-eval runs them: its tasks, made once for all checkpoints, its evaluation, and what becomes of its results."""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tpt_megatron.config.evaluate import BenchmarkConfig, EvaluateConfig
from tpt_megatron.errors import ConfigError, DataError, TptError
from tpt_megatron.evaluate.benchmarks.asking import Asked, JournalledModel
from tpt_megatron.evaluate.benchmarks.data import load_splits
from tpt_megatron.evaluate.benchmarks.scoring import mark
from tpt_megatron.evaluate.score import Sample, summarise

TASKS = Path(__file__).parent / "tasks"
_SCORES = ("exact_match", "acc", "acc_norm", "f1")
"""Metrics between 0 and 1 that stand for a task of lm-eval's own, the first that it has."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is ready to be asked.

    loaded    what lm-eval's task manager made: tasks by name, and groups
    settings  what decides its scores
    limit     problems of each task, None for all
    """

    config: BenchmarkConfig
    loaded: dict[str, Any]
    settings: dict[str, Any]
    limit: int | None


def prepare(config: EvaluateConfig) -> list[Benchmark]:
    """Read and check the data of every benchmark of a config, and make lm-eval's tasks.

    Raises ConfigError for a name that lm-eval does not know and for keys that do not fit a task, RecordError and DataError for data.
    """
    with lm_eval_quiet():
        return [_prepare(benchmark, config) for benchmark in config.benchmarks]


def _prepare(benchmark: BenchmarkConfig, config: EvaluateConfig) -> Benchmark:
    loaded = _packaged(benchmark) if benchmark.is_packaged else _of_lm_eval(benchmark)
    tasks = loaded["tasks"]
    limit = benchmark.limit or config.limit or None
    most = benchmark.max_new_tokens or (config.benchmark_options.max_new_tokens if benchmark.is_packaged else None)
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise _beyond_us(benchmark, name)
        if most is not None and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", {"max_gen_toks": most}, update=True)
        if not benchmark.is_packaged:
            if benchmark.num_shots is not None:
                task.set_config("num_fewshot", benchmark.num_shots)
            elif task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
    settings = {
        "name": benchmark.name,
        "tasks": {name: {"version": task.VERSION, "num_shots": _shots(task), "data": _fingerprint(task)} for name, task in tasks.items()},
        "limit": limit,
        "max_new_tokens": most,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    return Benchmark(benchmark, loaded, settings, limit)


def _packaged(benchmark: BenchmarkConfig) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    about = {"data": str(benchmark.data), "shots": None if benchmark.shots is None else str(benchmark.shots), "num_shots": benchmark.num_shots}
    metadata = {key: value for key, value in about.items() if value is not None}
    return dict(TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata).load([benchmark.name]))


def _of_lm_eval(benchmark: BenchmarkConfig) -> dict[str, Any]:
    manager = _all_tasks()
    key = f"benchmarks: name={benchmark.name!r}"
    if benchmark.name not in manager.task_index:
        near = difflib.get_close_matches(benchmark.name, manager.all_tasks, n=3)
        hint = f"; do you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
        raise ConfigError(f"{key} is none of this package's (gsm8k, math, mmlu, mmlu_pro, boolq), and no task of lm-eval's{hint}")
    if (manager.task_index[benchmark.name].cfg or {}).get("unsafe_code"):  # it would fail to load, and say something else
        raise _beyond_us(benchmark, benchmark.name)
    wanted: Any = benchmark.name
    if benchmark.data is not None:
        wanted = {"group": "local", "task": [{"task": benchmark.name, **_from_files(benchmark, manager.task_index[benchmark.name])}]}
    try:
        loaded = dict(manager.load([wanted]))
    except TptError:
        raise
    except Exception as error:  # noqa: BLE001  data sets that are not there fail in as many ways as there are libraries
        if benchmark.data is not None:
            raise DataError(f"{benchmark.data}: {benchmark.name} of lm-eval cannot use these records ({_first_line(error)})") from None
        reason = _first_line(error)
        raise DataError(f"{key}: lm-eval cannot load it without a network ({reason}); give its data as local files, or have its data set cached") from None
    return loaded if benchmark.data is None else {"tasks": loaded["tasks"], "groups": {}}


def _beyond_us(benchmark: BenchmarkConfig, task: str) -> ConfigError:
    return ConfigError(f"benchmarks: name={benchmark.name!r}: {task} runs code that a model writes, or shows pictures or sounds; this command does neither")


@cache
def _all_tasks() -> Any:
    """Return lm-eval's index of all its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _from_files(benchmark: BenchmarkConfig, entry: Any) -> dict[str, Any]:
    """Return what has an lm-eval task read local files: a function for its data, and where they are for its metadata."""
    cfg, data = entry.cfg or {}, benchmark.data
    assert data is not None, "called for benchmarks with data"
    asked = cfg.get("test_split") or cfg.get("validation_split")
    if entry.kind.name != "TASK" or asked is None:
        raise ConfigError(f"benchmarks: name={benchmark.name!r}: lm-eval reads the data of this one by itself; remove data, or name one of its tasks")
    files = {asked: data}
    examples = cfg.get("fewshot_split") or cfg.get("training_split") or (cfg.get("validation_split") if cfg.get("test_split") else None)
    num_shots = cfg.get("num_fewshot") if benchmark.num_shots is None else benchmark.num_shots
    if num_shots and benchmark.shots is None:
        raise ConfigError(f"benchmarks: name={benchmark.name!r}: key 'shots' is missing, for its {num_shots} examples; or give num_shots=0")
    for split in {examples, cfg.get("training_split")} - {None, asked}:
        files[split] = benchmark.shots or data
    return {"custom_dataset": load_splits, "dataset_kwargs": {"files": files}}


def _shots(task: Any) -> int:
    metadata = task.get_config("metadata") or {}
    return int(metadata.get("num_shots", task.get_config("num_fewshot") or 0))


def _fingerprint(task: Any) -> str:
    """Return the SHA-256 of what a task asks, and of what it may show before."""
    digest = hashlib.sha256()
    examples = (task.fewshot_docs() or []) if (task.get_config("num_fewshot") or 0) > 0 else []
    for problem in chain(task.eval_docs, examples):
        digest.update(json.dumps(problem, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def run_benchmark(benchmark: Benchmark, model: JournalledModel, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Have lm-eval ask and mark a benchmark; return its summary, and a record of each problem.

    The summary has `accuracy`, None where the task has no score between 0 and 1; `problems`; `metrics` as lm-eval gives them; and of this package's
    benchmarks what samples say: correct, failed_extractions, mean_new_tokens and the like.
    """
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    np.random.seed(seed)
    for task in benchmark.loaded["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    model.asked = []
    with lm_eval_quiet():
        found: Any = evaluate(model, benchmark.loaded, limit=benchmark.limit, bootstrap_iters=0, log_samples=True)
    metrics = {
        f"{name}/{metric}": float(value)
        for name, of_task in found["results"].items()
        for metric, value in of_task.items()
        if isinstance(value, int | float) and metric != "sample_len"
    }
    about = {"problems": sum(counts["effective"] for counts in found["n-samples"].values()), "metrics": metrics}
    if benchmark.config.is_packaged:
        samples = _samples(benchmark.config.name, found["samples"][benchmark.config.name], model.asked)
        summary = summarise(samples) | _how_it_went(model.asked) | about
        assert summary["accuracy"] == metrics[f"{benchmark.config.name}/accuracy,none"], "lm-eval and the samples disagree"
        return summary, [sample.as_record() for sample in samples]
    records = [_record(benchmark, name, sample) for name, of_task in found["samples"].items() for sample in of_task]
    tokens = sum(asked.new_tokens for asked in model.asked) / len(model.asked) if model.asked else None
    return {"accuracy": _accuracy(benchmark.config.name, found["results"]), "mean_new_tokens": tokens} | _how_it_went(model.asked) | about, records


def _samples(name: str, of_lm_eval: list[dict[str, Any]], asked: list[Asked]) -> list[Sample]:
    """Return the samples in the order of problems, which is that of requests. `continuation` is all that was written."""
    samples = []
    for record, how in zip(of_lm_eval, asked, strict=True):
        problem = record["doc"]
        found = mark(name, record["filtered_resps"][0], problem)
        correct = bool(record["accuracy"])
        samples.append(Sample(problem["id"], name, how.prompt, how.text, found.extracted, problem["answer"], correct, how.new_tokens))
    return samples


def _how_it_went(asked: list[Asked]) -> dict[str, int]:
    """Return the counts that explain a low score: continuations without an end, thoughts that were never closed, prompts that had no room."""
    if not asked:
        return {}
    return {
        "reached_limit": sum(how.ended == "length" for how in asked),
        "open_thoughts": sum(how.is_thought_open for how in asked),
        "cut_prompts": sum(how.is_cut for how in asked),
    }


def _record(benchmark: Benchmark, task: str, sample: dict[str, Any]) -> dict[str, Any]:
    kept = {key: sample[key] for key in ("doc_id", "arguments", "resps", "filtered_resps", "filter", "target")}
    return {"task": benchmark.config.name, "of": task, **kept, "scores": {name: sample[name] for name in sample["metrics"]}}


def _accuracy(name: str, results: dict[str, Any]) -> float | None:
    """Return the score that stands for a task or group; None where it has none, or is but a tag of several tasks."""
    of_task = results.get(name) or (next(iter(results.values())) if len(results) == 1 else {})
    scores = [(score, value) for score in _SCORES for metric, value in of_task.items() if metric.partition(",")[0] == score and isinstance(value, int | float)]
    return float(scores[0][1]) if scores else None


@contextmanager
def lm_eval_quiet() -> Iterator[None]:
    """Keep the notes and warnings of lm-eval and its libraries from the user; what matters of them is checked."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "math_verify")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
