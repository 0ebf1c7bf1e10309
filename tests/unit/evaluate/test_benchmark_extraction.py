r"""Answers out of texts: what counts as one, and what does not."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.evaluate.benchmarks.extraction import boxed, formula, letter, normal_number, number, yes_or_no
from tpt_megatron.evaluate.benchmarks.scoring import are_equal, mark


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = 18.\n#### 18", "18"),
        ("So 9 * 2 = 18. The answer is 18.", "18"),
        ("The answer is: $1,234.50.", "1234.5"),
        ("the answer is -3", "-3"),
        ("The answer is -$3 a day.", "-3"),
        (r"The answer is \$7.", "7"),
        ("#### €70,000", "70000"),
        ("The answer is 5%.", "5"),
        ("The answer is 0.", "0"),
        ("The answer is -0.", "0"),
        ("The answer is 7. No: the answer is 8.", "8"),
        ("#### 7\nThe answer is 8.", "8"),
        ("It is 18.", None),
        ("The answer is eighteen.", None),
        ("The answer is 1/2.", None),
        ("The answer is 12 / 5.", None),
        ("The answer is 1.5/2.", None),
        ("The answer is 3 1/2.", None),
        ("The answer is 1,2345.", None),
        ("The answer is 12,34.", None),
        ("The answer is 18, 19 at most.", "18"),
        ("The answer is x = 5.", None),
        (r"The answer is \boxed{5}.", None),
        ("### 18", None),
        ("another answer is 18", None),
        ("", None),
    ],
)
def test_gsm8k_is_strict(text: str, answer: str | None) -> None:
    assert number(text) == answer


decimals = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3)


@given(decimals)
def test_a_number_is_read_however_it_is_written(value: Decimal) -> None:
    expected = normal_number(str(value))
    assert Decimal(expected) == value
    for written in (f"{value:,}", str(value), f"{value:f}"):
        assert number(f"So the answer is {written}.") == expected
        assert number(f"words\n#### {written}") == expected


@given(decimals, decimals)
def test_equal_numbers_and_no_others_are_spelled_alike(one: Decimal, other: Decimal) -> None:
    assert (normal_number(str(one)) == normal_number(str(other))) == (one == other)
    assert normal_number(normal_number(str(one))) == normal_number(str(one))


@pytest.mark.parametrize("text", ["", "-", "1.", ".5", "1e5", "one", "1 2", "١"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number"):
        normal_number(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} and so on}", r"\left\{ x \right."),
        (r"\boxed 7", "7"),
        (r"\fbox{7}", "7"),
        (r"The final answer is $\boxed{7}$.", "7"),
        (r"The final answer is $x^2 + 1$. Is it?", "x^2 + 1"),
        ("The final answer is 3.5. I think", "3.5"),
        (r"\boxed{1}, so the final answer is 2", "2"),
        (r"The final answer is 2, that is \boxed{3}", "3"),
        (r"\boxed{1} but then \boxed{", "1"),
        (r"The final answer is \boxed{7", None),
        (r"\boxed{}", None),
        ("the answer is 7", None),
        ("", None),
    ],
)
def test_math_takes_the_last_box_or_final_answer(text: str, answer: str | None) -> None:
    assert formula(text) == answer


nested = st.recursive(
    st.text("xy+1 ", min_size=1, max_size=4), lambda inner: st.lists(inner.map(lambda text: "{" + text + "}"), min_size=1, max_size=3).map("a".join)
)


@given(nested.filter(lambda text: text.strip() != ""), st.text("xyz \n{}", max_size=10))
def test_a_box_holds_all_up_to_its_own_brace(inside: str, after: str) -> None:
    assert boxed(f"so \\boxed{{{inside}}}{after}") == inside.strip()
    assert formula(f"so \\boxed{{{inside}}}{after}") == inside.strip()


@pytest.mark.parametrize(
    ("answer", "found", "equal"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", r"\frac{1}{2}", True),
        (r"x^2+2x+1", r"(x+1)^2", True),
        (r"(1, 2)", r"(1,2)", True),
        (r"\text{even}", r"\text{even}", True),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("7", "seven", False),
    ],
)
def test_formulas_are_equal_as_mathematics(answer: str, found: str, equal: bool) -> None:
    assert are_equal(answer, found) == equal


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("Answer: C", "C"),
        ("the answer is **D**", "D"),
        (r"\boxed{B}", "B"),
        (r"The answer is \boxed{\text{C}}.", "C"),
        (" (A) since it is", "A"),
        ("B. copper", "B"),
        (" D\n\nQuestion", "D"),
        ("The answer is A. No, the answer is C.", "C"),
        ("The answer is (E).", None),  # there are four
        ("A robe takes two bolts", None),
        ("The answer is a matter of taste", None),
        ("The answer is Copper", None),
        ("I choose B", None),
        ("answer B is wrong", None),
        ("", None),
    ],
)
def test_a_letter_is_given_as_the_answer(text: str, answer: str | None) -> None:
    assert letter(text, "ABCD") == answer


@given(st.integers(2, 26), st.integers(0, 25), st.sampled_from(["The answer is ({}).", " The answer is {}.", "Answer: {}", "({}) since", r"so \boxed{{{}}}"]))
def test_letters_of_the_problem_alone_are_answers(count: int, place: int, said: str) -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    wanted = letters[place] if place < count else None
    assert letter(said.format(letters[place]), letters[:count]) == wanted


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Yes, it does.", "yes"),
        ("no", "no"),
        ("True.", "yes"),
        ("false", "no"),
        ("Well, the answer is no.", "no"),
        ("<think>is it? no, or</think>\nYes.", "yes"),
        ("yes\n\nQuestion: and?\nAnswer: no", "yes"),
        ("There is no evidence", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_yes_or_no_is_said_as_an_answer(text: str, answer: str | None) -> None:
    assert yes_or_no(text) == answer


def test_no_answer_is_wrong() -> None:
    assert not mark("gsm8k", "no idea", {"answer": "18", "letters": ""}).is_correct
    assert mark("gsm8k", "no idea", {"answer": "18", "letters": ""}).extracted is None
    assert mark("math", r"\boxed{2/4}", {"answer": r"\frac12", "letters": ""}).is_correct
    assert mark("mmlu", "The answer is (B).", {"answer": "B", "letters": "AB"}).is_correct
    assert not mark("boolq", "no", {"answer": "yes", "letters": ""}).is_correct
