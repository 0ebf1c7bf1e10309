"""Config of `tpt value`."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tpt_megatron.config.load import Config, OneOrMore
from tpt_megatron.config.preprocess import Delimiters
from tpt_megatron.config.records import InputFields, OnBadRecord, part_of_work
from tpt_megatron.records import Thought

Target = Literal["continuation", "answer", "document"]


class AnswerConfig(Config):
    """Where the answer is, for target=answer; one of them.

    field      of the record, a text or a number
    delimiter  the answer is what follows the last one in the document
    pattern    the answer is what follows the last match of this regular expression in the document
    """

    field: str | None = None
    delimiter: str | None = None
    pattern: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [place for place in (self.field, self.delimiter, self.pattern) if place is not None]
        if len(given) > 1 or "" in given:
            raise ValueError("give one of field, delimiter and pattern, and not an empty one")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"answer.pattern={self.pattern!r} is not a regular expression: {error}") from None
        return self


class ValueConfig(Config):
    """How much each thought raises the likelihood of a text under a model: augmented documents in, the same with a score at each thought out.

    input         augmented documents: an output of tpt augment, record files, folders of them, or globs; local or URLs
    output        folder, local or a URL; a shard for each input file
    model         a Hugging Face folder, an iter_ folder, or a run, whose latest checkpoint it is
    target        continuation: what follows the part of the document that the thought saw; answer: see `answer`; document: all of it, the thought first
    delimiters    around a thought; those that the model was trained with
    field         of each thought, where the score goes; a thought that has it already is refused
    target_tokens of a target only so many of its first tokens count; 0: all that fit
    longest       tokens that the model is given at most; 0: as many as it has positions
    batch_tokens  that it is given at once, padding included; memory grows with this times the vocabulary
    device        auto takes the GPU where there is one; or cpu, cuda, cuda:1
    shard         3/64: do every 64th input file from the third on; whoever does the last one completes the output
    """

    input: OneOrMore
    output: str
    model: Path
    target: Target = "continuation"
    answer: AnswerConfig = AnswerConfig()
    delimiters: Delimiters = Delimiters()
    field: str = Field("value", min_length=1)
    fields: InputFields = InputFields()
    target_tokens: int = Field(0, ge=0)
    longest: int = Field(0, ge=0)
    batch_tokens: PositiveInt = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    shard: str | None = None
    on_bad_record: OnBadRecord = "set_aside"
    max_record_megabytes: float = Field(128, gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.target == "answer") != (self.answer != AnswerConfig()):
            raise ValueError("target=answer needs answer.field, answer.delimiter or answer.pattern, and no other target takes them")
        if self.field in {entry.name for entry in fields(Thought)} or "." in self.field:
            raise ValueError(f"field={self.field!r} is a thought's own or has a dot; give another name")
        self.part_of_work()
        return self

    def part_of_work(self) -> tuple[int, int]:
        """Return (number from 0, how many) of the parts that the input files are dealt to; (0, 1) without `shard`."""
        return part_of_work(self.shard)
