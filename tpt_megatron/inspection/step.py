"""`tpt inspect RUN --step N`: which documents a step of a run saw, from run.json and the datasets alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import open_dataset, sidecar
from tpt_megatron.errors import DataError, RecordError, UsageError
from tpt_megatron.files import parse_json_line, read_json, read_lines
from tpt_megatron.inspection.printing import counts_table, one_line, print_line, print_table, table_name
from tpt_megatron.sequences.stream import Stream


def print_step(run: Path, step: int, console: Console) -> None:
    """Print every document that step number `step` (from 1) saw: sequence, dataset, number, id, source, and which of its tokens.

    Raises UsageError for what is no run or no step of it, and DataError when the datasets are not those that the run read.
    """
    config, fingerprint = _read_run(run)
    if not 1 <= step <= config.last_step:
        raise UsageError(f"--step {step}: the run {run} has the steps 1 to {config.last_step}")
    datasets = {path: open_dataset(path) for path in config.data.train_paths}
    stream = Stream(config.data, config.data.blends, datasets, config.seed)
    if stream.fingerprint() != fingerprint:
        raise DataError(f"{run}: the datasets that its config names are not the ones it read, or this release orders them otherwise; give it those back")
    first, count = _first_sequence(run, step, config), config.progress.batch(step)
    seen = list(stream.documents(range(first, first + count)))
    rows = {path: _rows(Path(path), {one.document for one in seen if one.path == path}) for path in {one.path for one in seen}}
    print_line(console, f"step {step}: sequences {first:,} to {first + count - 1:,}, {len(seen):,} documents and pieces of documents")
    table = counts_table("dataset", ("sequence", "document", "first token", "tokens", "of"))
    table.add_column("id", no_wrap=True)
    table.add_column("source", no_wrap=True)
    for one in seen:
        identity, source = rows[one.path].get(one.document, ("-", None))
        length = int(datasets[one.path].lengths[one.document])
        numbers = (one.sequence, one.document, one.first, one.tokens, length)
        table.add_row(Text(one_line(one.path)), *(f"{number:,}" for number in numbers), Text(one_line(identity)), Text(table_name(source)))
    print_table(console, table)


def _first_sequence(run: Path, step: int, config: TrainConfig) -> int:
    """Return the number of a step's first sequence. metrics.jsonl tells how many a run that went back had passed over by then, and passes over after."""
    path, passed_over = run / "metrics.jsonl", 0
    for number, line in read_lines(path) if path.is_file() else ():
        try:
            metrics = parse_json_line(line, f"{path}:{number}")
        except RecordError:
            break  # torn by a crash: the last
        at, first = (metrics.get(key) if isinstance(metrics, dict) else None for key in ("step", "first_sequence"))
        if isinstance(at, int) and isinstance(first, int) and at <= step:
            passed_over = first - config.progress.sequences_before(at)
    return config.progress.sequences_before(step) + passed_over


def _read_run(run: Path) -> tuple[TrainConfig, dict[str, Any]]:
    path = run / "run.json"
    if not path.is_file():
        raise UsageError(f"{run}: not a run folder (no run.json in it); --step is for a folder that tpt train wrote")
    described = read_json(path)
    if not isinstance(described, dict) or "config" not in described or "sequences" not in described:
        raise DataError(f"{path}: it does not say how the run read its data; a damaged file, or a run of an older release")
    try:
        return TrainConfig.model_validate(described["config"]), described["sequences"]
    except ValidationError as error:
        raise DataError(
            f"{path}: its config has {error.error_count()} key(s) that this release does not read; another release wrote it, or it was changed"
        ) from None


def _rows(prefix: Path, documents: Iterable[int]) -> dict[int, tuple[str, str | None]]:
    """Return id and source of some documents, reading only the row groups that they are in; nothing where there is no such sidecar."""
    path = sidecar(prefix, "documents.parquet")
    if not path.is_file():
        return {}
    wanted, found = np.array(sorted(documents)), {}
    with pq.ParquetFile(path) as file:
        ends = np.cumsum([file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)])
        groups = np.searchsorted(ends, wanted, side="right")
        for group in np.unique(groups).tolist():
            begin = int(ends[group - 1]) if group else 0
            inside = wanted[groups == group]
            for document, row in zip(inside.tolist(), file.read_row_group(group, ["id", "source"]).take(inside - begin).to_pylist(), strict=True):
                found[document] = (str(row["id"]), row["source"])
    return found
