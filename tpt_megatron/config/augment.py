"""Config of `tpt augment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tpt_megatron.config.load import Config, OneOrMore
from tpt_megatron.records import FieldNames

OnBadRecord = Literal["set_aside", "fail"]


class InputFields(Config):
    """Names of the fields of an input record. A record without `id` gets one made from its text."""

    text: str = "text"
    id: str = "id"
    source: str = "source"

    def names(self) -> FieldNames:
        """Return the names as records take them."""
        return FieldNames(self.text, self.id, self.source)


class FieldGenerator(Config):
    """Thoughts that the records already carry, in `field`."""

    kind: Literal["field"]
    field: str


class WorkedGenerator(Config):
    """Worked solutions of the demonstration's problems, computed from their text."""

    kind: Literal["worked"]


class AugmentConfig(Config):
    """Documents in, documents with thoughts out.

    input          record files (.jsonl, .jsonl.gz, .jsonl.zst), folders of them, or globs
    output         folder for one shard of augmented documents an input file, and `manifest.json`
    on_bad_record  set_aside: write it to the output's `bad/`, count it, go on; fail: stop at the first
    """

    input: OneOrMore
    output: Path
    generator: Annotated[FieldGenerator | WorkedGenerator, Field(discriminator="kind")]
    fields: InputFields = InputFields()
    on_bad_record: OnBadRecord = "set_aside"

    @model_validator(mode="after")
    def _thoughts_are_not_the_document(self) -> Self:
        if isinstance(self.generator, FieldGenerator) and self.generator.field in (self.fields.text, self.fields.id, self.fields.source):
            raise ValueError(
                f"generator.field={self.generator.field!r} is already the document's own text, id or source; name the field that holds the thought"
            )
        return self
