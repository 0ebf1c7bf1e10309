from __future__ import annotations

from pathlib import Path

import pytest

from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.evaluate.problems import Problem, read_problems
from tpt_megatron.evaluate.score import extract_answer, fill_template, mark, summarise

PROBLEM = Problem("p1", "problems.jsonl:3", {"problem": "2 + 3", "answer": 5}, "5")


def test_template_takes_fields_and_leaves_other_braces() -> None:
    assert fill_template(r"{problem} = \boxed{} {x y} {answer}", PROBLEM) == r"2 + 3 = \boxed{} {x y} 5"


def test_template_field_that_a_problem_lacks_is_named_with_its_line() -> None:
    with pytest.raises(RecordError, match=r"problems\.jsonl:3: no field 'question'.*problem, answer"):
        fill_template("{question}", PROBLEM)


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (r"answer: (\d+)", "answer: 4 no, answer: 17", "17"),
        (r"answer:(.*)", "answer:  a b \nmore", "a b"),
        (r"answer: (\d+)", "no idea", None),
        (r"x(y)?", "xy x", None),
    ],
)
def test_last_match_is_the_answer(pattern: str, text: str, answer: str | None) -> None:
    assert extract_answer(pattern, text) == answer


def test_marks_are_exact_and_failed_extractions_are_wrong() -> None:
    samples = [mark(PROBLEM, "t", r"= (\S+)", "p", text, tokens) for text, tokens in (("= 5", 2), ("= 5.0", 4), ("nothing", 9))]
    assert [sample.correct for sample in samples] == [True, False, False]
    assert summarise(samples) == {"accuracy": 1 / 3, "correct": 1, "failed_extractions": 1, "mean_new_tokens": 5.0}


def test_problems_are_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "answer": 7}\n\n{"answer": " x "}\nnot json\n')
    assert [(p.id, p.where, p.answer) for p in read_problems(path, "answer", limit=2)] == [("a", f"{path}:1", "7"), ("3", f"{path}:3", "x")]
    with pytest.raises(RecordError, match=r"p\.jsonl:4: not valid JSON"):
        read_problems(path, "answer")


@pytest.mark.parametrize(
    ("line", "says"),
    [('{"a": 1}', "'answer' is missing"), ('{"answer": null}', "is None"), ('{"answer": true}', "is True"), ("[1]", "found a list")],
)
def test_unusable_problem_is_refused_with_its_line(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(RecordError) as error:
        read_problems(path, "answer")
    assert f"{path}:1" in str(error.value)
    assert says in str(error.value)


def test_no_problem_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no problem"):
        read_problems(tmp_path / "p.jsonl", "answer")
    with pytest.raises(DataError, match="no such file"):
        read_problems(tmp_path / "q.jsonl", "answer")
