"""Problems of the packaged benchmarks out of local files, each with the examples that are shown before it. The task files' `custom_dataset`.

Records are as the data sets have them:

    gsm8k     question, answer (worked, then `#### 18`)
    math      problem, solution (with a last box around its answer), answer where there is one
    mmlu      question, choices (2 to 26), answer (a number from 0, or a letter), subject
    mmlu_pro  question, options, answer (a letter) or answer_index, category, cot_content where there is one
    boolq     passage, question, answer (true or false) or label (1 or 0)

Other fields are left alone; `id` or `question_id` is kept, and a record without has its place in the data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.evaluate.benchmarks.extraction import boxed, letter, normal_number
from tpt_megatron.record_files import expand_inputs, read_rows

Problem = dict[str, Any]


def load(*, benchmark: str, data: str, num_shots: int, shots: str | None = None, **_: Any) -> dict[str, Any]:
    """Return what lm-eval takes for a data set: the split `test`. The arguments are a task file's metadata."""
    import datasets

    return {"test": datasets.Dataset.from_list(read_problems(benchmark, Path(data), None if shots is None else Path(shots), num_shots))}


def load_splits(*, files: Mapping[str, Path], **_: Any) -> dict[str, Any]:
    """Return the splits of a task of lm-eval's own out of local files, whose records are as that task expects them."""
    import datasets

    return {split: datasets.Dataset.from_list([record for _, record in _records(path)]) for split, path in files.items()}


def read_problems(benchmark: str, data: Path, shots: Path | None, num_shots: int) -> list[Problem]:
    """Return the problems to ask, in the order of `data`, each with `num_shots` examples as `shots`: those that stand first, of the same subject.

    An example that asks the very same as the problem would show its answer: the next one takes its place.
    Without a place for examples the first problems of `data` (of each subject) are these, and are not asked. RecordError for a record that cannot
    be used, with its file and line; DataError for files that are missing or damaged, or have too few.
    """
    problems = _prepared(benchmark, data)
    if shots is None or shots.resolve() == data.resolve():
        examples, place = _by_group(problems), data
        shown = {id(example) for of_group in examples.values() for example in of_group[:num_shots]}
        problems = [problem for problem in problems if id(problem) not in shown]
        if not problems:
            raise DataError(f"{data}: no problem is left to ask, since the first {num_shots} are the examples; give other examples as shots")
    else:
        examples, place = _by_group(_prepared(benchmark, shots)), shots
    for problem in problems:
        # Where examples have no subject they are for all.
        others = (example for example in examples.get(problem["group"], examples.get("", [])) if not _asks_the_same(example, problem))
        of_group = list(islice(others, num_shots))
        if len(of_group) < num_shots:
            subject = f" of {problem['group']!r}" if problem["group"] else ""
            found = f"has {len(of_group)} examples{subject} that are not problem {problem['id']} itself"
            raise DataError(f"{place}: {found}, and {num_shots} are to be shown; give more as shots, or a lower num_shots")
        problem["shots"] = [{key: value for key, value in example.items() if key != "shots"} for example in of_group]
    return problems


def _prepared(benchmark: str, place: Path) -> list[Problem]:
    prepare = _PREPARE[benchmark]
    problems: list[Problem] = []
    for where, record in _records(place):
        name = next((record[key] for key in ("id", "question_id") if record.get(key) is not None), len(problems) + 1)
        about = {"benchmark": benchmark, "id": str(name), "group": "", "reasoning": "", "letters": ""}
        problems.append(about | prepare(record, where))
    return problems


def _records(place: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (FILE:LINE, record) of every record of a file, or of a folder's files in the order of their names."""
    found = []
    for file in expand_inputs((str(place),)):
        for row in read_rows(file):
            if row.is_blank:
                continue
            record = row.parse()
            if not isinstance(record, dict):
                raise RecordError(row.where, f"a problem is a JSON object, found a {type(record).__name__}")
            found.append((row.where, record))
    if not found:
        raise DataError(f"{place}: holds no problem")
    return found


def _by_group(problems: list[Problem]) -> dict[str, list[Problem]]:
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem["group"], []).append(problem)
    return groups


def _asks_the_same(one: Problem, other: Problem) -> bool:
    return all(one.get(part) == other.get(part) for part in ("question", "options", "passage"))


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        found = f"is {value!r}, which is no text" if field in record else f"is missing; it has {', '.join(record)}"
        raise RecordError(where, f"the field {field!r} {found}")
    return value.strip()


def _gsm8k(record: Mapping[str, Any], where: str) -> Problem:
    worked, mark, answer = _text(record, "answer", where).rpartition("####")
    try:
        if not mark:
            raise ValueError("there is no ####")
        right = normal_number(answer.strip().lstrip("$"))
    except ValueError as error:
        raise RecordError(where, f"the field 'answer' does not end in #### and a number ({error})") from None
    # <<48/2=24>> is for a calculator, which nobody has here.
    return {"question": _text(record, "question", where), "reasoning": re.sub(r"<<[^>]*>>", "", worked).strip(), "answer": right}


def _math(record: Mapping[str, Any], where: str) -> Problem:
    solution = _text(record, "solution", where) if "solution" in record or "answer" not in record else ""
    answer = _text(record, "answer", where) if isinstance(record.get("answer"), str) else boxed(solution)
    if answer is None:
        raise RecordError(where, "the field 'solution' has no \\boxed{} around its answer, and there is no field 'answer'")
    return {"question": _text(record, "problem", where), "reasoning": solution, "answer": answer}


def _mmlu(record: Mapping[str, Any], where: str) -> Problem:
    subject = record.get("subject")
    return _choice(record, where, "choices", record.get("answer")) | {"group": subject if isinstance(subject, str) else ""}


def _mmlu_pro(record: Mapping[str, Any], where: str) -> Problem:
    found = _choice(record, where, "options", record["answer"] if "answer" in record else record.get("answer_index"))
    category, thought = record.get("category"), record.get("cot_content")
    reasoning = re.sub(r"^A:\s*", "", thought.strip()) if isinstance(thought, str) else ""
    if reasoning and letter(reasoning, found["letters"]) == found["answer"]:  # the sentence that says so is the prompt's
        reasoning = re.sub(r"\s*(?:So |Thus,? |Therefore,? )?the answer is \(?[A-Z]\)?\.?\s*$", "", reasoning, flags=re.IGNORECASE)
    return found | {"group": category if isinstance(category, str) else "", "reasoning": reasoning}


def _choice(record: Mapping[str, Any], where: str, field: str, answer: Any) -> Problem:
    options = record.get(field)
    if not isinstance(options, list) or not 2 <= len(options) <= len(ascii_uppercase) or not all(isinstance(option, str) for option in options):
        raise RecordError(where, f"the field {field!r} is no list of 2 to {len(ascii_uppercase)} texts")
    letters = ascii_uppercase[: len(options)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        answer = letters[answer]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise RecordError(where, f"the answer {answer!r} is none of {letters}, nor a number below {len(options)}")
    return {"question": _text(record, "question", where), "options": [option.strip() for option in options], "letters": letters, "answer": answer}


def _boolq(record: Mapping[str, Any], where: str) -> Problem:
    answer = record.get("answer", record.get("label"))
    if not isinstance(answer, bool | int) or answer not in (0, 1):
        raise RecordError(where, f"the answer {answer!r} is neither true nor false (a field 'answer'), nor 1 or 0 (a field 'label')")
    return {"question": _text(record, "question", where), "passage": _text(record, "passage", where), "answer": "yes" if answer else "no"}


_PREPARE: dict[str, Callable[[Mapping[str, Any], str], Problem]] = {"gsm8k": _gsm8k, "math": _math, "mmlu": _mmlu, "mmlu_pro": _mmlu_pro, "boolq": _boolq}
