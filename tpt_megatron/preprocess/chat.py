"""Chats: records of messages become texts by a template, cut where the assistant begins and ends.

The end-of-document token closes a chat as it closes a document. It is the assistant's where nothing else ends its last turn, or where it is
what ends it: then it is what a model must learn to stop at. After an end-of-turn token of the template's it is the prompt's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from tpt_megatron.datasets import PART_ASSISTANT, PART_PROMPT
from tpt_megatron.errors import ConfigError, RecordError
from tpt_megatron.preprocess.templates import CLOSE, OPEN, ChatTemplate, Message, Span
from tpt_megatron.records import AugmentedDocument, Document, FieldNames, read_document
from tpt_megatron.tokenizer import Tokenizer, TokenizerLike

_SPELLED_AS_SPECIAL = re.compile(r"<[|｜][^|｜<>\s]+[|｜]>")
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True, slots=True)
class Chat(AugmentedDocument):
    """A chat as text. document.text: its messages as JSON, by which it is known whatever the template.

    segments  (part, text) in order; tokenised each by itself, they are the sequence
    end       the part of the end-of-document token
    """

    segments: tuple[tuple[int, str], ...] = ()
    end: int = PART_PROMPT


class ChatReader:
    """Reads chats out of records. field: where a record has its messages."""

    def __init__(self, template: ChatTemplate, tokenizer: TokenizerLike, names: FieldNames, field: str) -> None:
        self._template, self._field = template, field
        self._names = FieldNames(text=field, id=names.id, source=names.source)
        self._end_of_document = tokenizer.end_of_document
        self._special = special_tokens(tokenizer)

    def read(self, record: object, where: str) -> Chat:
        """Return the chat of a parsed JSON value. RecordError where its messages are none, or the template cannot write or mark them."""
        messages = self._messages(record, where)
        assert isinstance(record, Mapping)
        try:
            canonical = orjson.dumps(messages, option=orjson.OPT_SORT_KEYS).decode()
        except TypeError as error:
            raise RecordError(where, f"field {self._field!r} is not text: {error}") from None
        if OPEN in canonical or CLOSE in canonical:
            raise RecordError(where, f"field {self._field!r} holds a code point that is no character")
        document = read_document({**record, self._field: canonical}, where, self._names)
        try:
            segments, end = self.cut(messages)
        except RecordError as error:
            raise RecordError(where, error.reason) from None
        return Chat(Document(document.id, canonical, document.source, document.extra), (), segments, end)

    def _messages(self, record: object, where: str) -> list[Message]:
        field = self._field
        if not isinstance(record, Mapping) or field not in record:
            raise RecordError(where, f"field {field!r} is missing" if isinstance(record, Mapping) else "a record must be a JSON object")
        messages = record[field]
        if not isinstance(messages, list) or not messages:
            raise RecordError(where, f"field {field!r} must be a list of messages, {'and is empty' if messages == [] else f'found {_kind(messages)}'}")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping):
                raise RecordError(where, f"message {number} must be a JSON object with role and content, found {_kind(message)}")
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    found = f"found {_kind(message[key])}" if key in message else "and is missing"
                    raise RecordError(where, f"{key!r} of message {number} must be a string, {found}")
            if any(isinstance(value, str) and self._end_of_document in value for value in message.values()):
                raise RecordError(where, f"message {number} spells {self._end_of_document!r}, which ends the document")
        if not any(message["role"] == "assistant" for message in messages):
            raise RecordError(where, "no message is the assistant's: there is nothing to learn")
        return messages

    def cut(self, messages: list[Message]) -> tuple[tuple[tuple[int, str], ...], int]:
        """Return the chat's (part, text) segments without the end-of-document token, and that token's part."""
        text, spans = self._template.mark(messages)
        if not self._template.has_blocks:
            spans = [self._turn_alone(text, span) for span in spans]
        if not any(begin < end for begin, end in spans):
            raise RecordError("", f"chat.template={self._template.name} marks nothing of it as the assistant's")
        last = max(end for begin, end in spans)
        is_ended = text[:last].rstrip().endswith(self._special)
        end_part = PART_ASSISTANT if last == len(text) and not is_ended else PART_PROMPT
        stripped = text.rstrip()
        if stripped.endswith(self._end_of_document):  # the dataset's own, which every sequence ends with, stands for it
            length = len(stripped) - len(self._end_of_document)
            end_part = PART_ASSISTANT if last >= len(stripped) else PART_PROMPT
            text, spans = text[:length], [(begin, min(end, length)) for begin, end in spans]
        segments, at = [], 0
        for begin, end in spans:
            segments += [(PART_PROMPT, text[at:begin]), (PART_ASSISTANT, text[begin:end])]
            at = end
        segments.append((PART_PROMPT, text[at:]))
        return tuple((part, segment) for part, segment in segments if segment), end_part

    def _turn_alone(self, text: str, span: Span) -> Span:
        """Return a turn without the white space that the template writes after its end-of-turn token: a reply has ended by then."""
        begin, end = span
        turn = text[begin:end].rstrip()
        return (begin, begin + len(turn)) if turn.endswith(self._special) else span


def special_tokens(tokenizer: TokenizerLike) -> tuple[str, ...]:
    """Return the spellings of a tokenizer's special tokens, the end-of-document token among them."""
    assert isinstance(tokenizer, Tokenizer)
    special = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]
    return tuple(dict.fromkeys([*special, tokenizer.end_of_document]))


def check_chat(template: ChatTemplate, tokenizer: TokenizerLike, name: str) -> None:
    """Raise ConfigError where this tokenizer cannot write what the template does, or the template cannot write the simplest chat."""
    if not isinstance(tokenizer, Tokenizer):
        raise ConfigError(f"tokenizer={name}: arms=[chat] needs a tokenizer.json; in a SentencePiece model no text stands for a special token")
    if tokenizer.encode("\nx") != tokenizer.encode("\n") + tokenizer.encode("x"):
        raise ConfigError(
            f"tokenizer={name}: it puts a space before every text, so that a turn by itself has other tokens than in its chat; "
            "arms=[chat] needs one that does not, such as a byte-level BPE"
        )
    try:
        segments, _ = ChatReader(template, tokenizer, FieldNames(), "messages").cut(list(_PROBE))
    except RecordError as error:
        raise ConfigError(f"{error.reason} (tried on one user's and one assistant's message)") from None
    text = "".join(segment for _, segment in segments)
    unknown = [token for token in dict.fromkeys(_SPELLED_AS_SPECIAL.findall(text)) if tokenizer.added_token_id(token) is None]
    if unknown:
        raise ConfigError(
            f"chat.template={template.name} writes {', '.join(unknown)}, which the tokenizer {name} has no tokens for; give a template of its own"
        )


def end_of_turn(template: ChatTemplate, tokenizer: TokenizerLike) -> int | None:
    """Return the id of the special token that ends the assistant's turns, by the simplest chat; None where no special token does."""
    assert isinstance(tokenizer, Tokenizer)
    segments, _ = ChatReader(template, tokenizer, FieldNames(), "messages").cut(list(_PROBE))
    reply = [text for part, text in segments if part == PART_ASSISTANT][-1].rstrip()
    ending = next((token for token in special_tokens(tokenizer) if reply.endswith(token)), None)
    return None if ending is None else tokenizer.added_token_id(ending)


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
