"""One model through all benchmarks of a config."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpt_megatron.evaluate.benchmarks.asking import Asking, JournalledModel
from tpt_megatron.evaluate.benchmarks.backends import open_backend
from tpt_megatron.evaluate.benchmarks.harness import lm_eval_quiet, run_benchmark
from tpt_megatron.evaluate.benchmarks.journal import Journal
from tpt_megatron.evaluate.generate import Generator
from tpt_megatron.evaluate.subjects import Subject
from tpt_megatron.log import progress_bar

if TYPE_CHECKING:
    from tpt_megatron.evaluate.runner import Evaluation

log = logging.getLogger(__name__)


def ask_benchmarks(evaluation: Evaluation, subject: Subject, folder: Path, generator: Generator | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return each benchmark's summary by its name, and a record of every problem. What was answered is appended to OUTPUT/journal/SUBJECT/NAME.jsonl.

    `folder` is the subject's model, and `generator` the same where the backend is transformers. DataError for a damaged journal, Stopped after a signal.
    """
    config, options, thoughts = evaluation.config, evaluation.config.benchmark_options, evaluation.thoughts
    with lm_eval_quiet():
        backend = open_backend(folder, generator, options, config.dtype, config.batch_size)
    settings = {
        "weights": subject.fingerprint,
        "dtype": config.dtype,
        "backend": options.backend,
        "thoughts": thoughts.model_dump(),
        "add_bos_token": options.add_bos_token,
        "seed": options.seed,
    }
    asking = Asking(settings, thoughts, options.answer_from, config.batch_size, options.seed, evaluation.check)
    summaries: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    for benchmark in evaluation.benchmarks:
        name = benchmark.config.name
        journal = Journal(evaluation.output / "journal" / subject.name / f"{name.replace('/', '_')}.jsonl")
        with progress_bar(f"{subject.name} {name}", total=None) as bar:
            summaries[name], found = run_benchmark(benchmark, JournalledModel(backend, journal, replace(asking, advance=bar.advance)), options.seed)
        evaluation.check()
        records += found
        log.info("%s: %s: %s", subject.name, name, "done" if summaries[name]["accuracy"] is None else f"{summaries[name]['accuracy']:.3f}")
    return summaries, records
