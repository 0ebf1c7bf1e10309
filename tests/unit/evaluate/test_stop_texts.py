"""Thoughts in texts, and the stop texts that count: properties over texts made of few letters, in which all accidents happen."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tpt_megatron.config.evaluate import ThoughtDelimiters
from tpt_megatron.evaluate.thoughts import ends_in_thought, find_stop, outside_thoughts

TAGS = ThoughtDelimiters(open="<think>", close="</think>")
SHORT = ThoughtDelimiters(open="ab", close="ba")
texts = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=3), max_size=3)


@pytest.mark.parametrize(
    ("text", "starts_inside", "left", "is_open"),
    [
        ("say <think>a</think> it", False, "say  it", False),
        ("a</think> it", True, " it", False),
        ("a</think> it", False, "a</think> it", False),  # closing what is not open means nothing
        ("<think>a<think>b</think>c</think>", False, "c</think>", False),  # nor does opening it again
        ("x<think>a", False, "x", True),
        ("a", True, "", True),
        ("</think>", True, "", False),
        ("", True, "", True),
        ("", False, "", False),
    ],
)
def test_thoughts_are_taken_out(text: str, starts_inside: bool, left: str, is_open: bool) -> None:
    assert outside_thoughts(text, TAGS, starts_inside=starts_inside) == left
    assert ends_in_thought(text, TAGS, starts_inside=starts_inside) == is_open


@pytest.mark.parametrize(
    ("text", "starts_inside", "kept"),
    [
        ("18\nQ: next", False, "18"),
        ("<think>\nQ: is it?</think> 18\nQ: next", False, "<think>\nQ: is it?</think> 18"),
        ("\nQ: is it?</think> 18\nQ: next", True, "\nQ: is it?</think> 18"),
        ("<think>\nQ: on and on", False, None),
        ("\nQ: <think>a</think>", False, ""),
        ("no question", False, None),
    ],
)
def test_a_stop_text_counts_outside_of_thoughts(text: str, starts_inside: bool, kept: str | None) -> None:
    at = find_stop(text, ["\nQ:", "never"], TAGS, starts_inside=starts_inside)
    assert (None if at is None else text[:at]) == kept


def test_what_may_open_a_thought_is_no_stop_text_yet() -> None:
    line = ThoughtDelimiters(open="\n<t>", close="</t>")
    assert find_stop("18\n", ["\n"], line, is_whole=False) is None
    assert find_stop("18\n<", ["\n"], line, is_whole=False) is None
    assert find_stop("18\n<t>x", ["\n"], line, is_whole=False) is None
    assert find_stop("18\nx", ["\n"], line, is_whole=False) == 2
    assert find_stop("18\n", ["\n"], line) == 2  # nothing comes any more


def test_of_several_stop_texts_the_one_counts_that_is_complete_first() -> None:
    assert find_stop("abcd", ["abcd", "c"], TAGS) == 2
    assert find_stop("abcd", ["bcd", "cd", "d"], TAGS) == 1, "of those that are complete together it is the longest"


@example("bca", ["bca", "c"], False, [1] * 30)
@given(texts, stops, st.booleans(), st.lists(st.integers(1, 4), min_size=30, max_size=30))
def test_a_growing_text_ends_where_the_whole_one_is_cut(text: str, stops: list[str], starts_inside: bool, steps: list[int]) -> None:
    whole = find_stop(text, stops, SHORT, starts_inside=starts_inside)
    length = 0
    for step in steps:
        length = min(len(text), length + step)
        at = find_stop(text[:length], stops, SHORT, starts_inside=starts_inside, is_whole=False)
        if at is not None:
            assert at == whole
            return
    if whole is not None:  # it was undecided to the end
        assert find_stop(text, stops, SHORT, starts_inside=starts_inside) == whole
        assert any(SHORT.open.startswith(text[at:]) for at in range(max(0, len(text) - 1), len(text)))


@given(st.lists(st.tuples(st.text("xyz", max_size=5), st.text("xyzS", max_size=5)), max_size=5), st.text("xyz", max_size=5))
def test_thoughts_may_hold_any_stop_text(pairs: list[tuple[str, str]], last: str) -> None:
    text = "".join(f"{said}<think>{thought}</think>" for said, thought in pairs) + last
    assert find_stop(text, ["S"], TAGS) is None
    assert find_stop(text + "S" + text, ["S"], TAGS) == len(text)
    assert outside_thoughts(text, TAGS) == "".join(said for said, _ in pairs) + last


@given(texts, stops, st.booleans())
def test_what_is_cut_has_no_stop_text_outside_of_thoughts(text: str, stops: list[str], starts_inside: bool) -> None:
    at = find_stop(text, stops, SHORT, starts_inside=starts_inside)
    if at is None:
        return
    assert any(text.startswith(stop, at) for stop in stops)
    assert not ends_in_thought(text[:at], SHORT, starts_inside=starts_inside)
