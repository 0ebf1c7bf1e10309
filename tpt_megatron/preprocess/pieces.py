"""Working a piece off: its records become tokens of every arm and split, in a folder that gets its name when it is whole.

OUTPUT/pieces/00012/ARM.SPLIT.*      see `dataset.py`
OUTPUT/pieces/00012/flags.bin        a byte a document: in validation, without thoughts
OUTPUT/pieces/00012/keys.bin         keys of duplicates, where they are looked for
OUTPUT/pieces/00012/bad.jsonl        records that cannot be used
OUTPUT/pieces/00012/piece.json       counts, sources, sizes
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt
import orjson

from tpt_megatron.arms import DelimiterIds, cut_after
from tpt_megatron.bad_records import WARNINGS_SHOWN, describe_bad_record
from tpt_megatron.config.preprocess import Arm, PreprocessConfig
from tpt_megatron.datasets import CHAT_PARTS, DOCUMENT_PARTS, token_dtype
from tpt_megatron.delimiters import delimiter_ids
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.files import read_json, sha256_of, whole_folder
from tpt_megatron.preprocess.chat import Chat, ChatReader
from tpt_megatron.preprocess.choosing import ThoughtChoice
from tpt_megatron.preprocess.compose import in_validation, plain_arm, sequences
from tpt_megatron.preprocess.dataset import PartWriter, Row, SourceNumbers
from tpt_megatron.preprocess.duplicates import NearKeys, exact_key
from tpt_megatron.preprocess.encoding import WINDOW, Encoder
from tpt_megatron.preprocess.long_text import StringText
from tpt_megatron.preprocess.plan import Piece, Plan
from tpt_megatron.preprocess.reading import Batch, LineNumbers, LongDocument, PieceReader
from tpt_megatron.preprocess.templates import ChatTemplate
from tpt_megatron.records import AugmentedDocument, Thought
from tpt_megatron.storage import LocalLocation, locate
from tpt_megatron.tokenizer import TokenizerLike

logger = logging.getLogger(__name__)
IN_VALIDATION, WITHOUT_THOUGHTS = 1, 2  # bits of flags.bin
COUNTS = ("lines_read", "records", "bad_records", "blank_lines")
IDS_AT_ONCE = 1 << 20
LARGEST_KEPT = 32 << 20  # bytes; glibc takes no larger mmap threshold
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def splits(config: PreprocessConfig) -> tuple[str, ...]:
    """Return the names of the splits that the config asks for."""
    return ("train", "validation") if config.validation_fraction > 0 else ("train",)


def token_parts(config: PreprocessConfig) -> tuple[int, ...]:
    """Return what tokens of the config's datasets can be."""
    return CHAT_PARTS if config.reads_chats else DOCUMENT_PARTS


@dataclass(frozen=True, slots=True)
class FinishedPiece:
    """What a finished piece says of itself. sources: names by ARM.SPLIT; input_sha256: of the whole input file, where the piece is its first.

    input_stamp: of the input when it was planned, as this piece's machine sees it. chosen: counts of thoughts, where they are chosen by score.
    """

    folder: Path
    plan: str
    arms: tuple[str, ...]
    documents: int
    counts: dict[str, int]
    sources: dict[str, list[str | None]]
    input_sha256: str | None
    input_stamp: str
    sizes: dict[str, int]
    chosen: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> FinishedPiece:
        """Read a piece's description and check the sizes of its files; DataError when it is damaged."""
        value = read_json(folder / "piece.json")
        try:
            piece = cls(folder, **(value | {"arms": tuple(value["arms"])}))
        except (TypeError, KeyError):
            raise DataError(f"{folder / 'piece.json'}: not of this release") from None
        sizes = LocalLocation(folder).sizes()
        for name, size in piece.sizes.items():
            if sizes.get(name) != size:
                raise DataError(f"{folder / name}: {sizes.get(name, 'no')} bytes, piece.json says {size}")
        return piece


class SpooledIds:
    """Token ids that lie in a file, since a document of 100 MB has too many: can be counted, cut, and read in blocks."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._path, self._start, self._stop = path, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, span: slice) -> SpooledIds:
        start, stop, _ = span.indices(len(self))
        return SpooledIds(self._path, self._start + start, self._start + stop)

    def blocks(self) -> Iterator[npt.NDArray[np.uint32]]:
        """Yield the ids in blocks."""
        with open(self._path, "rb") as file:
            file.seek(4 * self._start)
            for begin in range(self._start, self._stop, IDS_AT_ONCE):
                yield np.fromfile(file, np.uint32, min(IDS_AT_ONCE, self._stop - begin))


def keep_freed_memory() -> None:
    """Have the C library keep memory that is freed: a worker takes and frees blocks of some megabytes all the time.

    Given back and taken anew, their pages are cleared by the kernel each time. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((_M_MMAP_THRESHOLD, LARGEST_KEPT), (_M_TRIM_THRESHOLD, 2 * LARGEST_KEPT), (_M_TOP_PAD, LARGEST_KEPT)):
        mallopt(parameter, value)


class PieceWorker:
    """Works pieces off, one after the other, in one process. For a `with` block, at whose end all have their names.

    The next piece does not wait until the last one is on the disk: a thread of its own syncs it and gives it its name. template: of chats.
    """

    def __init__(
        self, config: PreprocessConfig, plan: Plan, arms: Sequence[Arm], tokenizer: TokenizerLike, encoder: Encoder, template: ChatTemplate | None = None
    ) -> None:
        keep_freed_memory()
        self._config, self._plan, self._arms = config, plan, tuple(arms)
        self._fingerprint = plan.fingerprint()
        self._eod_id, self._dtype = tokenizer.eod_id, token_dtype(tokenizer.vocabulary_size)
        self._encoder = encoder
        # True of none that marks it as special, and of none of the usual byte-level ones.
        reads_it = tokenizer.eod_id in tokenizer.encode(tokenizer.end_of_document)
        self._refused_text = tokenizer.end_of_document if reads_it else None
        self._delimiters = delimiter_ids(config.delimiters, tokenizer)
        self._chats = None if template is None else ChatReader(template, tokenizer, config.fields.names(), config.fields.messages)
        self._with_thoughts = set(arms) != {"vanilla"}
        self._interleaves = "interleave" in arms or ("mixed" in arms and config.mixed.get("interleave", 0) > 0)
        self._near = NearKeys(config.near_duplicates) if config.deduplicate == "near" else None
        self._hashes = config.validation_fraction > 0 or config.deduplicate == "exact" or "mixed" in arms
        self._line_numbers = LineNumbers()
        self._warnings = 0
        self._syncing_thread = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._syncing_thread.shutdown()
        finally:
            self._syncing_thread.shutdown()  # a second signal must not leave it at work in a folder that another run may take
        if error is None:
            self._wait()

    def run(self, piece: Piece, progress: Any = lambda amount: None) -> None:
        """Make the piece's folder. Raises DataError for an input that cannot be read, RecordError under on_bad_record=fail.

        Raises OSError for a disk that is full, also when that was found out for the piece before.
        """
        place = locate(self._plan.inputs[piece.file][0])
        choice = None if self._config.keep_thoughts is None else ThoughtChoice(self._config.keep_thoughts)
        with whole_folder(self._config.output / "pieces" / piece.name, self._sync_aside) as folder:
            with ExitStack() as stack:
                at_work = _PieceAtWork(self, folder, stack)
                reader = PieceReader(
                    place,
                    piece,
                    self._config.fields.names(),
                    int(self._config.max_record_megabytes * 1e6),
                    at_work.set_aside,
                    self._line_numbers,
                    progress,
                    refused_text=self._refused_text,
                    longest_text=WINDOW[self._encoder.engine],
                    chats=self._chats,
                    choice=choice,
                )
                for batch in reader.batches():
                    if isinstance(batch, LongDocument):
                        at_work.add_long(batch)
                    elif self._chats is not None:
                        at_work.add_chats(batch)
                    else:
                        at_work.add(batch)
            counts = reader.counts
            assert counts.lines_read == counts.records + counts.bad_records + counts.blank_lines
            assert counts.records == at_work.documents + (0 if choice is None else choice.counts.documents_dropped)
            description = {
                "plan": self._fingerprint,
                "arms": self._arms,
                "documents": at_work.documents,
                "counts": {name: getattr(counts, name) for name in COUNTS},
                "sources": {name: numbers.names for name, numbers in at_work.sources.items()},
                "input_stamp": self._plan.stamps[piece.file],
                "input_sha256": sha256_of(place) if piece.is_first else None,
                "sizes": LocalLocation(folder).sizes(),
            } | ({} if choice is None else {"chosen": choice.counts.as_dict()})
            (folder / "piece.json").write_bytes(orjson.dumps(description))

    def _sync_aside(self, give_name: Callable[[], None]) -> None:
        self._wait()
        self._syncing = self._syncing_thread.submit(give_name)

    def _wait(self) -> None:
        try:
            if self._syncing is not None:
                self._syncing.result()
        except OSError as error:
            # A worker whose parent was killed may have ended this piece just before it saw that.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def warn(self, error: RecordError) -> None:
        """Say what was set aside, for the first few."""
        self._warnings += 1
        if self._warnings <= WARNINGS_SHOWN:
            logger.warning("%s; set aside", error)


class _PieceAtWork:
    """The open files of one piece, and what has come so far."""

    def __init__(self, worker: PieceWorker, folder: Path, stack: ExitStack) -> None:
        self._worker, self._config, self._folder, self._stack = worker, worker._config, folder, stack
        self.documents = 0
        self.sources: dict[str, SourceNumbers] = {}
        self._writers: dict[tuple[Arm, str], PartWriter] = {}
        for arm in worker._arms:
            for split in splits(self._config):
                numbers = self.sources[f"{arm}.{split}"] = SourceNumbers()
                writer = PartWriter(
                    folder / f"{arm}.{split}",
                    worker._dtype,
                    worker._eod_id,
                    numbers,
                    ordinals=self._config.deduplicate != "none",
                    parts=token_parts(self._config),
                )
                self._writers[arm, split] = stack.enter_context(writer)
        self._flags = stack.enter_context((folder / "flags.bin").open("wb"))
        self._keys = None if self._config.deduplicate == "none" else stack.enter_context((folder / "keys.bin").open("wb"))
        self._bad: IO[bytes] | None = None

    def set_aside(self, line: bytes, error: RecordError) -> None:
        """Write a bad record to its file; raises it where the policy is to fail."""
        if self._config.on_bad_record == "fail":
            raise error
        if self._bad is None:
            self._bad = self._stack.enter_context((self._folder / "bad.jsonl").open("wb"))
        self._bad.write(describe_bad_record(line, error))
        self._worker.warn(error)

    def add(self, batch: Batch) -> None:
        """Tokenise the texts of a batch, each once, and write what the arms make of them."""
        worker = self._worker
        texts = [augmented.document.text for augmented in batch]
        thought_texts = [self._inside(thought) for augmented in batch for thought in augmented.thoughts] if worker._with_thoughts else []
        flat, offsets = worker._encoder.encode(texts + thought_texts)
        bounds = offsets.tolist()
        ids = [flat[begin:end] for begin, end in pairwise(bounds)]
        thought = len(texts)
        for augmented, text, document in zip(batch, texts, ids, strict=False):
            count = len(augmented.thoughts) if worker._with_thoughts else 0
            sha256 = hashlib.sha256(text.encode()).digest() if worker._hashes else b""
            if self._keys is not None:
                self._keys.write(exact_key(sha256) if worker._near is None else worker._near.keys(StringText(text).pieces()))
            ends = worker._encoder.token_ends(text, document) if worker._interleaves and count else None
            self._arrange(augmented, sha256, document, ids[thought : thought + count], worker._delimiters, ends, long=False)
            thought += count
        for writer in self._writers.values():
            writer.flush()

    def add_chats(self, batch: Batch) -> None:
        """Tokenise the segments of a batch of chats, each by itself, and write them."""
        chats = [chat for chat in batch if isinstance(chat, Chat)]
        flat, offsets = self._worker._encoder.encode([text for chat in chats for _, text in chat.segments])
        bounds = iter(pairwise(offsets.tolist()))
        for chat in chats:
            sha256 = hashlib.sha256(chat.document.text.encode()).digest()
            if self._keys is not None:
                self._keys.write(exact_key(sha256))
            validation = self._in_validation(sha256)
            segments = [(part, flat[begin:end]) for (part, _), (begin, end) in zip(chat.segments, bounds, strict=False)]
            row = Row(chat.document.id, 0, chat.document.source, None, self.documents)
            self._writers["chat", "validation" if validation else "train"].add(segments, row, chat.end)
            self._flags.write(bytes([validation * IN_VALIDATION | WITHOUT_THOUGHTS]))
            self.documents += 1
        for writer in self._writers.values():
            writer.flush()

    def _in_validation(self, sha256: bytes) -> bool:
        fraction = self._config.validation_fraction
        return fraction > 0 and in_validation(sha256, fraction)

    def add_long(self, long: LongDocument) -> None:
        """Tokenise and write one document whose text or tokens are too many to hold at once."""
        worker, spool = self._worker, self._folder / "long.tmp"
        sha256 = long.sha256
        if self._keys is not None:
            self._keys.write(exact_key(sha256) if worker._near is None else worker._near.keys(long.text.pieces()))
        texts = [self._inside(thought) for thought in long.augmented.thoughts] if worker._with_thoughts else []
        thoughts = [worker._encoder.encode([text])[0] for text in texts]
        interleaved = worker._interleaves and bool(thoughts)
        count, ends, seen = 0, [], 0
        with open(spool, "wb") as file:
            for text, ids in worker._encoder.encode_long(long.text.pieces()):
                file.write(ids.data)
                count += len(ids)
                if interleaved:
                    ends.append(seen + worker._encoder.token_ends(text, ids))
                    seen += len(text)
        delimiters: DelimiterIds[Any] = worker._delimiters
        self._arrange(long.augmented, sha256, SpooledIds(spool, 0, count), thoughts, delimiters, np.concatenate(ends) if ends else None, long=True)
        spool.unlink()

    def _inside(self, thought: Thought) -> str:
        inside = self._config.delimiters.inside
        return f"{inside}{thought.text}{inside}"

    def _arrange(
        self,
        augmented: AugmentedDocument,
        sha256: bytes,
        document: Any,
        thoughts: Sequence[Any],
        delimiters: DelimiterIds[Any],
        ends: npt.NDArray[np.int64] | None,
        *,
        long: bool,
    ) -> None:
        config, source, identity = self._config, augmented.document.source, augmented.document.id
        validation = self._in_validation(sha256)
        split = "validation" if validation else "train"
        cuts = [len(document)] * len(thoughts) if ends is None else _cuts(augmented.thoughts, ends)
        for arm in self._worker._arms:
            writer = self._writers[arm, split]
            assert arm != "chat"
            how = plain_arm(arm, sha256, config.mixed)
            for sequence in sequences(how, document, thoughts, delimiters, cuts, as_samples=config.thoughts == "samples"):
                generators = dict.fromkeys(augmented.thoughts[i].generator for i in sequence.thoughts)
                row = Row(identity, sequence.sample, source, "+".join(generators) or None, self.documents)
                writer.add_long(sequence.segments, row) if long else writer.add(sequence.segments, row)
        self._flags.write(bytes([validation * IN_VALIDATION | (not augmented.thoughts) * WITHOUT_THOUGHTS]))
        self.documents += 1


def _cuts(thoughts: Sequence[Thought], ends: npt.NDArray[np.int64]) -> list[int]:
    """Return after how many tokens each thought comes: those that hold what it saw, whole tokens. Unknown: all."""
    return [len(ends) if thought.seen_end is None else cut_after(ends, thought.seen_end) for thought in thoughts]
