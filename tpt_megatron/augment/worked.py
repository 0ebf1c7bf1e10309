"""Worked solutions of the demonstration's problems, computed from their text.

A problem is a list of named values, and asks for the last digit of their total:

    Coins : Ann 3 , Bob 5 , Eve 8 . Last digit of the total ?

Its text may go on with a direct answer (`Answer : 6 .`) or with the work (`Working : Bob 3 + 5 = 8 . ...`), or end there.
"""

from __future__ import annotations

import re

_PROBLEM = re.compile(r"Coins : ([A-Z][a-z]+ [0-9](?: , [A-Z][a-z]+ [0-9])+) \. Last digit of the total \?(?= (?:Answer|Working) : |\s*$)")


def state_problem(values: list[tuple[str, int]]) -> str:
    """Return the statement of a problem, up to and including its question mark."""
    return f"Coins : {' , '.join(f'{name} {value}' for name, value in values)} . Last digit of the total ?"


def parse_problem(text: str) -> list[tuple[str, int]] | None:
    """Return the named values of the problem that `text` begins with; None where it begins with none."""
    match = _PROBLEM.match(text)
    if match is None:
        return None
    items = (item.split() for item in match.group(1).split(" , "))
    return [(name, int(value)) for name, value in items]


def answer_of(values: list[tuple[str, int]]) -> int:
    """Return the last digit of the total."""
    return sum(value for _, value in values) % 10


def work_out(values: list[tuple[str, int]]) -> str:
    """Return the solution as one would say it: a step for each value after the first, then the answer."""
    total = values[0][1]
    steps = []
    for name, value in values[1:]:
        steps.append(f"{name} {total} + {value} = {(total + value) % 10} .")
        total = (total + value) % 10
    return " ".join([*steps, f"So the answer is {total} ."])


def work_out_text(text: str) -> str | None:
    """Return the worked solution of the problem that a document's text begins with; None where it begins with none."""
    values = parse_problem(text)
    return None if values is None else work_out(values)
