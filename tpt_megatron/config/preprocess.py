"""Config of `tpt preprocess`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tpt_megatron.config.augment import InputFields, OnBadRecord
from tpt_megatron.config.load import Config, OneOrMore
from tpt_megatron.tokenizer import END_OF_DOCUMENT

Arm = Literal["vanilla", "append", "prepend"]


class Delimiters(Config):
    """The text around a thought. `between` joins document and thought block."""

    open: str = "<think>"
    close: str = "</think>"
    between: str = "\n"
    inside: str = "\n"


class PreprocessConfig(Config):
    """Augmented (or plain) documents in, one token dataset an arm out.

    input                record files, folders of them, or globs
    output               folder; each arm gets `ARM/train.*` and, with a validation_fraction, `ARM/validation.*`
    tokenizer            `byte`, a tokenizer.json, or a folder that holds one
    end_of_document      the token that closes every document
    arms                 vanilla: document only; append: document, then thoughts (the paper's); prepend: thoughts first
    validation_fraction  share of the documents, chosen by the hash of their id, the same ones in every arm
    """

    input: OneOrMore
    output: Path
    tokenizer: str
    end_of_document: str = END_OF_DOCUMENT
    arms: tuple[Arm, ...] = ("vanilla", "append")
    delimiters: Delimiters = Delimiters()
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    fields: InputFields = InputFields()
    on_bad_record: OnBadRecord = "set_aside"

    @model_validator(mode="after")
    def _arms_are_distinct(self) -> Self:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms={list(self.arms)} must name at least one arm, and each once")
        return self
