"""The demonstration's documents and held-out problems: seeded, closed vocabulary, words separated by white space.

Each document is a list of named values and asks for the last digit of their total, which takes one to five additions:

    Coins : Ann 3 , Bob 4 , Eve 4 . Last digit of the total ?

As on the web, a minority of the raw documents shows its work; some ask and never answer; the rest answer directly:

     5 %   ... Working : Bob 3 + 4 = 7 . Eve 7 + 4 = 1 . So the answer is 1 .
    30 %   ... and nothing more
    65 %   ... Answer : 1 .

A thought (see `augment.worked`) has one step for each addition, so its length is proportional to the difficulty by
construction: the demonstration shows that thoughts can teach, and says nothing of how long a model's own would be.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import orjson

from tpt_megatron.augment.worked import answer_of, state_problem, work_out
from tpt_megatron.errors import DataError
from tpt_megatron.files import open_atomic, parse_json_line, read_lines
from tpt_megatron.tokenizer import train_word_tokenizer

NAMES = ("Ann", "Bob", "Cas", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia", "Ned", "Oda", "Pia")
WORDS = ("Coins", "Last", "digit", "of", "the", "total", "Answer", "Working", "So", "answer", "is", ":", ",", ".", "?", "+", "=")
DELIMITERS = ("<think>", "</think>")
MAX_STEPS = 5
MAX_VALUE = 4  # forty sums to learn by heart; with all digits, a hundred, learning often set in too late to be seen
WORKED_SHARE = 0.05
UNANSWERED_SHARE = 0.30
_ATTEMPTS = 10_000


def vocabulary() -> list[str]:
    """Return every word that documents, thoughts and the default delimiters hold, each once."""
    return [*DELIMITERS, *WORDS, *(str(digit) for digit in range(10)), *NAMES]


def write_tokenizer(path: Path) -> None:
    """Write the tokenizer.json whose tokens are the vocabulary's words."""
    train_word_tokenizer((), vocabulary()).save(path)


def write_problems(path: Path, problems: int, seed: int) -> None:
    """Write held-out problems as JSONL: id, problem (up to and including the question mark), answer, steps.

    As many of each number of steps, none twice. Raises DataError when so many different problems cannot be found.
    """
    random, seen = Random(f"problems {seed}"), set[str]()
    with open_atomic(path) as file:
        for number in range(problems):
            values = _draw_new(random, 1 + number % MAX_STEPS, seen)
            problem = state_problem(values)
            seen.add(problem)
            file.write(_line({"id": f"problem-{seed}-{number:05d}", "problem": problem, "answer": str(answer_of(values)), "steps": len(values) - 1}))


def read_statements(problems: Path) -> set[str]:
    """Return the problem statements of a file that `write_problems` wrote."""
    return {parse_json_line(line, f"{problems}:{number}")["problem"] for number, line in read_lines(problems)}


def write_corpus(path: Path, documents: int, seed: int, held_out: set[str]) -> None:
    """Write raw documents as JSONL: id, text, source, steps (the number of additions); none states a problem of `held_out`.

    Equal arguments give equal bytes.
    """
    random = Random(f"corpus {seed}")
    with open_atomic(path) as file:
        for number in range(documents):
            steps = random.randint(1, MAX_STEPS)
            text = _dress(_draw_new(random, steps, held_out), random.random())
            file.write(_line({"id": f"demo-{seed}-{number:07d}", "text": text, "source": "demo", "steps": steps}))


def _draw_new(random: Random, steps: int, seen: set[str]) -> list[tuple[str, int]]:
    """Draw the values of a problem that is not among `seen`."""
    for _ in range(_ATTEMPTS):
        values = [(name, random.randint(1, MAX_VALUE)) for name in random.sample(NAMES, steps + 1)]
        if state_problem(values) not in seen:
            return values
    raise DataError(f"no new problem of {steps} additions found in {_ATTEMPTS} draws; ask for fewer problems")


def _dress(values: list[tuple[str, int]], draw: float) -> str:
    """Return the document's text; `draw` in [0, 1) chooses whether it is worked, unanswered or answered directly."""
    problem = state_problem(values)
    if draw < WORKED_SHARE:
        return f"{problem} Working : {work_out(values)}"
    if draw < WORKED_SHARE + UNANSWERED_SHARE:
        return problem
    return f"{problem} Answer : {answer_of(values)} ."


def _line(record: dict[str, object]) -> bytes:
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
