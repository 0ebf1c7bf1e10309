"""Problems with an answer: one JSON object a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.files import parse_json_line, read_lines


@dataclass(frozen=True)
class Problem:
    """One problem. `where` is `FILE:LINE`, `fields` all that the record holds, `answer` the right answer as text."""

    id: str
    where: str
    fields: dict[str, Any]
    answer: str


def read_problems(path: Path, answer_field: str, limit: int = 0) -> list[Problem]:
    """Read the first `limit` problems of a JSONL file (plain, .gz or .zst); 0 means all. Empty lines are skipped.

    A problem without `id` gets its line number. Raises RecordError with file and line for a record that cannot be used, DataError
    for a file that is missing or holds no problem.
    """
    problems: list[Problem] = []
    for number, line in read_lines(path):
        if limit and len(problems) == limit:
            break
        if not line.strip():
            continue
        where = f"{path}:{number}"
        fields = parse_json_line(line, where)
        if not isinstance(fields, dict):
            raise RecordError(where, f"a problem is a JSON object, found a {type(fields).__name__}")
        answer = fields.get(answer_field)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            found = "is missing" if answer_field not in fields else f"is {answer!r}, which is neither text nor a number"
            raise RecordError(where, f"the answer field {answer_field!r} {found}; set answer_field to one of {', '.join(fields)}")
        problems.append(Problem(id=str(fields.get("id", number)), where=where, fields=fields, answer=str(answer).strip()))
    if not problems:
        raise DataError(f"{path}: holds no problem")
    return problems
