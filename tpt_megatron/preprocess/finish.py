"""Finishing: the pieces of a run, whoever made them, become each arm's datasets; then the manifests, then nothing is left of the pieces."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from tpt_megatron.config.preprocess import Arm, PreprocessConfig
from tpt_megatron.datasets import MANIFEST_KIND, PART_NAMES, sidecar, token_dtype
from tpt_megatron.errors import DataError
from tpt_megatron.files import FileEntry, Manifest, open_atomic
from tpt_megatron.log import progress_bar
from tpt_megatron.preprocess.chat import end_of_turn
from tpt_megatron.preprocess.choosing import ChoiceCounts, without_scores
from tpt_megatron.preprocess.duplicates import NearKeys, first_ones
from tpt_megatron.preprocess.joining import DatasetJoin, JoinedDataset, Part
from tpt_megatron.preprocess.pieces import COUNTS, IN_VALIDATION, WITHOUT_THOUGHTS, FinishedPiece, splits, token_parts
from tpt_megatron.preprocess.plan import Plan
from tpt_megatron.preprocess.templates import ChatTemplate
from tpt_megatron.storage import LocalLocation, remove_unfinished
from tpt_megatron.tokenizer import TokenizerLike

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Joining:
    """The pieces of a run on their way into the datasets of every arm and split, for a `with` block that discards them on an error.

    Pieces come in order, and may come while others are still worked on, unless there are duplicates to be left out: which those are
    is known at the end. Reading, writing and hashing leave Python's lock alone, so there are as many threads as workers.
    """

    def __init__(self, config: PreprocessConfig, plan: Plan, arms: Sequence[Arm], tokenizer: TokenizerLike) -> None:
        self._config, self._plan, self._arms, self._tokenizer = config, plan, arms, tokenizer
        self._joins: dict[tuple[Arm, str], DatasetJoin] = {}
        self._joined = 0
        self._pool = ThreadPoolExecutor(config.workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_over = False
        try:
            self._pool.shutdown(cancel_futures=True)
            is_over = error is None
        finally:
            if not is_over:  # a second signal, too, must leave no thread at work
                self._pool.shutdown()
                for join in self._joins.values():
                    join.discard()

    def add_next_finished(self) -> bool:
        """Join the next piece if it is finished and can be joined; say whether it was."""
        if self._joined == len(self._plan.pieces) or self._config.deduplicate != "none":
            return False
        folder = self._config.output / "pieces" / self._plan.pieces[self._joined].name
        if not folder.is_dir():
            return False
        piece = FinishedPiece.read(folder)
        _check_is_of(piece, self._plan.fingerprint(), self._arms)
        self._add(piece, None)
        return True

    def close(self, pieces: Sequence[FinishedPiece], kept: list[npt.NDArray[np.bool_]] | None) -> dict[tuple[Arm, str], JoinedDataset]:
        """Join those of all pieces that have not been joined yet, and return the datasets, which have no names yet."""
        with progress_bar("join", len(pieces), completed=self._joined) as bar:
            for number in range(self._joined, len(pieces)):
                self._add(pieces[number], None if kept is None else kept[number])
                bar.advance(1)
        made = self._side_by_side([join.close for join in self._joins.values()])
        return dict(zip(self._joins, made, strict=True))

    def _add(self, piece: FinishedPiece, kept: npt.NDArray[np.bool_] | None) -> None:
        if not self._joins:
            self._open()
        steps: list[Callable[[], None]] = []
        for (arm, split), join in self._joins.items():
            stem = f"{arm}.{split}"
            steps += join.steps(Part(piece.folder / stem, piece.sources[stem], kept), is_only=len(self._plan.pieces) == 1)
        self._side_by_side(steps)
        self._joined += 1

    def _open(self) -> None:
        dtype, tokenizer_bytes = token_dtype(self._tokenizer.vocabulary_size), self._tokenizer.to_bytes()
        for arm in self._arms:
            remove_unfinished(LocalLocation(self._config.output / arm))
            for split in splits(self._config):
                self._joins[arm, split] = DatasetJoin(
                    self._config.output / arm / split, dtype, self._tokenizer.file_name, tokenizer_bytes, token_parts(self._config)
                )

    def _side_by_side(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        futures = [self._pool.submit(call) for call in calls]
        wait(futures)  # all, before what they write to is closed
        return [future.result() for future in futures]


def finish(
    config: PreprocessConfig, plan: Plan, arms: Sequence[Arm], tokenizer: TokenizerLike, folders: Sequence[Path], joining: Joining
) -> dict[str, Manifest]:
    """Join the pieces that lie in `folders` into the datasets of `arms` in config.output; return their manifests by ARM/SPLIT.

    Raises DataError when pieces are missing or a split has no document, and OSError for a full disk; the pieces stay then.
    """
    pieces = _all_pieces(plan, arms, folders)
    counts = Counter({name: sum(piece.counts[name] for piece in pieces) for name in COUNTS})
    with _scratch(config.output / "pieces/.finish") as scratch:
        kept = _kept(config, pieces, scratch)
        chosen = _chosen(config, pieces)
        counts["duplicates"] = 0 if kept is None else sum(int(np.count_nonzero(~flags)) for flags in kept)
        by_split = {split: _documents(pieces, kept, split) for split in splits(config)}
        for split, found in by_split.items():
            if not found["documents"]:
                read = f"{counts['lines_read']} lines read, {counts['bad_records']} bad, {counts['blank_lines']} blank"
                change = "raise" if split == "validation" else "lower"
                hint = f"; {change} validation_fraction={config.validation_fraction}" if counts["records"] > chosen["documents_dropped"] else ""
                hint += f"; {chosen['documents_dropped']} were dropped, since none of their thoughts stayed" if chosen["documents_dropped"] else ""
                raise DataError(f"{config.output}: no document for {split} ({read}){hint}")
        assert counts["lines_read"] == counts["records"] + counts["bad_records"] + counts["blank_lines"]
        assert counts["records"] == counts["duplicates"] + chosen["documents_dropped"] + sum(found["documents"] for found in by_split.values())
        datasets = joining.close(pieces, kept)
    _copy_bad_records(config.output / "bad_records.jsonl", pieces, counts["bad_records"])
    manifests = {}
    entries = _input_entries(plan, pieces)
    for (arm, split), dataset in datasets.items():
        sidecar(dataset.prefix, "manifest.json").unlink(missing_ok=True)  # of a dataset found damaged
        dataset.rename()
        manifests[f"{arm}/{split}"] = _describe(config, plan, arm, split, tokenizer, dataset, entries, by_split[split] + counts, chosen)
    for name, manifest in manifests.items():
        manifest.write(sidecar(config.output / name, "manifest.json"))
    forget_pieces(config.output)
    return manifests


def forget_pieces(output: Path) -> None:
    """Remove the pieces, whole or not at all: what a kill leaves of them is under another name, and goes the next time."""
    gone = output / ".pieces.tmp"
    shutil.rmtree(gone, ignore_errors=True)
    if (output / "pieces").is_dir():
        (output / "pieces").rename(gone)
        shutil.rmtree(gone)


def _all_pieces(plan: Plan, arms: Sequence[Arm], folders: Sequence[Path]) -> list[FinishedPiece]:
    fingerprint, found, missing = plan.fingerprint(), [], []
    stamps: dict[tuple[Path, int], str] = {}
    for piece in plan.pieces:
        here = [folder / "pieces" / piece.name for folder in folders if (folder / "pieces" / piece.name).is_dir()]
        if not here:
            missing.append(piece.name)
            continue
        finished = FinishedPiece.read(here[0])
        _check_is_of(finished, fingerprint, arms)
        if stamps.setdefault((here[0].parent, piece.file), finished.input_stamp) != finished.input_stamp:
            raise DataError(f"{plan.inputs[piece.file][0]}: has changed between the shards of {here[0].parent.parent}; run them again")
        found.append(finished)
    if missing:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(f"{len(missing)} of {len(plan.pieces)} pieces are missing ({listed}); run the shards that are not finished, or name their folders")
    return found


def _check_is_of(piece: FinishedPiece, fingerprint: str, arms: Sequence[Arm]) -> None:
    """Raise DataError for a piece of another run, or one that lacks an arm."""
    if piece.plan != fingerprint:
        raise DataError(f"{piece.folder}: of another run than plan.json; run its shard again")
    if not set(arms) <= set(piece.arms):
        raise DataError(f"{piece.folder}: lacks the arms {sorted(set(arms) - set(piece.arms))}; run its shard again with the arms of the others")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _kept(config: PreprocessConfig, pieces: Sequence[FinishedPiece], scratch: Path) -> list[npt.NDArray[np.bool_]] | None:
    """Return, for each piece, which of its documents stay; None where all do."""
    if config.deduplicate == "none":
        return None
    bands = NearKeys(config.near_duplicates).bands if config.deduplicate == "near" else 1
    documents = [piece.documents for piece in pieces]
    flags = first_ones([piece.folder / "keys.bin" for piece in pieces], documents, bands, scratch)
    ends = np.cumsum([0, *documents])
    return [flags[begin:end] for begin, end in pairwise(ends)]


def _documents(pieces: Sequence[FinishedPiece], kept: list[npt.NDArray[np.bool_]] | None, split: str) -> Counter[str]:
    found: Counter[str] = Counter(documents=0, documents_without_thoughts=0)
    for number, piece in enumerate(pieces):
        flags = np.fromfile(piece.folder / "flags.bin", np.uint8)
        chosen = ((flags & IN_VALIDATION) != 0) == (split == "validation")
        if kept is not None:
            chosen &= kept[number]
        found["documents"] += int(np.count_nonzero(chosen))
        found["documents_without_thoughts"] += int(np.count_nonzero(chosen & ((flags & WITHOUT_THOUGHTS) != 0)))
    return found


def _chosen(config: PreprocessConfig, pieces: Sequence[FinishedPiece]) -> Counter[str]:
    """Return the counts of thoughts that were chosen by score, empty where none are; DataError where no thought has one."""
    counts = sum((Counter(piece.chosen) for piece in pieces), Counter[str]())
    scored = counts["thoughts_read"] - counts["thoughts_unscored"] - counts["thoughts_kept_unscored"]
    if config.keep_thoughts is not None and counts["thoughts_read"] and not scored:
        raise DataError(f"{config.output}: {without_scores(config.keep_thoughts, counts['thoughts_read'])}")
    return counts


def _copy_bad_records(path: Path, pieces: Sequence[FinishedPiece], count: int) -> None:
    if not count:
        path.unlink(missing_ok=True)
        return
    with open_atomic(path) as target:
        for piece in pieces:
            if (piece.folder / "bad.jsonl").is_file():
                with open(piece.folder / "bad.jsonl", "rb") as source:
                    shutil.copyfileobj(source, target)
    logger.warning("%d bad records were set aside, see %s", count, path)


def _input_entries(plan: Plan, pieces: Sequence[FinishedPiece]) -> tuple[FileEntry, ...]:
    checksums = {plan.pieces[number].file: piece.input_sha256 for number, piece in enumerate(pieces) if piece.input_sha256 is not None}
    return tuple(FileEntry(name=name, bytes=size, sha256=checksums[file]) for file, (name, size) in enumerate(plan.inputs))


def _describe(
    config: PreprocessConfig,
    plan: Plan,
    arm: Arm,
    split: str,
    tokenizer: TokenizerLike,
    dataset: JoinedDataset,
    inputs: tuple[FileEntry, ...],
    counts: Counter[str],
    chosen: Counter[str],
) -> Manifest:
    """Return the dataset's manifest, which is written last. lines_read, records and what follows them are of the whole run.

    chosen: counts of thoughts, where they are chosen by score.
    """
    tokens, parts = dataset.counts, token_parts(config)
    without_thoughts = {} if config.reads_chats else {"documents_without_thoughts": counts["documents_without_thoughts"]}
    settings: dict[str, Any] = {key: value for key, value in plan.settings.items() if key != "mixed" or arm == "mixed"}
    return Manifest(
        kind=MANIFEST_KIND,
        settings=settings,
        inputs=inputs,
        outputs=tuple(dataset.outputs),
        counts={
            "documents": counts["documents"],
            "sequences": tokens.sequences,
            "tokens": tokens.tokens,
            **{f"tokens_{PART_NAMES[part]}": tokens.by_part[part] for part in parts},
            **without_thoughts,
            "lines_read": counts["lines_read"],
            "records": counts["records"],
            "duplicates": counts["duplicates"],
            "bad_records": counts["bad_records"],
            "blank_lines": counts["blank_lines"],
            **({} if config.keep_thoughts is None else {name: chosen[name] for name in ChoiceCounts().as_dict()}),
        },
        details={
            "arm": arm,
            "split": split,
            "parts": [PART_NAMES[part] for part in parts],
            "dtype": token_dtype(tokenizer.vocabulary_size).name,
            "vocabulary_size": tokenizer.vocabulary_size,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "end_of_document": tokenizer.end_of_document,
            "eod_id": tokenizer.eod_id,
            "sources": dataset.sources,
            **({"chat": _chat(settings["chat"], tokenizer)} if config.reads_chats else {}),
            "sha256": next(entry.sha256 for entry in dataset.outputs if entry.name == f"{dataset.prefix.name}.bin"),
        },
    )


def _chat(settings: Mapping[str, Any], tokenizer: TokenizerLike) -> dict[str, Any]:
    """Return what a model that learns these chats must be asked with: the template, and the token that ends its turns."""
    template = ChatTemplate("", settings["template"], settings["variables"], settings["learn"])
    return {"template": template.alone, "end_of_turn_id": end_of_turn(template, tokenizer)}
