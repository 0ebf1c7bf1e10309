"""What thinks about a document. A generator sees one document and returns its thoughts."""

from __future__ import annotations

from typing import Protocol

from tpt_megatron.augment.worked import WorkedThoughts
from tpt_megatron.config.augment import FieldGenerator, WorkedGenerator
from tpt_megatron.errors import RecordError
from tpt_megatron.records import Document, Thought, extra_name


class Generator(Protocol):
    """Makes thoughts. Equal documents get equal thoughts, so that a run that was cut off goes on as if it had not been."""

    def think(self, document: Document, where: str) -> tuple[Thought, ...]:
        """Return the thoughts about a document that was read at `where` (FILE:LINE); RecordError when it has none."""
        ...


class FieldThoughts:
    """The generator `field`: the thought that the record brought along, in a field that stays where it is."""

    def __init__(self, field: str) -> None:
        self._field = field

    def think(self, document: Document, where: str) -> tuple[Thought, ...]:
        """Return the field's text as the one thought; RecordError when it is missing, empty or no string."""
        kept_as = extra_name(self._field)
        if kept_as not in document.extra:
            raise RecordError(where, f"field {self._field!r} is missing, and generator.field names it")
        text = document.extra[kept_as]
        if not isinstance(text, str):
            raise RecordError(where, f"field {self._field!r} must be a string, found {'null' if text is None else type(text).__name__}")
        if not text.strip():
            raise RecordError(where, f"field {self._field!r} is empty")
        return (Thought(text=text, generator=f"field:{self._field}"),)


def make_generator(config: FieldGenerator | WorkedGenerator) -> Generator:
    """Return the generator that the config names."""
    match config:
        case FieldGenerator(field=field):
            return FieldThoughts(field)
        case WorkedGenerator():
            return WorkedThoughts()
