"""Prompts of the packaged benchmarks, word for word as lm-eval asks them, out of local files; and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("lm_eval")

from tpt_megatron.config.evaluate import EvaluateConfig
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.evaluate.benchmarks.data import read_problems
from tpt_megatron.evaluate.benchmarks.harness import Benchmark, prepare


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prompts(name: str, **keys: Any) -> list[str]:
    """Return what lm-eval asks the model."""
    config = EvaluateConfig.model_validate({"model": "unused", "benchmarks": [{"name": name, **{key: str(value) for key, value in keys.items()}}]})
    (benchmark,) = prepare(config)
    task = benchmark.loaded["tasks"][name]
    task.build_all_requests()
    return [instance.args[0] for instance in task.instances]


def sum_of(a: int, b: int) -> dict[str, Any]:
    return {"question": f"What is {a} and {b}?", "answer": f"It is {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b:,}"}


def test_gsm8k_is_asked_with_five_examples_and_their_reasoning(tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", sum_of(1, 1), sum_of(999, 1))
    shots = write(tmp_path / "train.jsonl", *(sum_of(i, 2000) for i in range(7)))
    shown = "".join(f"Question: What is {i} and 2000?\nAnswer: It is {i}+2000={i + 2000}.\nThe answer is {i + 2000}.\n\n" for i in range(5))
    asked = prompts("gsm8k", data=data, shots=shots)
    assert asked == [f"{shown}Question: What is {a} and 1?\nAnswer:" for a in (1, 999)]
    assert [problem["answer"] for problem in read_problems("gsm8k", data, shots, 5)] == ["2", "1000"]
    assert prompts("gsm8k", data=data, num_shots=0)[0] == "Question: What is 1 and 1?\nAnswer:"


def test_the_first_problems_are_the_examples_where_there_are_no_others_and_are_not_asked(tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", *(sum_of(i, i) for i in range(7)))
    asked = prompts("gsm8k", data=data)
    assert [prompt.rpartition("Question: ")[2] for prompt in asked] == [f"What is {i} and {i}?\nAnswer:" for i in (5, 6)]
    assert all(prompt.count("What is 4 and 4?") == 1 and prompt.count("Question") == 6 for prompt in asked)
    assert prompts("gsm8k", data=data, shots=data) == asked
    assert [problem["id"] for problem in read_problems("gsm8k", data, None, 5)] == ["6", "7"], "a problem is named by its place"


def test_no_example_asks_what_the_problem_asks(tmp_path: Path) -> None:
    data = write(tmp_path / "all/test.jsonl", *(sum_of(i, 1) for i in range(3)))
    write(tmp_path / "all/train.jsonl", sum_of(8, 8))
    for prompt in prompts("gsm8k", data=data, shots=tmp_path / "all", num_shots=2):
        shown, _, question = prompt.rpartition("Question: ")
        assert shown.count("Question: ") == 2
        assert question.partition("\n")[0] not in shown
    twice = write(tmp_path / "twice.jsonl", *(sum_of(i, 1) for i in (0, 1, 0, 2)))
    asked = read_problems("gsm8k", twice, None, 1)
    assert [(problem["id"], problem["shots"][0]["id"]) for problem in asked] == [("2", "1"), ("3", "2"), ("4", "1")]
    with pytest.raises(DataError, match=r"test\.jsonl: has 1 examples that are not problem 1 itself, and 2 are to be shown"):
        read_problems("gsm8k", data, write(tmp_path / "few/test.jsonl", sum_of(0, 1), sum_of(5, 1)), 2)


def test_math_is_asked_with_four_solutions(tmp_path: Path) -> None:
    problems = [{"problem": f"Halve {2 * i}.", "solution": f"Since $2 \\cdot {i}$: $\\boxed{{{i}}}$.", "level": "1"} for i in range(6)]
    data, shots = write(tmp_path / "test.jsonl", *problems[4:]), write(tmp_path / "train.jsonl", *problems[:4])
    shown = "".join(f"Problem: Halve {2 * i}.\nSolution: Since $2 \\cdot {i}$: $\\boxed{{{i}}}$.\nThe final answer is ${i}$.\n\n" for i in range(4))
    assert prompts("math", data=data, shots=shots) == [f"{shown}Problem: Halve {2 * i}.\nSolution:" for i in (4, 5)]
    assert [problem["answer"] for problem in read_problems("math", data, shots, 4)] == ["4", "5"]


def choice(subject: str, number: int, **others: Any) -> dict[str, Any]:
    return {"subject": subject, "question": f"{subject} {number}?", "choices": ["north", "east", "south", "west"], "answer": number % 4, **others}


LISTED = "A. north\nB. east\nC. south\nD. west\n"


def test_mmlu_shows_two_examples_of_the_same_subject(tmp_path: Path) -> None:
    write(tmp_path / "test/b.jsonl", choice("law", 5))
    pq.write_table(pa.Table.from_pylist([choice("art", 6)]), tmp_path / "test/a.parquet")
    shots = write(tmp_path / "dev.jsonl", *(choice(subject, i) for i in range(3) for subject in ("law", "art")))
    expected = [
        f"Question: {subject} 0?\n{LISTED}Answer: The answer is (A).\n\nQuestion: {subject} 1?\n{LISTED}Answer: The answer is (B).\n\n"
        f"Question: {subject} {i}?\n{LISTED}Answer:"
        for subject, i in (("art", 6), ("law", 5))
    ]
    assert prompts("mmlu", data=tmp_path / "test", shots=shots) == expected
    assert [problem["answer"] for problem in read_problems("mmlu", tmp_path / "test", shots, 2)] == ["C", "B"]


def test_mmlu_pro_shows_reasoning_once_where_there_is_any(tmp_path: Path) -> None:
    rows = [
        {"question": f"{i}?", "options": ["one", "two", "three"], "answer": "ABC"[i], "answer_index": i, "category": "maths", "cot_content": thought}
        for i, thought in enumerate(["A: Let's think step by step. One it is. The answer is (A).", "", "A: unused"])
    ]
    listed = "A. one\nB. two\nC. three\n"
    expected = (
        f"Question: 0?\n{listed}Answer: Let's think step by step. One it is. The answer is (A).\n\n"
        f"Question: 1?\n{listed}Answer: The answer is (B).\n\nQuestion: 2?\n{listed}Answer:"
    )
    assert prompts("mmlu_pro", data=write(tmp_path / "test.jsonl", rows[2]), shots=write(tmp_path / "val.jsonl", *rows[:2])) == [expected]


def test_boolq_is_asked_without_examples(tmp_path: Path) -> None:
    data = write(
        tmp_path / "val.jsonl",
        {"passage": "Snow is white.", "question": "is snow white", "answer": True},
        {"passage": "Snow is white.", "question": "is snow red?", "label": 0},
    )
    assert prompts("boolq", data=data) == [f"Snow is white.\nQuestion: is snow {colour}?\nAnswer with yes or no.\nAnswer:" for colour in ("white", "red")]
    assert [problem["answer"] for problem in read_problems("boolq", data, None, 0)] == ["yes", "no"]


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("gsm8k", {"question": "q"}, "the field 'answer' is missing; it has question"),
        ("gsm8k", {"question": "q", "answer": "18"}, "does not end in #### and a number"),
        ("gsm8k", {"question": "q", "answer": "#### x"}, "does not end in #### and a number"),
        ("gsm8k", {"question": 7, "answer": "#### 7"}, "the field 'question' is 7, which is no text"),
        ("math", {"problem": "p", "solution": "seven"}, "has no \\boxed{}"),
        ("mmlu", {"question": "q", "choices": ["a"], "answer": 0}, "the field 'choices' is no list of 2 to 26 texts"),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": 2}, "the answer 2 is none of AB"),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": True}, "the answer True is none of AB"),
        ("mmlu_pro", {"question": "q", "options": ["a", "b"], "answer": "C"}, "the answer 'C' is none of AB"),
        ("boolq", {"question": "q", "passage": "p", "answer": "yes"}, "is neither true nor false"),
    ],
)
def test_a_record_that_cannot_be_used_is_told_with_its_line(tmp_path: Path, name: str, record: dict[str, Any], says: str) -> None:
    good = {"question": "q", "answer": "#### 1", "problem": "p", "solution": "\\boxed{1}", "choices": ["a", "b"], "options": ["a", "b"], "passage": "p"}
    first = {**good, "answer": {"gsm8k": "#### 1", "math": None, "boolq": True}.get(name, "A")}
    data = write(tmp_path / "p.jsonl", first, record)
    with pytest.raises(RecordError, match=r"p\.jsonl:2: ") as error:
        read_problems(name, data, None, 0)
    assert says in str(error.value)


def test_too_few_examples_are_told(tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", choice("law", 1), choice("art", 1))
    shots = write(tmp_path / "dev.jsonl", choice("law", 2), choice("law", 3), choice("art", 2))
    with pytest.raises(DataError, match=r"dev\.jsonl: has 1 examples of 'art' that are not problem 2 itself, and 2 are to be shown"):
        read_problems("mmlu", data, shots, 2)
    with pytest.raises(DataError, match="no problem is left to ask"):
        read_problems("mmlu", data, None, 2)
    with pytest.raises(DataError, match="no input file matches"):
        read_problems("mmlu", tmp_path / "nowhere", None, 2)


def test_settings_change_with_what_is_asked(tmp_path: Path) -> None:
    def settings(*records: dict[str, Any], **keys: Any) -> Any:
        data = str(write(tmp_path / "test.jsonl", *records))
        config = EvaluateConfig.model_validate({"model": "unused", "benchmarks": [{"name": "boolq", "data": data, **keys}]})
        benchmark: Benchmark = prepare(config)[0]
        return benchmark.settings

    record = {"passage": "p", "question": "q", "answer": True}
    first = settings(record)
    assert settings(record) == first
    others = [settings({**record, "question": "r"}), settings(record, record), settings(record, limit=1), settings(record, max_new_tokens=5)]
    assert all(other != first for other in others)
