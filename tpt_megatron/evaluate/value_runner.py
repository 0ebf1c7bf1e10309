"""`tpt value`: each thought of augmented documents gets a score, how much it raises the likelihood of a text under a model.

`value_targets.py` says what is asked, `likelihood.py` asks a model, `value_shards.py` has the files, `value_statistics.py` what it comes to.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tpt_megatron.config.value import ValueConfig
from tpt_megatron.delimiters import check_delimiters
from tpt_megatron.errors import ConfigError
from tpt_megatron.evaluate.exports import model_folder
from tpt_megatron.evaluate.likelihood import LanguageModel, choose_device, fingerprint, model_tokenizer
from tpt_megatron.evaluate.token_losses import positions_of
from tpt_megatron.evaluate.value_report import summarise
from tpt_megatron.evaluate.value_shards import ValuePlan, ValueShards, describe
from tpt_megatron.evaluate.value_statistics import ValueStatistics
from tpt_megatron.evaluate.value_targets import Question, Questions, distinct
from tpt_megatron.files import read_json, read_manifest, remove_stale_neighbours, temporary_neighbour
from tpt_megatron.log import progress_bar
from tpt_megatron.record_files import expand_inputs, refuse_inputs_in_output
from tpt_megatron.records import AugmentedDocument
from tpt_megatron.storage import LocalLocation, Location, locate

log = logging.getLogger(__name__)


def run_value(config: ValueConfig) -> dict[str, Any] | None:
    """Value all thoughts of the inputs into `config.output` and return what summary.json holds; None while shards are missing that are others' part.

    Raises ConfigError where the output holds values of other settings or inputs, DataError for inputs and models that cannot be read or do not
    fit, CheckpointError and ConversionError for checkpoints that cannot be exported, RecordError under on_bad_record=fail, Stopped after a
    signal. Finished shards are kept in every case, and the same command goes on from them. Memory: the model, a batch, and some hundred documents.
    """
    output = locate(config.output)
    refuse_inputs_in_output(config.input, output)
    inputs = expand_inputs(config.input)
    for place in inputs:
        if output.contains(place):
            raise ConfigError(f"input={', '.join(config.input)} takes in {place}, which lies in output={output}; give an output folder apart")
    device = choose_device(config.device)
    _warn_of_other_delimiters(config)
    with _scratch(output) as scratch, model_folder(config.model, scratch) as folder:
        tokenizer = model_tokenizer(folder)
        check_delimiters(config.delimiters, tokenizer, str(config.model))
        positions = positions_of(folder)
        longest, of_model = min(config.longest or positions, positions), fingerprint(folder)
        settings = _settings(config) | {"longest": longest, "model": of_model, "tokenizer": tokenizer.fingerprint}
        plan = ValuePlan(settings, tuple(str(place) for place in inputs))
        plan.claim(output)
        shards = ValueShards(config, plan, inputs, output, scratch)
        finished = shards.finished()
        if finished:
            log.info("%s: %d of %d shards were finished before, kept", output, len(finished), len(inputs))
        part, parts = config.part_of_work()
        if todo := [number for number in range(part, len(inputs), parts) if number not in finished]:
            (output / "manifest.json").remove()
            valuer = Valuer(config, Questions(config, tokenizer, longest), LanguageModel(folder, config.dtype, device), of_model)
            with progress_bar("value", sum(inputs[number].size() for number in todo)) as bar:
                for number in todo:
                    shards.make(number, valuer, bar.advance)
        finished = shards.finished()
    if missing := len(inputs) - len(finished):
        log.info("%s: %d of %d shards are missing, other parts of the work; the part that ends last completes the output", output, missing, len(inputs))
        return None
    manifest = describe(output, plan, [finished[number] for number in range(len(inputs))])
    summary = summarise(config, manifest)
    (output / "summary.json").write(orjson.dumps(summary, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    manifest.write(output / "manifest.json")
    return summary


class Valuer:
    """Values documents' thoughts with one model. model: its fingerprint."""

    def __init__(self, config: ValueConfig, questions: Questions, model: LanguageModel, fingerprint: str) -> None:
        self._config, self._questions, self._model, self._fingerprint = config, questions, model, fingerprint

    def __call__(self, documents: Sequence[AugmentedDocument], statistics: ValueStatistics, counts: Counter[str]) -> list[AugmentedDocument]:
        """Return the documents with a score at each thought, and count them."""
        found = [self._questions.of(augmented) for augmented in documents]
        asked, pairs = distinct([question for of_document in found for question in of_document if isinstance(question, Question)])
        likelihoods = self._model.log_likelihoods(asked, self._config.batch_tokens)
        numbers = iter(pairs)
        valued = []
        for augmented, of_document in zip(documents, found, strict=True):
            thoughts = []
            for thought, question in zip(augmented.thoughts, of_document, strict=True):
                if isinstance(question, Question):
                    with_thought, without = (float(likelihoods[number][-question.target :].sum(dtype=np.float64)) for number in next(numbers))
                    score = self._score(question, with_thought, without)
                else:
                    score = self._nothing(question)
                _count(score, augmented.document.source, statistics, counts)
                thoughts.append(replace(thought, extra={**thought.extra, self._config.field: score}))
            counts["documents"] += 1
            counts["documents_without_thoughts"] += not thoughts
            valued.append(replace(augmented, thoughts=tuple(thoughts)))
        return valued

    def _score(self, question: Question, with_thought: float, without: float) -> dict[str, Any]:
        if not math.isfinite(with_thought) or not math.isfinite(without):
            return self._nothing("not_finite")
        nats = with_thought - without
        score = {
            "nats": nats,
            "nats_per_token": nats / question.target,
            "target": self._config.target,
            "target_tokens": question.target,
            "log_likelihood": with_thought,
            "log_likelihood_without": without,
            "model": self._fingerprint,
        }
        marks = {"saw_target": question.saw_target, "target_tokens_cut": question.target_cut, "context_tokens_cut": question.context_cut}
        return score | {name: value for name, value in marks.items() if value}

    def _nothing(self, reason: str) -> dict[str, Any]:
        return {"nats": None, "nats_per_token": None, "reason": reason, "target": self._config.target, "model": self._fingerprint}


def _count(score: dict[str, Any], source: str | None, statistics: ValueStatistics, counts: Counter[str]) -> None:
    counts["thoughts"] += 1
    if score["nats"] is None:
        counts["thoughts_without_value"] += 1
        statistics.without[score["reason"]] += 1
        return
    counts["thoughts_with_value"] += 1
    counts["targets_cut"] += "target_tokens_cut" in score
    counts["contexts_cut"] += "context_tokens_cut" in score
    counts["saw_target"] += "saw_target" in score
    statistics.add(source, score["nats"], score["target_tokens"])


def _settings(config: ValueConfig) -> dict[str, Any]:
    """Return all that values depend on but the model. Batches and devices change no more than the last digits."""
    settings: dict[str, Any] = config.model_dump(
        mode="json", include={"target", "delimiters", "field", "fields", "target_tokens", "dtype", "max_record_megabytes"}
    )
    return settings | {"answer": config.answer.model_dump(exclude_none=True)}


@contextmanager
def _scratch(output: Location) -> Iterator[Path]:
    """Yield a folder of this machine for what is not finished: in a local output, where there is room; what killed runs left of theirs is removed."""
    if not isinstance(output, LocalLocation):
        with tempfile.TemporaryDirectory(prefix="tpt-value-") as temporary:
            yield Path(temporary)
        return
    output.path.mkdir(parents=True, exist_ok=True)
    remove_stale_neighbours(output.path / "scratch")
    folder = temporary_neighbour(output.path / "scratch")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _warn_of_other_delimiters(config: ValueConfig) -> None:
    """Say where a run's model was trained with other delimiters than it is asked with: it would have to read what it never saw."""
    run = next((path for path in (config.model, *config.model.parents[:2]) if (path / "run.json").is_file()), None)
    if run is None:
        return
    data = read_json(run / "run.json").get("config", {}).get("data", {})
    shares = [share for stage in [data, *data.get("stages", ())] for share in stage.get("train", ())]
    for share in shares:
        path = Path(f"{share['path']}.manifest.json")
        trained = read_manifest(path, "token_dataset").settings.get("delimiters") if path.is_file() else None
        if trained is not None and trained != config.delimiters.model_dump():
            log.warning(
                "model=%s was trained on %s with delimiters %s, and is asked with %s", config.model, share["path"], trained, config.delimiters.model_dump()
            )
