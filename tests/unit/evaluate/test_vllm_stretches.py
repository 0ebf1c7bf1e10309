"""Requests that vLLM would end in a thought are taken up again: what comes out is what one pass with an eye for thoughts gives."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.config.evaluate import ThoughtDelimiters
from tpt_megatron.evaluate.benchmarks.vllm_backend import Stretches
from tpt_megatron.evaluate.generate import Request
from tpt_megatron.evaluate.thoughts import find_stop

SHORT = ThoughtDelimiters(open="ab", close="ba")
END = 0


def decode(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def answered(request: Request, written: list[int]) -> Stretches:
    """Have a model that would write so many tokens, and end, answer as vLLM lets it: up to the first stop text, which is kept, or the limit."""
    state = Stretches(request)
    while state.ended is None:
        before, rest = len(state.ids), [*written[len(state.ids) :], END]
        limit = request.max_new_tokens - before
        assert limit > 0
        for length in range(1, len(rest) + 1):
            text = decode(rest[:length])
            if rest[length - 1] == END:
                state.take(rest[:length], "stop", None, decode)
                break
            if stopped := [stop for stop in state.stops() if text.endswith(stop)]:
                state.take(rest[:length], "stop", stopped[0], decode)
                break
            if length == limit:
                state.take(rest[:length], "length", None, decode)
                break
        assert len(state.ids) > before or state.ended is not None, "it gets on"
    return state


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), st.booleans(), st.integers(1, 40))
def test_stretches_make_the_text_that_one_pass_makes(text: str, stops: list[str], starts_inside: bool, limit: int) -> None:
    request = Request((1,), limit, tuple(stops), SHORT, starts_inside)
    found = answered(request, [ord(letter) for letter in text]).continuation()
    cut = find_stop(text[:limit], stops, SHORT, starts_inside=starts_inside)
    assert found.text == text[:limit][:cut]
    assert found.ended == ("stop" if cut is not None else "length" if limit <= len(text) else "end")


def test_a_stop_text_in_a_thought_is_passed_over() -> None:
    thinking = ThoughtDelimiters(open="<think>", close="</think>")
    text = "<think>\nQ: is it?</think> 18\nQ: next"
    state = answered(Request((1,), 100, ("\nQ:",), thinking), [ord(letter) for letter in text])
    found = state.continuation()
    assert (found.text, found.ended, found.new_tokens) == ("<think>\nQ: is it?</think> 18", "stop", len(text) - len(" next"))
