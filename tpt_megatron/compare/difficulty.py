"""How hard documents are, by their ids: a field of record files, or their mean loss under the reference of a `tpt losses`."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tpt_megatron.datasets import PART_DOCUMENT, PART_NAMES, open_dataset, sidecar
from tpt_megatron.errors import DataError, RecordError, UsageError
from tpt_megatron.files import read_json
from tpt_megatron.record_files import expand_inputs, read_rows
from tpt_megatron.records import read_document

DOCUMENTS = 20_000
"""Of more, so many are taken: those whose ids have the smallest hashes, so that it does not matter in which files and order they come."""
LOSSES = "losses.json"
LONGEST_RECORD = 1 << 28
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Difficulty:
    """Documents' difficulty by id: numbers, or names of levels. what: in words; known: documents that have one, of which `of` holds all or DOCUMENTS."""

    what: str
    of: dict[str, float | str]
    known: int

    @property
    def is_number(self) -> bool:
        """Whether it is a number for every document, so that it has an order."""
        return all(isinstance(value, float) for value in self.of.values())


def read_difficulty(path: Path, field: str | None) -> Difficulty:
    """Read a field of record files, or without `field` the output of a `tpt losses` (its folder, or losses.json).

    Raises UsageError for what is neither, DataError for files that cannot be read or have no such field.
    """
    losses = path / LOSSES if path.is_dir() else path
    if field is None:
        if losses.name != LOSSES or not losses.is_file():
            raise UsageError(f"--difficulty {path}: not an output of tpt losses (no {LOSSES} in it); for a field of record files give --difficulty-field, too")
        return _of_losses(losses)
    kept, known = _sample(_of_field(path, field))
    if not known:
        raise DataError(f"{path}: no record has a number or a text in the field {field!r}")
    return Difficulty(f"{field} of {path.name}", kept, known)


def _of_field(path: Path, field: str) -> Iterator[tuple[str, float | str]]:
    """Yield (id, value) of the records that have one; those that cannot be read are the business of who made datasets of them."""
    for place in expand_inputs((str(path),)):
        for row in read_rows(place, longest=LONGEST_RECORD):
            try:
                document = None if row.is_blank else read_document(row.parse(), row.where)
            except RecordError:
                continue
            value = None if document is None else document.source if field == "source" else document.extra.get(field)
            if document is None or value is None or isinstance(value, bool) or not isinstance(value, (int, float, str)):
                continue
            if isinstance(value, str) or np.isfinite(value):
                yield document.id, value if isinstance(value, str) else float(value)


def _of_losses(path: Path) -> Difficulty:
    """Return the mean loss of each document's own tokens, in nats: thoughts have no part in how hard their document is."""
    summary = read_json(path)
    try:
        prefix, reference = str(summary["data"]), str(summary["reference"])
    except (KeyError, TypeError):
        raise DataError(f"{path}: not the {LOSSES} that tpt losses writes") from None
    numbers, column = path.with_name("tokens.parquet"), f"loss/{reference}"
    sums: dict[int, float] = {}
    counts: dict[int, int] = {}
    try:
        with pq.ParquetFile(numbers) as file:
            for batch in file.iter_batches(_BLOCK, columns=["document", "part", column]):
                own = np.asarray(batch.column("part").cast("string").to_pylist()) == PART_NAMES[PART_DOCUMENT]
                documents, losses = batch.column("document").to_numpy()[own], batch.column(column).to_numpy()[own].astype(np.float64)
                which, place = np.unique(documents, return_inverse=True)
                for document, total, count in zip(which.tolist(), np.bincount(place, losses).tolist(), np.bincount(place).tolist(), strict=True):
                    sums[document] = sums.get(document, 0.0) + total
                    counts[document] = counts.get(document, 0) + count
    except (OSError, KeyError, ValueError) as error:  # pyarrow's own errors are among these
        raise DataError(f"{numbers}: cannot be read ({str(error).splitlines()[0]}); run tpt losses again") from None
    open_dataset(prefix)  # says what is wrong with it, if anything
    kept, known = _sample((identity, sums[document] / counts[document]) for document, identity in _ids(Path(prefix), sums))
    if not known:
        raise DataError(f"{numbers}: no document of {prefix} has a loss on a token of its own")
    return Difficulty(f"mean loss a token under {reference}", kept, known)


def _ids(prefix: Path, wanted: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Yield (number, id) of some documents of a dataset."""
    path, numbers, first = sidecar(prefix, "documents.parquet"), np.array(sorted(wanted), np.int64), 0
    if not path.is_file():
        raise DataError(f"{path}: no such file; documents are known by the ids in it, so make the dataset with tpt preprocess")
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BLOCK, columns=["id"]):
            inside = numbers[(numbers >= first) & (numbers < first + batch.num_rows)]
            yield from zip(inside.tolist(), batch.column("id").take(inside - first).to_pylist(), strict=True)
            first += batch.num_rows


def _sample(found: Iterable[tuple[str, float | str]]) -> tuple[dict[str, float | str], int]:
    """Return DOCUMENTS of the values by id, or all, and how many ids there were; of an id that comes twice the first value counts."""
    heap: list[tuple[int, str]] = []  # of negative hashes: the largest hash on top
    kept: dict[str, float | str] = {}
    known = 0
    for identity, value in found:
        if identity in kept:
            continue
        known += 1
        order = -int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big")
        if len(heap) < DOCUMENTS:
            heapq.heappush(heap, (order, identity))
        elif order > heap[0][0]:
            del kept[heapq.heapreplace(heap, (order, identity))[1]]
        else:
            continue
        kept[identity] = value
    return kept, known
