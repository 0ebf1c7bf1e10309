from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.augment.worked import answer_of, parse_problem, state_problem, work_out, work_out_text

PROBLEM = "Coins : Ann 3 , Bob 5 , Eve 8 . Last digit of the total ?"
WORK = "Bob 3 + 5 = 8 . Eve 8 + 8 = 6 . So the answer is 6 ."
names = st.sampled_from(["Ann", "Bob", "Eve", "Kim", "Leo", "Mia"])


@pytest.mark.parametrize("tail", ["", "\n", " Answer : 6 .", f" Working : {WORK}"])
def test_every_kind_of_document_gets_the_same_worked_thought(tail: str) -> None:
    assert work_out_text(PROBLEM + tail) == WORK


@pytest.mark.parametrize("text", ["", "Hello .", PROBLEM[:-2], f"{PROBLEM} And then ?", f"So {PROBLEM}", PROBLEM.replace("3", "33"), "Coins : Ann 3 . "])
def test_other_text_is_no_problem(text: str) -> None:
    assert work_out_text(text) is None


@given(st.lists(st.tuples(names, st.integers(0, 9)), min_size=2, max_size=6))
def test_the_work_has_a_true_step_for_each_addition_and_ends_in_the_answer(values: list[tuple[str, int]]) -> None:
    assert parse_problem(state_problem(values)) == values
    *steps, last = work_out(values).removesuffix(" .").split(" . ")
    assert last == f"So the answer is {sum(value for _, value in values) % 10}" == f"So the answer is {answer_of(values)}"
    assert len(steps) == len(values) - 1
    for step in steps:
        _, left, plus, right, equals, result = step.split()
        assert (plus, equals) == ("+", "=")
        assert (int(left) + int(right)) % 10 == int(result)
