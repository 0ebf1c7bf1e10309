"""Asking and marking, as pure functions of text: templates, answer extraction, exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tpt_megatron.errors import RecordError
from tpt_megatron.evaluate.problems import Problem

_FIELD = re.compile(r"\{(\w+)\}")


def fill_template(template: str, problem: Problem) -> str:
    r"""Put the problem's fields where the template names them in braces; other braces, as in `\boxed{`, stay.

    Raises RecordError when the problem lacks a field.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in problem.fields:
            raise RecordError(problem.where, f"no field {name!r}, which the prompt {template!r} asks for; it has {', '.join(problem.fields)}")
        return str(problem.fields[name])

    return _FIELD.sub(value, template)


def extract_answer(pattern: str, continuation: str) -> str | None:
    """Return the first group of the pattern's last match, without white space around it; None when nothing matches."""
    matches = list(re.finditer(pattern, continuation))
    answer = matches[-1].group(1) if matches else None
    return answer.strip() if answer is not None else None


@dataclass(frozen=True)
class Sample:
    """One problem asked once. `new_tokens` counts the tokens before the end of the document."""

    id: str
    task: str
    prompt: str
    continuation: str
    extracted: str | None
    answer: str
    correct: bool
    new_tokens: int

    def as_record(self) -> dict[str, Any]:
        """Return the sample as one JSON record."""
        return asdict(self)


def mark(problem: Problem, task: str, pattern: str, prompt: str, continuation: str, new_tokens: int) -> Sample:
    """Extract the answer and compare it with the right one: exactly, as text. A failed extraction is wrong."""
    extracted = extract_answer(pattern, continuation)
    return Sample(problem.id, task, prompt, continuation, extracted, problem.answer, extracted == problem.answer, new_tokens)


def summarise(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return one task's result: accuracy over all problems, and the counts behind it."""
    correct = sum(sample.correct for sample in samples)
    return {
        "accuracy": correct / len(samples),
        "correct": correct,
        "failed_extractions": sum(sample.extracted is None for sample in samples),
        "mean_new_tokens": sum(sample.new_tokens for sample in samples) / len(samples),
    }
