"""How long thinking is: by source and by difficulty, and how much longer it makes documents. Read from the datasets that runs were trained on.

Counts, means and expansion are of every sequence. Quantiles are of a sample where there are more than SAMPLED, drawn with a fixed seed.
Delimiters count as thinking, and the end-of-document token as document, as in the datasets' tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from tpt_megatron.compare.difficulty import Difficulty
from tpt_megatron.compare.rank_correlation import rank_correlation
from tpt_megatron.config.data import DataConfig
from tpt_megatron.datasets import TokenDataset, open_dataset, open_sources, sidecar
from tpt_megatron.errors import DataError
from tpt_megatron.files import read_json

SAMPLED = 100_000
"""Sequences of an arm whose lengths are held."""
RANDOM_SEED = 20250920
QUANTILES = (0.05, 0.5, 0.95)
GROUPS = 10
"""Of difficulty, with as many documents in each; fewer different values are groups themselves."""
SOURCES = 200
NO_SOURCE, OTHERS = "(none)", "(other)"
_BLOCK = 1 << 18
_COLUMNS = ("tokens_document", "tokens_thinking")

Numbers = npt.NDArray[np.int64]


@dataclass(slots=True)
class Lengths:
    """Sequences of an arm, or of one of its sources. sample: thinking tokens of some that have any."""

    sequences: int = 0
    with_thinking: int = 0
    tokens_document: int = 0
    tokens_thinking: int = 0
    sample: list[Numbers] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """Return what report.json says: mean and quantiles are of sequences with thinking, None where there are none."""
        held = np.concatenate(self.sample) if self.sample else np.empty(0, np.int64)
        return {
            "sequences": self.sequences,
            "with_thinking": self.with_thinking,
            "tokens_document": self.tokens_document,
            "tokens_thinking": self.tokens_thinking,
            "mean": self.tokens_thinking / self.with_thinking if self.with_thinking else None,
            "quantiles": dict(zip(map(str, QUANTILES), np.quantile(held, QUANTILES).tolist(), strict=True)) if len(held) else None,
            "expansion": (self.tokens_document + self.tokens_thinking) / self.tokens_document if self.tokens_document else None,
        }


def thinking_of(arms: Mapping[str, Sequence[Path]], difficulty: Difficulty | None = None) -> dict[str, Any] | None:
    """Return report.json's part on thinking, of the run folders of each arm; None where no run says what it was trained on.

    `missing` says of which datasets nothing is known, and why. Memory: SAMPLED lengths a source, and the documents of `difficulty`.
    """
    found: dict[str, Any] = {}
    missing: list[str] = []
    for arm, runs in arms.items():
        data = [config for run in runs if (config := _data_config(run)) is not None]
        prefixes = dict.fromkeys(path for config in data for path in config.train_paths)
        datasets = _open(prefixes, missing)
        if not datasets:
            continue
        lengths = _lengths(datasets)
        held_out = _open(dict.fromkeys(path for config in data for path in config.validation_sets.values()), []) if difficulty is not None else []
        rows = sum(len(dataset.lengths) for dataset in datasets)
        found[arm] = {
            "datasets": [str(dataset.prefix) for dataset in datasets],
            "all": _sum(lengths.values()).as_data(),
            "by_source": {name: of.as_data() for name, of in lengths.items()},
            "sampled": SAMPLED if rows > SAMPLED else None,
            "difficulty": None if difficulty is None else _by_difficulty([*datasets, *held_out], difficulty),
        }
    if not found and not missing:
        return None
    about = None if difficulty is None else {"what": difficulty.what, "known": difficulty.known, "used": len(difficulty.of)}
    return {"arms": found, "difficulty": about, "missing": list(dict.fromkeys(missing))}


def _data_config(run: Path) -> DataConfig | None:
    """Return what a run read; None where its run.json does not say, or says it as another release does."""
    try:
        return DataConfig.model_validate(read_json(run / "run.json")["config"]["data"])
    except (KeyError, TypeError, ValidationError):
        return None


def _open(prefixes: Mapping[str, Any], missing: list[str]) -> list[TokenDataset]:
    """Open those datasets that say what is thinking in them; the others are `missing`, each in a sentence."""
    opened = []
    for prefix in prefixes:
        try:
            dataset = open_dataset(prefix)
            table = sidecar(dataset.prefix, "documents.parquet")
            if not table.is_file() or not set(_COLUMNS) <= set(pq.read_schema(table).names):
                missing.append(f"{prefix}: it has no table that says what of its documents is thinking")
                continue
        except (DataError, OSError, pa.ArrowException) as error:
            said = str(error).splitlines()[0]
            missing.append(said if isinstance(error, DataError) else f"{prefix}: {said}")
            continue
        opened.append(dataset)
    return opened


def _sum(parts: Iterable[Lengths]) -> Lengths:
    whole = Lengths()
    for part in parts:
        whole.sequences += part.sequences
        whole.with_thinking += part.with_thinking
        whole.tokens_document += part.tokens_document
        whole.tokens_thinking += part.tokens_thinking
        whole.sample += part.sample
    return whole


def _lengths(datasets: Sequence[TokenDataset]) -> dict[str, Lengths]:
    """Return what an arm's datasets hold, by source: the table's columns of numbers, a block at a time, and the sidecar of sources, mapped."""
    found: dict[str, Lengths] = {}
    random = np.random.default_rng(RANDOM_SEED)
    share = min(1.0, SAMPLED / max(1, sum(len(dataset.lengths) for dataset in datasets)))
    for dataset in datasets:
        names, of_sequences = open_sources(dataset)
        totals = np.zeros((4, len(names)), np.int64)
        held: list[tuple[Numbers, Numbers]] = []
        for first, block in _blocks(dataset, _COLUMNS):
            document, thinking = (block.column(name).to_numpy().astype(np.int64) for name in _COLUMNS)
            count = len(document)
            source = np.zeros(count, np.int64) if of_sequences is None else np.asarray(of_sequences[first : first + count]).astype(np.int64)
            totals += np.stack([np.bincount(source, weights, len(names)).astype(np.int64) for weights in (None, thinking > 0, document, thinking)])
            is_held = (thinking > 0) & (random.random(count) < share)
            held.append((source[is_held], thinking[is_held]))
        sources, lengths = (np.concatenate(column) for column in zip(*held, strict=True))
        by_source = np.argsort(sources, kind="stable")
        ends = np.cumsum(np.bincount(sources, minlength=len(names)))
        for number in np.flatnonzero(totals[0]).tolist():
            name = NO_SOURCE if names[number] is None else str(names[number])
            begin, end = int(ends[number - 1]) if number else 0, int(ends[number])
            sequences, with_thinking, tokens_document, tokens_thinking = totals[:, number].tolist()
            part = Lengths(sequences, with_thinking, tokens_document, tokens_thinking, [lengths[by_source[begin:end]]] if end > begin else [])
            found[name] = _sum([found.get(name, Lengths()), part])
    return _largest(found)


def _largest(found: dict[str, Lengths]) -> dict[str, Lengths]:
    """Return the SOURCES sources of most sequences, and the others together."""
    names = sorted(found, key=lambda name: (-found[name].sequences, name))
    others = {OTHERS: _sum(found[name] for name in names[SOURCES:])} if len(names) > SOURCES else {}
    return {name: found[name] for name in names[:SOURCES]} | others


def _blocks(dataset: TokenDataset, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the table of a dataset's documents, in blocks, each with the number of its first row. DataError where it cannot be read."""
    path, first = sidecar(dataset.prefix, "documents.parquet"), 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BLOCK, columns=list(columns)):
                yield first, batch
                first += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged ({str(error).splitlines()[0]}); make the dataset again") from None


def _by_difficulty(datasets: Sequence[TokenDataset], difficulty: Difficulty) -> dict[str, Any]:
    """Return lengths by difficulty and their correlation, over documents that have thinking; of one with several sequences the mean length counts."""
    known = pa.array(list(difficulty.of), pa.string())
    sums, counts = np.zeros(len(known)), np.zeros(len(known), np.int64)
    for dataset in datasets:
        for _, block in _blocks(dataset, ("id", "tokens_thinking")):
            place = pc.index_in(block.column("id").cast(pa.string()), known)
            thinking = block.column("tokens_thinking").to_numpy()
            chosen = np.asarray(place.is_valid()) & (thinking > 0)
            numbers = place.fill_null(0).to_numpy()[chosen]
            sums += np.bincount(numbers, thinking[chosen], len(known))
            counts += np.bincount(numbers, minlength=len(known))
    there = counts > 0
    lengths = sums[there] / counts[there]
    values = [value for value, has_thinking in zip(difficulty.of.values(), there.tolist(), strict=True) if has_thinking]
    if not difficulty.is_number:
        names = np.array([_level(value) for value in values], object)
        groups = {name: _group(lengths[names == name], None) for name in sorted(set(names.tolist()))}
        return {"documents": len(values), "rho": None, "interval": None, "why_not": "the difficulty is a name, which has no order", "groups": groups}
    numbers = np.array(values, np.float64)
    found = rank_correlation(numbers, lengths)
    about = {"rho": found.rho, "interval": None if found.interval is None else list(found.interval), "why_not": found.why_not}
    return {"documents": len(values), **about, "groups": _groups(numbers, lengths)}


def _level(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _groups(numbers: npt.NDArray[np.float64], lengths: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return a group a value, or tenths where there are more than ten values; equal values are never in two of them."""
    different = np.unique(numbers)
    if len(different) <= GROUPS:
        return {f"{value:g}": _group(lengths[numbers == value], value) for value in different.tolist()}
    edges = np.quantile(numbers, np.arange(1, GROUPS) / GROUPS)
    group = np.searchsorted(edges, numbers, side="left")
    return {str(number + 1): _group(lengths[group == number], float(numbers[group == number].mean())) for number in np.unique(group).tolist()}


def _group(lengths: npt.NDArray[np.float64], difficulty: float | None) -> dict[str, Any]:
    return {"documents": len(lengths), "difficulty": difficulty, "mean": float(lengths.mean()), "median": float(np.median(lengths))}
