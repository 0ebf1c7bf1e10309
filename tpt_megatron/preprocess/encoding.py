"""Tokenising fast, and the same: fastokens where it gives the ids that Hugging Face's tokenizers gives, tokenizers where it does not.

fastokens is many times faster and young, so it is never trusted unseen: before a run both encode a sample of the input, and with
verify=full every text.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers

from tpt_megatron.errors import ConfigError, MachineError
from tpt_megatron.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerLike

logger = logging.getLogger(__name__)

Engine = Literal["fastokens", "tokenizers", "sentencepiece"]
Ids = npt.NDArray[np.uint32]
Batch = tuple[Ids, npt.NDArray[np.int64]]
"""ids of all texts end to end, and where each text's begin in them: [texts + 1]."""

WINDOW = {"fastokens": 500_000, "sentencepiece": 1_000_000, "tokenizers": 250_000}
"""Characters of a long text that are encoded at once. Hugging Face's encodings take hundreds of bytes a token."""
CONTEXT = 1_000
"""Characters on either side of a cut on which it is tried."""
LOOK_BACK = 50_000
"""Characters before a window's end among which a cut between words is looked for."""
CUTS_TRIED = 8
"""Between words, of each kind."""
CUTS_WITHIN_TRIED = 2
"""Elsewhere: each takes encoding all of the window."""
TEXT_AT_ONCE = 1_000_000
"""Characters of a batch that Hugging Face's tokenizers is given at once."""


def choose_engine(
    tokenizer: TokenizerLike,
    wanted: Literal["auto", "fastokens", "tokenizers"],
    sample: Sequence[str],
    *,
    verify_all: bool = False,
    reads_special: bool = False,
) -> Encoder:
    """Return an encoder of the engine that is to tokenise: fastokens where it can, unless `wanted` says otherwise, and a line in the log where it cannot.

    reads_special: see Encoder.

    Raises MachineError or ConfigError where fastokens is wanted and is not installed, cannot do this tokenizer, or differs on a text of `sample`.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return Encoder(tokenizer, "sentencepiece")
    reference = Encoder(tokenizer, "tokenizers", reads_special=reads_special)
    if wanted == "tokenizers":
        return reference
    try:
        fast = Encoder(tokenizer, "fastokens", reads_special=reads_special)
    except ImportError:
        if wanted == "fastokens":
            raise MachineError("engine=fastokens is not installed; run: pip install fastokens") from None
        logger.info("fastokens is not installed: Hugging Face's tokenizers is used, which takes many times as long")
        return reference
    except ValueError as error:
        if wanted == "fastokens":
            raise ConfigError(f"engine=fastokens cannot do this tokenizer ({error}); give engine=auto") from None
        logger.info("fastokens cannot do this tokenizer (%s): Hugging Face's tokenizers is used", error)
        return reference
    difference = _difference(sample, fast.encode(sample), reference.encode(sample))
    if difference is None:
        fast.verify_all = verify_all
        return fast
    if wanted == "fastokens":
        raise ConfigError(f"engine=fastokens differs from Hugging Face's tokenizers on a sample of the input: {difference}; give engine=auto")
    logger.warning("fastokens differs from Hugging Face's tokenizers on a sample of the input: %s; Hugging Face's tokenizers is used", difference)
    return reference


class Encoder:
    """Texts to ids, by `engine`; with `verify_all` also by the reference, which takes over for good where they differ.

    reads_special: text that spells a special token is that token, as in what a chat template writes; otherwise it is text.
    """

    def __init__(self, tokenizer: TokenizerLike, engine: Engine, *, verify_all: bool = False, reads_special: bool = False) -> None:
        self.engine: Engine = engine
        self._tokenizer = tokenizer
        self._reads_special = reads_special
        self.verify_all = verify_all and engine == "fastokens"
        self._encode: _Fastokens | _HuggingFace | _SentencePiece
        if isinstance(tokenizer, SentencePieceTokenizer):
            self._encode = _SentencePiece(tokenizer)
        else:
            assert isinstance(tokenizer, Tokenizer)
            self._encode = _Fastokens(tokenizer, reads_special) if engine == "fastokens" else _HuggingFace(tokenizer, reads_special)

    def encode(self, texts: Sequence[str]) -> Batch:
        """Return the ids of all texts, and where each text's begin."""
        made = self._encode.encode(texts)
        if not self.verify_all:
            return made
        assert isinstance(self._tokenizer, Tokenizer)
        reference = _HuggingFace(self._tokenizer, self._reads_special)
        expected = reference.encode(texts)
        difference = _difference(texts, made, expected)
        if difference is not None:
            logger.warning("fastokens differs from Hugging Face's tokenizers: %s; Hugging Face's tokenizers is used from here on", difference)
            self._encode, self.engine, self.verify_all = reference, "tokenizers", False
        return expected

    def encode_long(self, pieces: Iterable[str]) -> Iterator[tuple[str, Ids]]:
        """Yield (a part of the text, its ids); together the text that comes in `pieces`, and the ids that it has as a whole.

        The text is cut where encoding what stands around the cut as a whole and as two gives the same. That is exact for
        tokenizers that look ahead no further than CONTEXT characters, as pre-tokenizers do that split a text by patterns from
        left to right; where no such cut is found, the window doubles, to the whole text if need be.
        """
        waiting: list[str] = []
        length, wanted = 0, WINDOW[self.engine]
        for piece in pieces:
            waiting.append(piece)
            length += len(piece)
            while length >= wanted + CONTEXT:
                text = "".join(waiting)
                cut = self._safe_cut(text, wanted)
                if cut is None:
                    waiting, wanted = [text], 2 * wanted  # grown by one window each time, a text without cuts takes the square of its length
                    continue
                yield text[:cut], self.encode([text[:cut]])[0]
                waiting, length, wanted = [text[cut:]], length - cut, WINDOW[self.engine]
        text = "".join(waiting)
        if text:
            yield text, self.encode([text])[0]

    def _safe_cut(self, text: str, latest: int) -> int | None:
        """Return a place at or before `latest` where the text may be cut; None where none was found."""
        for cut in _between_words(text, latest):
            if self._may_cut(text[max(0, cut - CONTEXT) : cut + CONTEXT], min(cut, CONTEXT)):
                return cut
        # Within a run of anything (digits in groups of three, blanks in tokens of 32) what stands before it decides, so all of it is
        # encoded. Places where what follows does not begin a token are many, and soon told.
        text = text[: latest + CONTEXT]
        ids = self._encode.encode([text])[0]
        places = (cut for cut in range(latest, max(0, latest - CONTEXT), -1) if _ends_with(ids, self._encode.encode([text[cut:]])[0]))
        return next((cut for cut in islice(places, CUTS_WITHIN_TRIED) if self._may_cut(text, cut)), None)

    def _may_cut(self, text: str, cut: int) -> bool:
        ids, bounds = self._encode.encode([text, text[:cut], text[cut:]])
        return np.array_equal(ids[: bounds[1]], ids[bounds[1] :])

    def token_ends(self, text: str, ids: Ids) -> npt.NDArray[np.int64]:
        """Return, for each of the ids of `text`, how many whole characters of it that token and those before it cover: [tokens]."""
        lengths = self._byte_lengths
        if lengths is not None:
            ends = np.cumsum(lengths[ids])
            data = np.frombuffer(text.encode(), np.uint8)
            if len(ends) and ends[-1] == len(data):
                if len(data) == len(text):
                    return ends
                # A character counts when its last byte is covered: where the next one begins.
                begins = np.concatenate((np.flatnonzero((data & 0xC0) != 0x80), [len(data)]))
                return np.searchsorted(begins, ends, side="right") - 1
        again, found = self._tokenizer.ends(text)
        assert again == ids.tolist(), "offsets are of other tokens than the ids"
        return np.minimum(np.maximum.accumulate(np.array([*found[:-1], len(text)][: len(found)], np.int64)), len(text))

    @cached_property
    def _byte_lengths(self) -> npt.NDArray[np.int64] | None:
        """Bytes that each token stands for, [vocabulary]; None where tokens are not of bytes, or a normalizer changes the text."""
        if not isinstance(self._tokenizer, Tokenizer):
            return None
        definition = orjson.loads(self._tokenizer.definition)
        if definition.get("normalizer") is not None or (definition.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        lengths = np.zeros(self._tokenizer.vocabulary_size, np.int64)
        for token, number in self._tokenizer.backend.get_vocab(with_added_tokens=False).items():
            lengths[number] = len(token)  # the byte-level alphabet has one character a byte
        for number, added in self._tokenizer.backend.get_added_tokens_decoder().items():
            lengths[number] = len(added.content.encode())
        return lengths


def _between_words(text: str, latest: int) -> Iterator[int]:
    """Yield some places before a line's first character, and then before a space and a word: where pre-tokenizers cut whatever came before."""
    for is_one in (_begins_line, _ends_word):
        places = (cut for cut in range(latest, max(latest // 2, latest - LOOK_BACK), -1) if is_one(text, cut))
        yield from islice(places, CUTS_TRIED)


def _ends_with(ids: Ids, end: Ids) -> bool:
    return len(end) <= len(ids) and np.array_equal(ids[len(ids) - len(end) :], end)


def _begins_line(text: str, at: int) -> bool:
    return text[at - 1] == "\n" and not text[at].isspace()


def _ends_word(text: str, at: int) -> bool:
    return text[at] == " " and not text[at - 1].isspace() and not text[at + 1].isspace()


def _difference(texts: Sequence[str], made: Batch, expected: Batch) -> str | None:
    """Return where two encodings of `texts` first differ; None where they do not."""
    if np.array_equal(made[1], expected[1]) and np.array_equal(made[0], expected[0]):
        return None
    for number, text in enumerate(texts):
        ours, theirs = (ids[bounds[number] : bounds[number + 1]].tolist() for ids, bounds in (made, expected))
        if ours != theirs:
            at = next((i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), min(len(ours), len(theirs)))
            return f"text {number} ({text[:40]!r}...) from token {at} on: {ours[at : at + 4]} for {theirs[at : at + 4]}"
    raise AssertionError("encodings differ, but not in any text")


class _Fastokens:
    """fastokens on one thread: there is a process for each core."""

    def __init__(self, tokenizer: Tokenizer, reads_special: bool) -> None:
        from fastokens import Tokenizer as Fast

        self._fast: Any = Fast.from_json_str(tokenizer.definition)
        self._special_is_text = not reads_special
        with _one_core():  # its threads are made at the first call, as many as there are cores to run on
            self._fast.encode_batch_flat(["a", "b"], False, True)

    def encode(self, texts: Sequence[str]) -> Batch:
        """Encode."""
        ids, bounds = self._fast.encode_batch_flat(list(texts), False, self._special_is_text)
        return np.frombuffer(ids, np.uint32), np.frombuffer(bounds, np.int64)


@contextmanager
def _one_core() -> Iterator[None]:
    if not hasattr(os, "sched_setaffinity"):  # no Linux
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


class _HuggingFace:
    """Hugging Face's tokenizers: the reference."""

    def __init__(self, tokenizer: Tokenizer, reads_special: bool) -> None:
        # In what the definition describes, special tokens are read: that they are text is the setting of `Tokenizer`.
        self._backend: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(tokenizer.definition) if reads_special else tokenizer.backend

    def encode(self, texts: Sequence[str]) -> Batch:
        """Encode, a bounded amount of text at a time."""
        made: list[Ids] = []
        begin = characters = 0
        for end, text in enumerate([*texts, ""], 1):
            characters += len(text)
            if end == len(texts) + 1 or characters >= TEXT_AT_ONCE:
                encodings = self._backend.encode_batch_fast(list(texts[begin:end]), add_special_tokens=False)
                made += [np.array(encoding.ids, np.uint32) for encoding in encodings]
                begin, characters = end, 0
        return _flat(made)


class _SentencePiece:
    """SentencePiece."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._processor = tokenizer.processor

    def encode(self, texts: Sequence[str]) -> Batch:
        """Encode."""
        return _flat([self._processor.EncodeAsNumpy(text).astype(np.uint32) for text in texts])


def _flat(made: list[Ids]) -> Batch:
    bounds = np.zeros(len(made) + 1, np.int64)
    np.cumsum([len(ids) for ids in made], out=bounds[1:])
    return (np.concatenate(made) if made else np.empty(0, np.uint32)), bounds
