"""Reading one piece of the input: documents in batches of bounded size, bad records aside, and every line counted."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from typing import IO, Any

import orjson

from tpt_megatron.bad_records import LineCounts
from tpt_megatron.errors import RecordError
from tpt_megatron.files import decompressed, is_compressed, parse_json_line, reading
from tpt_megatron.preprocess.chat import Chat, ChatReader
from tpt_megatron.preprocess.choosing import ThoughtChoice
from tpt_megatron.preprocess.long_text import LONG_LINE, LongText, StringText, closing_quote, split_long_line
from tpt_megatron.preprocess.plan import Piece
from tpt_megatron.record_files import read_rows, too_long
from tpt_megatron.records import AugmentedDocument, FieldNames, check_thoughts, read_augmented
from tpt_megatron.storage import Location

BLOCK = 1_000_000  # bytes; small enough for what is read to be in the cache still when it is parsed
DOCUMENTS_PER_BATCH = 2000
CHARACTERS_PER_BATCH = 1_000_000
_CARRIAGE_RETURN, _WHITE_SPACE = 0x0D, b" \t\r\v\f"
SHOWN = 4096
"""Bytes that are kept of a record which is too long."""

Batch = list[AugmentedDocument]
Refused = tuple[bytes, RecordError]
SetAside = Callable[[bytes, RecordError], None]
"""Takes a bad record; raises the error where the policy is to fail."""


@dataclass(frozen=True, slots=True)
class LongDocument:
    """A document whose text, or whose tokens, are too many to be held at once. `augmented` may have an empty text; sha256 is the text's."""

    augmented: AugmentedDocument
    text: LongText | StringText
    sha256: bytes


class LineNumbers:
    """Counts the lines before a place in a file, for messages: once a file, however many pieces of it have bad records."""

    def __init__(self) -> None:
        self._known: tuple[str, int, int] = ("", 0, 0)

    def before(self, place: Location, offset: int) -> int:
        """Return how many lines begin before byte `offset`, at which one begins."""
        name, at, lines = self._known
        if name != str(place) or at > offset:
            at = lines = 0
        with place.open() as file:
            file.seek(at)
            while at < offset:
                block = file.read(min(BLOCK, offset - at))
                if not block:
                    break
                lines += block.count(b"\n")
                at += len(block)
        self._known = (str(place), offset, lines)
        return lines


@dataclass(slots=True)
class PieceReader:
    """Reads the records of one piece; `counts` holds when `batches` is exhausted. `progress` hears of bytes.

    refused_text: the end-of-document token's spelling, where this tokenizer reads it in a text as that token
    longest_text: characters from which on a text is a long one; chats are none
    chats: reads chats, where the records are chats
    choice: chooses among a document's thoughts
    """

    place: Location
    piece: Piece
    names: FieldNames
    longest: int
    set_aside: SetAside
    line_numbers: LineNumbers
    progress: Callable[[int], object]
    refused_text: str | None = None
    longest_text: int = 4 * CHARACTERS_PER_BATCH
    chats: ChatReader | None = None
    choice: ThoughtChoice | None = None
    counts: LineCounts = field(default_factory=LineCounts)
    _first_line: int = 0  # byte at which the first line of the piece begins

    def batches(self) -> Iterator[Batch | LongDocument]:
        """Yield the documents in order. Raises DataError when the file cannot be read, RecordError under the policy `fail`."""
        if self.place.name.endswith(".parquet"):
            yield from self._in_batches(self._parquet_documents())
        else:
            yield from self._in_batches(self._line_documents())

    def _in_batches(self, documents: Iterator[AugmentedDocument | LongDocument | Refused]) -> Iterator[Batch | LongDocument]:
        batch: Batch = []
        characters = 0
        for document in documents:
            if isinstance(document, tuple):
                self.counts.bad_records += 1
                self.set_aside(*document)
                continue
            self.counts.records += 1
            if self.choice is not None:
                chosen = _with_chosen_thoughts(document, self.choice)
                if chosen is None:
                    continue
                document = chosen
            if isinstance(document, AugmentedDocument) and len(document.document.text) > self.longest_text and self.chats is None:
                text = document.document.text
                document = LongDocument(document, StringText(text), _sha256(StringText(text)))
            if isinstance(document, LongDocument):
                if batch:
                    yield batch
                batch, characters = [], 0
                yield document
                continue
            batch.append(document)
            characters += len(document.document.text) + sum(len(thought.text) for thought in document.thoughts)
            if characters >= CHARACTERS_PER_BATCH or len(batch) >= DOCUMENTS_PER_BATCH:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _parquet_documents(self) -> Iterator[AugmentedDocument | Refused]:
        piece = self.piece
        rows = read_rows(self.place, first=piece.start, longest=self.longest, progress=self.progress)
        for row in islice(rows, piece.stop - piece.start):
            self.counts.lines_read += 1
            try:
                document = self._read(row.parse(), row.where)
            except RecordError as error:
                yield row.line(), error
            else:
                yield document

    def _line_documents(self) -> Iterator[AugmentedDocument | LongDocument | Refused]:
        with reading(self.place, self._number), self.place.open() as file:
            lines = _Lines(decompressed(file, self.place.name), self.longest, self.progress)
            self._first_line = lines.skip_to(self.piece.start) if self.piece.start else 0
            stop = None if is_compressed(self.place.name) else self.piece.stop
            for line in lines.until(stop):
                self.counts.lines_read += 1
                if line.is_blank():
                    self.counts.blank_lines += 1
                    continue
                try:
                    document = self._read_line(line)
                except RecordError as error:
                    yield bytes(line.view()), RecordError(f"{self.place}:{self._number()}", error.reason)
                else:
                    yield document

    def _number(self) -> int:
        """Return the number of the line that was read last, from 1, in the file."""
        before = self.line_numbers.before(self.place, self._first_line) if self._first_line else 0
        return before + self.counts.lines_read

    def _read_line(self, line: _Line) -> AugmentedDocument | LongDocument:
        if line.length > self.longest:
            raise RecordError("", too_long(line.length, self.longest))
        if isinstance(line.data, bytearray) and self.chats is None:
            split = split_long_line(line.data, self.names.text, "")
            if split is not None:
                return self._read_long(*split)
        try:
            value = orjson.loads(line.view())
        except orjson.JSONDecodeError:
            value = parse_json_line(bytes(line.view()), "")
        document = self._read(value, "")
        if isinstance(document, Chat) or not _has_each_key_once(line, document, self.names):
            _refuse_repeated_keys(line)
        return document

    def _read(self, value: object, where: str) -> AugmentedDocument:
        """Return the document or the chat of a parsed value; RecordError where it is none."""
        if self.chats is not None:
            return self.chats.read(value, where)
        document = read_augmented(value, where, self.names)
        self._check(document, where, len(document.document.text))
        return document

    def _check(self, document: AugmentedDocument, where: str, length: int, sha256: str | None = None) -> None:
        """Raise RecordError for a text that would end its document early, and for a thought that is not about this text.

        The latter also where no arm puts thoughts at what they saw: all arms hold the very same documents.
        """
        refused = self.refused_text
        if refused is not None and any(refused in text for text in (document.document.text, *(thought.text for thought in document.thoughts))):
            raise RecordError(where, _spells(refused))
        check_thoughts(document, where, length, sha256)
        if self.choice is not None:
            self.choice.check(document, where)

    def _read_long(self, record: dict[str, Any], rest: bytes, text: LongText) -> LongDocument:
        try:
            length, blank, sha256, spells_end = text.measure(self.refused_text)
        except orjson.JSONDecodeError as error:
            raise RecordError("", f"field {self.names.text!r} is not valid JSON: {error}") from None
        except UnicodeEncodeError:
            raise RecordError("", f"field {self.names.text!r} holds a lone surrogate, which is not text") from None
        if spells_end:
            raise RecordError("", _spells(str(self.refused_text)))
        if blank:
            record[self.names.text] = ""
        if record.get(self.names.id) is None:
            record[self.names.id] = sha256[:32]
        document = read_augmented(record, "", self.names)
        line = _Line(rest, 0, len(rest))
        if not _has_each_key_once(line, document, self.names):
            _refuse_repeated_keys(line)
        bare = replace(document, document=replace(document.document, text=""))
        self._check(bare, "", length, sha256)
        return LongDocument(bare, text, bytes.fromhex(sha256))


def _with_chosen_thoughts(document: AugmentedDocument | LongDocument, choice: ThoughtChoice) -> AugmentedDocument | LongDocument | None:
    """Return a document with those of its thoughts that stay; None where it is dropped."""
    chosen = choice.of(document.augmented if isinstance(document, LongDocument) else document)
    return replace(document, augmented=chosen) if chosen is not None and isinstance(document, LongDocument) else chosen


class _Line:
    """A line without its end: data[begin:end], not copied out of the block that it was read with. `length`: of all of it, where less was kept."""

    __slots__ = ("begin", "data", "end", "length")

    def __init__(self, data: bytes | bytearray, begin: int, end: int, passed_over: int = 0) -> None:
        if end > begin and data[end - 1] == _CARRIAGE_RETURN:
            end -= 1
        self.data, self.begin, self.end, self.length = data, begin, end, end - begin + passed_over

    def view(self) -> memoryview:
        """Return the line's bytes."""
        return memoryview(self.data)[self.begin : self.end]

    def is_blank(self) -> bool:
        """Say whether there is nothing but white space in it."""
        return self.begin == self.end or (self.data[self.begin] in _WHITE_SPACE and bytes(self.view()).isspace())


class _Lines:
    """Lines of a stream, read in blocks. A line of LONG_LINE bytes or more has a bytearray of its own; of one over `longest` only the beginning is kept."""

    def __init__(self, stream: IO[bytes], longest: int, progress: Callable[[int], object]) -> None:
        self._stream, self._longest, self._progress = stream, longest, progress
        self._at = 0  # of the next byte to be read from the stream

    def skip_to(self, start: int) -> int:
        """Go to the first line that begins at byte `start` or later; return where that is."""
        self._stream.seek(start - 1)
        self._at = start - 1
        while block := self._stream.readline(BLOCK):
            self._at += len(block)
            if block.endswith(b"\n"):
                break
        return self._at

    def until(self, stop: int | None) -> Iterator[_Line]:
        """Yield every line that begins before byte `stop`, or all."""
        if stop is not None and self._at >= stop:
            return
        rest: bytes | bytearray = b""
        is_first = self._at == 0
        passed_over = 0
        while True:
            inside = stop is None or self._at < stop
            block = self._stream.read(BLOCK if stop is None or not inside else min(BLOCK, stop - self._at)) if inside else self._stream.readline(BLOCK)
            self._at += len(block)
            self._progress(len(block))
            at_end = not block
            if is_first:
                block, is_first = block.removeprefix(codecs.BOM_UTF8), False
            cut = block.rfind(b"\n") + 1
            if cut == 0 and not at_end:
                rest, passed_over = self._extend(rest, block, passed_over)
                continue
            if rest or passed_over:
                end = block.find(b"\n") if cut else 0
                rest, passed_over = self._extend(rest, block[:end], passed_over)
                yield _Line(rest, 0, len(rest), passed_over)
                begin, rest, passed_over = end + 1, b"", 0
            else:
                begin = 0
            while begin < cut:
                end = block.find(b"\n", begin)
                yield _Line(block, begin, end)
                begin = end + 1
            if at_end:
                return
            rest = block[cut:]
            if not inside or (stop is not None and self._at >= stop and not rest):
                return

    def _extend(self, rest: bytes | bytearray, block: bytes, passed_over: int) -> tuple[bytes | bytearray, int]:
        """Return the line so far, and how many bytes of it are not kept any more since it is too long to be a record."""
        length = len(rest) + len(block)
        if passed_over or length > self._longest + 2:
            beginning = bytes(rest[:SHOWN]) + block[: max(0, SHOWN - len(rest))]
            return beginning, passed_over + length - len(beginning)
        if isinstance(rest, bytes) and length >= LONG_LINE:
            rest = bytearray(rest)  # grows in place
        rest += block
        return rest, 0


def _sha256(text: StringText) -> bytes:
    digest = hashlib.sha256()
    for piece in text.pieces():
        digest.update(piece.encode())
    return digest.digest()


def _spells(refused: str) -> str:
    return f"the text spells {refused!r}, which this tokenizer reads as the end of the document"


@cache
def _quoted(names: FieldNames) -> tuple[bytes, list[bytes], re.Pattern[bytes]]:
    """Return the text's key as it stands in a line, those of the other fields that are read, and what a key spelled otherwise has in it."""
    read = dict.fromkeys((names.text, names.id, names.source, "thoughts"))
    text, *others = (b'"%b"' % name.encode() for name in read)
    escapes = [rb"\\u00[2-7]" if all(name.isascii() for name in read) else rb"\\u", *([rb"\\/"] if any("/" in name for name in read) else [])]
    return text, others, re.compile(b"|".join(escapes))


def _has_each_key_once(line: _Line, document: AugmentedDocument, names: FieldNames) -> bool:
    """Say whether no key of the record that is read can stand twice, by a look at everything but the text.

    No text can hold a quoted name, since quotes in it are escaped. The text takes at least a byte a character, and comes after all keys of its
    name: a later one would have given another text.
    """
    data, thoughts = line.data, len(document.thoughts)
    text_key, other_keys, spelled_otherwise = _quoted(names)
    characters = len(document.document.text)
    expected = 1 + (thoughts if names.text == "text" else 0)
    if data.count(text_key, line.begin, line.end if thoughts else line.end - characters) != expected:
        return False
    begin = data.find(text_key, line.begin, line.end)
    if thoughts and data.find(b'"thoughts"', line.begin, line.end) < begin:
        return False  # the key that was found may be a thought's
    opening = data.find(b'"', begin + len(text_key), line.end)
    end = closing_quote(data, opening + 1 + characters)
    if end is None or spelled_otherwise.search(data, line.begin, begin) or spelled_otherwise.search(data, end, line.end):
        return False
    return all(data.count(key, line.begin, begin) + data.count(key, end, line.end) <= 1 for key in other_keys)


def _refuse_repeated_keys(line: _Line) -> None:
    """Raise RecordError where a key of the record stands twice: JSON parsers keep one value and drop the other without a word.

    It is read by a parser that shows all keys: only where a look at the line does not show that none does (a name in another object, mostly).
    """

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise RecordError("", f"the key {next(key for key in found if keys.count(key) > 1)!r} stands twice in one object")
        return found

    try:
        json.loads(bytes(line.view()), object_pairs_hook=check)
    except RecursionError:
        raise RecordError("", "nested too deeply to look for keys that stand twice") from None
