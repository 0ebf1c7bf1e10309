"""Marking: which answer a text gives, and whether it is the right one. `process_results` of the packaged task files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpt_megatron.evaluate.benchmarks.extraction import formula, letter, number, yes_or_no


@dataclass(frozen=True)
class Mark:
    """The answer that was found, None where extraction failed, which is wrong."""

    extracted: str | None
    is_correct: bool


def mark(benchmark: str, text: str, problem: Mapping[str, Any]) -> Mark:
    """Mark what was written for a problem of one of the packaged benchmarks, as `data.py` prepares it."""
    answer = str(problem["answer"])
    match benchmark:
        case "gsm8k":
            found = number(text)
        case "math":
            found = formula(text)
            return Mark(found, found is not None and are_equal(answer, found))
        case "boolq":
            found = yes_or_no(text)
        case _:
            found = letter(text, problem["letters"])
    return Mark(found, found == answer)


def are_equal(answer: str, found: str) -> bool:
    """Say whether two formulas are the same mathematically, as math-verify sees it; what it cannot parse is compared as text.

    For the main thread: math-verify limits its time by an alarm.
    """
    if "".join(answer.split()) == "".join(found.split()):
        return True
    from math_verify import parse, verify

    return bool(verify(parse(f"${answer}$"), parse(f"${found}$")))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return lm-eval's metrics of one problem."""
    found = mark(doc["benchmark"], results[0], doc)
    return {"accuracy": float(found.is_correct), "failed_extraction": float(found.extracted is None)}
