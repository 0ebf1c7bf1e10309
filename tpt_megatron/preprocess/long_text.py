"""Texts too large to hold twice: a document of 100 MB stays what it is in its line, and is decoded a piece at a time.

Python would hold such a text in one to four bytes a character, beside the line and the tokens.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import orjson

from tpt_megatron.errors import RecordError

LONG_LINE = 8_000_000
"""Bytes from which a line's text is handled this way."""
DECODED_AT_ONCE = 1_000_000
LONGEST_CHARACTER = 12
"""Bytes: a pair of surrogates, each written as an escape."""
_BACKSLASH = 0x5C


class StringText:
    """A text that is held as it is, to be worked off in pieces."""

    def __init__(self, text: str) -> None:
        self._text = text

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of at most a million characters."""
        return (self._text[begin : begin + DECODED_AT_ONCE] for begin in range(0, len(self._text), DECODED_AT_ONCE))


class LongText:
    """The text that a JSON string literal spells."""

    def __init__(self, literal: memoryview) -> None:
        self._literal = literal

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces of at most a million characters. Raises orjson.JSONDecodeError where it is no JSON."""
        begin = 0
        while begin < len(self._literal):
            piece, begin = self._decode_some(begin)
            yield piece

    def _decode_some(self, begin: int) -> tuple[str, int]:
        """Return a piece and where the next begins: where what comes before decodes, which it does not within a character or an escape."""
        end = min(len(self._literal), begin + DECODED_AT_ONCE)
        shortest = end if end == len(self._literal) else max(begin + 1, end - LONGEST_CHARACTER + 1)
        for stop in range(end, shortest, -1):
            with suppress(orjson.JSONDecodeError):
                return self._decode(begin, stop), stop
        return self._decode(begin, shortest), shortest

    def _decode(self, begin: int, stop: int) -> str:
        return str(orjson.loads(b"".join((b'"', self._literal[begin:stop], b'"'))))

    def measure(self, refused: str | None = None) -> tuple[int, bool, str, bool]:
        """Decode all of it once; return its characters, whether all of them are white space, the SHA-256 of its UTF-8, and whether it holds `refused`."""
        digest, length, blank, holds, end = hashlib.sha256(), 0, True, False, ""
        for piece in self.pieces():
            digest.update(piece.encode())
            length += len(piece)
            blank = blank and piece.isspace()
            if refused is not None:
                holds = holds or refused in end + piece
                end = (end + piece)[1 - len(refused) :] if len(refused) > 1 else ""
        return length, blank, digest.hexdigest(), holds


PLACEHOLDER = uuid.uuid4().hex
"""Stands for a long text in its record; no record holds it by chance."""


def split_long_line(line: bytearray, field: str, where: str) -> tuple[dict[str, Any], bytes, LongText] | None:
    """Return (the record with PLACEHOLDER for its text, that as JSON, the text); None where what is long is not the record's own text.

    Raises RecordError as `parse_json_line` does. The text is checked by `LongText.measure`.
    """
    span = _string_span(line, field)
    if span is None or span[1] - span[0] < LONG_LINE // 2:
        return None
    view = memoryview(line)
    rest = b"".join((view[: span[0]], PLACEHOLDER.encode(), view[span[1] :]))
    try:
        record = orjson.loads(rest)
    except orjson.JSONDecodeError as error:
        raise RecordError(where, f"not valid JSON: {error}") from None
    is_its_own = isinstance(record, dict) and record.get(field) == PLACEHOLDER
    return (record, rest, LongText(view[span[0] : span[1]])) if is_its_own else None


def _string_span(line: bytearray, field: str) -> tuple[int, int] | None:
    """Return where the longest string literal that is the value of a key `field` begins and ends, without its quotes."""
    key, found, at = b'"%b"' % field.encode(), None, 0
    while (at := line.find(key, at)) != -1:
        begin = at + len(key)
        head = bytes(line[begin : begin + 64]).lstrip()
        if head.startswith(b":") and (quoted := head[1:].lstrip()).startswith(b'"'):
            begin += len(line[begin : begin + 64]) - len(quoted) + 1
            end = closing_quote(line, begin)
            if end is not None and (found is None or end - begin > found[1] - found[0]):
                found = begin, end
            at = begin if end is None else end
        else:
            at = begin
    return found


def closing_quote(line: bytes | bytearray, begin: int) -> int | None:
    """Return where the string literal ends in which byte `begin` is; None where it does not."""
    at = begin
    while (at := line.find(b'"', at)) != -1:
        backslashes = 0
        while line[at - 1 - backslashes] == _BACKSLASH:
            backslashes += 1
        if backslashes % 2 == 0:
            return at
        at += 1
    return None
