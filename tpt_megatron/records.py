"""The records that flow between stages: documents, thoughts, and documents with their thoughts.

One JSON object a line: `id`, `text`, `source`, and whatever else the record carried, which is kept. An augmented
document has `thoughts` beside these. Document and thoughts stay apart until preprocessing composes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tpt_megatron.errors import RecordError


def text_id(text: str) -> str:
    """Return the id of a document that brought none: the first 32 hex digits of its text's SHA-256 (UTF-8)."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Document:
    """One pretraining document. `extra` holds the record's other fields, untouched."""

    id: str
    text: str
    source: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Thought:
    """One thinking trajectory about one document, with what made it.

    prompt, prompt_hash   name, and the first 16 hex digits of the SHA-256, of the prompt's template
    tokens                that were generated, as the engine counted them; prompt_tokens: of the whole prompt
    sampling              settings of the request
    document_hash         first 16 hex digits of the SHA-256 of the document's text (UTF-8)
    seen_start, seen_end  characters of the document that the prompt showed: text[seen_start:seen_end]
    created               when the reply came, UTC, ISO 8601
    """

    text: str
    generator: str
    revision: str | None = None
    prompt: str | None = None
    prompt_hash: str | None = None
    sample: int | None = None
    seed: int | None = None
    sampling: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    document_hash: str | None = None
    seen_start: int | None = None
    seen_end: int | None = None
    created: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


_THOUGHT_STRINGS = ("revision", "prompt", "prompt_hash", "finish_reason", "document_hash", "created")
_THOUGHT_INTEGERS = ("sample", "seed", "tokens", "prompt_tokens", "seen_start", "seen_end")
_THOUGHT_FIELDS = tuple(entry.name for entry in fields(Thought) if entry.name != "extra")


@dataclass(frozen=True, slots=True)
class AugmentedDocument:
    """A document and its thoughts, kept apart."""

    document: Document
    thoughts: tuple[Thought, ...] = ()


@dataclass(frozen=True, slots=True)
class FieldNames:
    """Where an input record keeps a document's parts. `id` and `source` may be missing in a record; `text` may not."""

    text: str = "text"
    id: str = "id"
    source: str = "source"


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise RecordError(where, f"field {key!r} is missing")
    value = record[key]
    if not isinstance(value, str):
        raise RecordError(where, f"field {key!r} must be a string, found {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecordError(where, f"field {key!r} holds a lone surrogate, which is not text") from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _optional(record: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = record.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise RecordError(where, f"field {key!r} must be of type {kind.__name__}, found {_kind(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise RecordError(where, f"field {key!r} must be a number of 64 bits, found {value}")
    return value


def read_document(record: object, where: str, names: FieldNames = FieldNames()) -> Document:
    """Read a document out of a parsed JSON value.

    `where` is FILE:LINE, for the message. A missing `id` is made from the text. With `names` of the caller's own, another
    field that is called id, text or source is kept as `input_id`, `input_text` or `input_source`. Raises RecordError when the record is not
    an object, when its text is missing, empty or no string, or when id or source have the wrong type.
    """
    if not isinstance(record, Mapping):
        raise RecordError(where, f"a record must be a JSON object, found {_kind(record)}")
    text = _string(record, names.text, where)
    if not text or text.isspace():
        raise RecordError(where, f"field {names.text!r} is empty")
    identity = record.get(names.id)
    if identity is None:
        identity = text_id(text)
    elif isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)  # many corpora number their documents
    else:
        identity = _string(record, names.id, where)
    source = None if record.get(names.source) is None else _string(record, names.source, where)
    extra = {}
    for key, value in record.items():
        if key not in (names.text, names.id, names.source):
            kept_as = extra_name(key)
            if kept_as in extra or (kept_as != key and kept_as in record):
                raise RecordError(where, f"fields {key!r} and {kept_as!r} would both be kept as {kept_as!r}; rename one")
            extra[kept_as] = value
    return Document(identity, text, source, extra)


def extra_name(key: str) -> str:
    """Return the name under which an extra field is kept: one that our own schema uses gives way to it."""
    return f"input_{key}" if key in ("id", "text", "source") else key


def read_thought(record: object, where: str) -> Thought:
    """Read one thought out of a parsed JSON value. Raises RecordError for a missing or wrong field."""
    if not isinstance(record, Mapping):
        raise RecordError(where, f"a thought must be a JSON object, found {_kind(record)}")
    return Thought(
        text=_string(record, "text", where),
        generator=_string(record, "generator", where),
        sampling=_optional(record, "sampling", dict, where),
        extra={key: value for key, value in record.items() if key not in _THOUGHT_FIELDS},
        **{key: _optional(record, key, str, where) for key in _THOUGHT_STRINGS},
        **{key: _optional(record, key, int, where) for key in _THOUGHT_INTEGERS},
    )


def read_augmented(record: object, where: str, names: FieldNames = FieldNames()) -> AugmentedDocument:
    """Read an augmented document; a record without `thoughts` has none. Raises RecordError as `read_document` does."""
    document = read_document(record, where, names)
    thoughts = document.extra.get("thoughts")
    if thoughts is None:
        return AugmentedDocument(document)
    if not isinstance(thoughts, list):
        raise RecordError(where, f"field 'thoughts' must be a list, found {_kind(thoughts)}")
    extra = {key: value for key, value in document.extra.items() if key != "thoughts"}
    bare = Document(document.id, document.text, document.source, extra)
    return AugmentedDocument(bare, tuple(read_thought(thought, where) for thought in thoughts))


def check_thoughts(augmented: AugmentedDocument, where: str, length: int, sha256: str | None = None) -> None:
    """Raise RecordError for a thought that is not about this document: by what it saw, or by the hash of the text.

    length  characters of the text; sha256: in hex, of the text, at least 16 digits; where it is None and needed it is computed.
    """
    for number, thought in enumerate(augmented.thoughts, 1):
        if thought.seen_end is not None and not 0 <= thought.seen_end <= length:
            raise RecordError(where, f"thought {number} saw characters up to {thought.seen_end}, the document has {length}")
        if thought.document_hash is not None:
            sha256 = sha256 or text_id(augmented.document.text)
            if not sha256.startswith(thought.document_hash):
                raise RecordError(where, f"thought {number} is about another text (document_hash {thought.document_hash})")


def augmented_to_record(augmented: AugmentedDocument) -> dict[str, Any]:
    """Return the JSON object for one augmented document; fields that are None are left out."""
    document = augmented.document
    record: dict[str, Any] = {"id": document.id, "text": document.text}
    if document.source is not None:
        record["source"] = document.source
    record.update(document.extra)
    record["thoughts"] = [thought_to_record(thought) for thought in augmented.thoughts]
    return record


def thought_to_record(thought: Thought) -> dict[str, Any]:
    """Return the JSON object for one thought; fields that are None are left out."""
    values = {name: getattr(thought, name) for name in _THOUGHT_FIELDS}
    return {key: value for key, value in values.items() if value is not None} | dict(thought.extra)
