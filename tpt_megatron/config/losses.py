"""Config of `tpt losses`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.load import Config


class LossesConfig(Config):
    """The loss of every token of some documents under several models, and which tokens are hard for one of them and not for the others.

    models            by name: a Hugging Face folder, an iter_ folder, or a run, whose latest checkpoint it is
    data              a token dataset's prefix, best one that no model was trained on; every model must have been trained with its tokenizer
    reference         the model by whose loss tokens are called easy or hard, in ten groups of as many tokens
    learned_below     a token whose loss, in nats, is less is called learned
    documents         so many, evenly through the dataset; 0: all of them
    longest           of a document only so many of its first tokens are read; 0: as many as the models have positions
    show_documents    on the page, with every token coloured
    output            tokens.parquet, losses.json and losses.html go there
    """

    models: dict[str, Path] = Field(min_length=1)
    data: str
    reference: str
    output: Path
    learned_below: PositiveFloat = 1.0
    documents: int = Field(500, ge=0)
    longest: int = Field(0, ge=0)
    show_documents: PositiveInt = 12
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.reference not in self.models:
            raise ValueError(f"reference={self.reference} is none of the models {', '.join(self.models)}")
        if wrong := [name for name in self.models if not re.fullmatch(r"[\w.+ -]+", name)]:
            raise ValueError(f"models: {wrong[0]!r} cannot be a column's name; use letters, digits, spaces, _, -, + and dots")
        return self
