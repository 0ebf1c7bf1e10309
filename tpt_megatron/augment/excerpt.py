"""The part of a document that a prompt shows: its beginning, or one chunk after the other, cut where the text allows.

Limits are in tokens of the generating model. No part of a long document is tokenised that no excerpt comes near.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import orjson
import tokenizers

from tpt_megatron.config.augment import Chunks
from tpt_megatron.errors import ConfigError
from tpt_megatron.tokenizer import read_tokenizer_json

_CHARACTERS_PER_TOKEN = 5  # first guess of how much text fills a limit; doubled until it does
_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u2019\u201d)\]]*(?=\s)|[\u3002\uff01\uff1f\uff0e]+[\u300d\u300f\u2019\u201d\uff09]*")
_SPACE = re.compile(r"\s+")
_JOINER = "\u200d"
_LONGEST_GRAPHEME = 32  # code points; a longer one is cut


@dataclass(frozen=True, slots=True)
class Excerpt:
    """`text` is the document's characters [start, end); `before` is what precedes it, as much as is shown."""

    text: str
    start: int
    end: int
    before: str = ""


def load_counting_tokenizer(name: str) -> tokenizers.Tokenizer:
    """Load a `tokenizer.json`, or the folder that holds one, to count with: no padding, no truncation.

    Raises ConfigError when `name` stands for nothing, DataError when the file is damaged.
    """
    tokenizer = read_tokenizer_json(name, "give the generating model's tokenizer.json, or the folder that holds it")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "<|im_end|>" in a document is text
    return tokenizer


class Excerpts:
    """Cuts documents into what prompts show of them.

    With `chunks`, a document gives consecutive excerpts of at most `chunks.tokens` tokens, which together are the document,
    each with at most `chunks.before_tokens` tokens of what precedes it. Without, it gives one: its beginning, of at most
    `document_tokens` tokens (None: all of it). Raises ConfigError when there is something to count and no tokenizer.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer | None, document_tokens: int | None, chunks: Chunks | None) -> None:
        self._limit = document_tokens if chunks is None else chunks.tokens
        self._chunks = chunks
        if tokenizer is None and self._limit is not None:
            raise ConfigError("a tokenizer is needed to count document_tokens and chunks; name one, or set document_tokens=null")
        self._cutter = None if tokenizer is None else Cutter(tokenizer)

    def of(self, text: str) -> list[Excerpt]:
        """Return the excerpts of a document, in its order; at least one."""
        if self._cutter is None or self._limit is None:
            return [Excerpt(text, 0, len(text))]
        end = self._cutter.end_of_prefix(text, 0, self._limit)
        excerpts = [Excerpt(text[:end], 0, end)]
        while self._chunks is not None and end < len(text):
            start, end = end, self._cutter.end_of_prefix(text, end, self._limit)
            before = text[self._cutter.start_of_suffix(text, start, self._chunks.before_tokens) : start]
            excerpts.append(Excerpt(text[start:end], start, end, before))
        return excerpts


class Cutter:
    """Finds where a part of a text with a limited number of tokens ends or starts."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_bound_tokens, self._for_ascii_only = _bound_by_bytes(tokenizer)

    def end_of_prefix(self, text: str, start: int, limit: int) -> int:
        """Return the largest good end such that text[start:end] has at most `limit` tokens by itself.

        A single character of more than `limit` tokens is a part of its own.
        """
        if self._surely_fits(text, start, limit):
            return len(text)
        size = limit * _CHARACTERS_PER_TOKEN
        while len(offsets := self._offsets(text[start : start + size])) <= limit:
            if start + size >= len(text):
                return len(text)
            size *= 2
        end = start + len(text[start : start + size])
        while len(offsets) > limit:
            # The next token may start within the last one's character, where a character is several tokens.
            exact = start + min(offsets[limit - 1][1], offsets[limit][0])
            end = end_at_boundary(text, start, max(start + 1, min(exact, end - 1)))
            if end == start + 1:
                break
            offsets = self._offsets(text[start:end])
        return end

    def start_of_suffix(self, text: str, end: int, limit: int) -> int:
        """Return the smallest good start such that text[start:end] has at most `limit` tokens by itself."""
        if limit == 0:
            return end
        size = limit * _CHARACTERS_PER_TOKEN
        while len(offsets := self._offsets(text[max(0, end - size) : end])) <= limit:
            if size >= end:
                return 0
            size *= 2
        start = max(0, end - size)
        while len(offsets) > limit:
            exact = start + max(offsets[-limit][0], offsets[-limit - 1][1])
            start = start_at_boundary(text, max(exact, start + 1), end)
            offsets = self._offsets(text[start:end])
        return start

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Return the characters [start, end) of each token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def _surely_fits(self, text: str, start: int, limit: int) -> bool:
        if not self._bytes_bound_tokens or len(text) - start > limit:
            return False
        rest = text[start:]
        return rest.isascii() or (not self._for_ascii_only and len(rest.encode("utf-8", "surrogatepass")) <= limit)


def _bound_by_bytes(tokenizer: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """Say whether a text of n UTF-8 bytes has at most n tokens, and whether that is known for ASCII only."""
    definition = orjson.loads(tokenizer.to_str())
    splitters = _members(definition["pre_tokenizer"], "pretokenizers")
    normalizers = {part["type"] for part in _members(definition["normalizer"], "normalizers")}
    byte_level = [part for part in splitters if part["type"] == "ByteLevel"]
    # A prefix space adds bytes; NFC may, but not to ASCII. Other parts might, so they are not reasoned about.
    bound = len(byte_level) == 1 and not byte_level[0]["add_prefix_space"] and {part["type"] for part in splitters} <= {"ByteLevel", "Split", "Digits"}
    return bound and normalizers <= {"NFC"}, bool(normalizers)


def _members(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the parts of a tokenizer's sequence, or the one part that stands in its place."""
    return [] if part is None else part.get(key, [part])


def end_at_boundary(text: str, start: int, end: int) -> int:
    """Move the end of text[start:end] back to where a paragraph ends, else a line, a sentence, a word; at most half of its length.

    A text without any of these keeps its end, except within a grapheme.
    """
    if end >= len(text):
        return end
    earliest = end - (end - start) // 2
    if text[end] == "\n" and text[end - 1] != "\r":
        return end
    for line_end in ("\n\n", "\n"):
        if (found := text.rfind(line_end, earliest, end)) >= 0:
            return found + len(line_end)
    sentence = 0
    for match in _SENTENCE_END.finditer(text, earliest, end + 1):
        sentence = match.end() if match.end() <= end else sentence
    if sentence:
        return sentence
    if text[end].isspace() and text[end - 1] != "\r":
        return end
    # Before the space, not after: the tokens of most models hold the space before a word.
    for at in range(end - 1, earliest, -1):
        if text[at].isspace() and not text[at - 1].isspace():
            return at
    return _grapheme_start(text, end, earliest)


def start_at_boundary(text: str, start: int, end: int) -> int:
    """Move the start of text[start:end] on to where a line starts, else a sentence, else a word; at most half of its length."""
    if start <= 0 or text[start - 1] == "\n":
        return start
    latest = start + (end - start) // 2
    if (line := text.find("\n", start, latest)) >= 0:
        return line + 1
    for pattern in (_SENTENCE_END, _SPACE):
        if match := pattern.search(text, start, latest):
            return match.end()
    return start


def _grapheme_start(text: str, at: int, earliest: int) -> int:
    """Return the last position up to `at` that is not within a grapheme, as far as combining characters and joiners tell."""
    for position in range(at, max(earliest, at - _LONGEST_GRAPHEME), -1):
        joined = text[position - 1] == _JOINER or text[position] == _JOINER or text[position - 1 : position + 1] == "\r\n"
        if not joined and not _continues_grapheme(text[position]):
            return position
    return at


def _continues_grapheme(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Me", "Mc") or "\U0001f3fb" <= character <= "\U0001f3ff"
