"""Config of `tpt evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from tpt_megatron.config.load import Config


class TaskConfig(Config):
    """One way of asking each problem.

    prompt          template over the problem's fields, for example "{problem} <think>"
    answer_pattern  regular expression whose last match's first group in the continuation is the answer; a failed
                    extraction counts as wrong
    """

    prompt: str
    answer_pattern: str
    max_new_tokens: PositiveInt = 128

    @field_validator("answer_pattern")
    @classmethod
    def _one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if groups < 1:
            raise ValueError(f"{pattern!r} has no group; put parentheses around the answer")
        return pattern


class EvaluateConfig(Config):
    """Score one exported model, or every checkpoint of a run, on held-out problems.

    model         a Hugging Face model folder
    run_dir       a training run: every checkpoint in it is exported and scored (give this or model)
    problems      JSONL; each record has the prompt's fields and `answer_field`
    output        results as one JSON a checkpoint; default: RUN_DIR/evaluation, or MODEL/evaluation
    limit         only the first so many problems; 0 means all
    """

    model: Path | None = None
    run_dir: Path | None = None
    problems: Path
    answer_field: str = "answer"
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    output: Path | None = None
    batch_size: PositiveInt = 32
    limit: int = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16"] = "float32"

    @model_validator(mode="after")
    def _one_subject(self) -> Self:
        if (self.model is None) == (self.run_dir is None):
            raise ValueError("give exactly one of model and run_dir")
        return self
