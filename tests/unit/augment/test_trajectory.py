from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.augment.engines.base import Reply
from tpt_megatron.augment.trajectory import Trajectory, read_trajectory

STOP = ("</think>",)


def closed(text: str) -> Trajectory:
    return Trajectory(text, closed=True)


def unclosed(text: str) -> Trajectory:
    return Trajectory(text, closed=False)


REASONING_CASES = {
    "vllm, parser, whole reply": (Reply("\n\n42", "Add them.\n", "stop"), (), closed("Add them.")),
    "vllm, parser, stopped at the closing tag": (Reply(None, "Add them.\n", "stop", "</think>"), STOP, closed("Add them.")),
    "vllm, parser, cut in the thought": (Reply(None, "Add th", "length"), STOP, unclosed("Add th")),
    "vllm, parser, cut in the answer": (Reply("The ans", "Add them.", "length"), (), closed("Add them.")),
    "vllm, parser, another stop text inside the thought": (Reply(None, "Add", "stop", "###"), ("###",), unclosed("Add")),
    "vllm, aborted": (Reply(None, "Add", "abort"), STOP, unclosed("Add")),
    "vllm, no parser, stopped at the closing tag": (Reply("<think>\nAdd them.\n", None, "stop", "</think>"), STOP, closed("Add them.")),
    "vllm, no parser, another stop text": (Reply("<think>Add", None, "stop", "###"), ("###", "</think>"), unclosed("Add")),
    "vllm, thought opened in the prompt, stopped": (Reply("Add them.\n", None, "stop", "</think>"), STOP, closed("Add them.")),
    "vllm, thought opened in the prompt, longer stop text": (Reply("Add.", None, "stop", "\n</think>"), ("\n</think>",), closed("Add.")),
    "sglang, whole reply": (Reply("42", "Add them.", "stop"), (), closed("Add them.")),
    "sglang, stop not told": (Reply("", "Add them.", "stop"), STOP, closed("Add them.")),
    "sglang, line breaks around an unfinished thought": (Reply("\n", "Add th", "length"), STOP, unclosed("Add th")),
    "transformers serve, no template": (Reply("<think>\nAdd.\n</think>\n\n42", None, "stop"), (), closed("Add.")),
    "transformers serve, stop text kept": (Reply("<think>\nAdd.\n</think>", None, "stop"), STOP, closed("Add.")),
    "transformers serve, cut": (Reply("<think>\nAdd th", None, "length"), STOP, unclosed("Add th")),
    "llama.cpp, reasoning_format none": (Reply("<think>Add.", None, "stop"), STOP, closed("Add.")),
    "llama.cpp, ended without a closing tag": (Reply("<think>Add.", None, "stop"), (), unclosed("Add.")),
    "R1-Distill, closing tag only": (Reply("Add them.\n</think>\n\n42", None, "stop"), (), closed("Add them.")),
    "R1-Distill, the answer cut": (Reply("Add them.</think>\n\nThe", None, "length"), (), closed("Add them.")),
    "R1-Distill, cut, nothing tells thought from answer": (Reply("Add th", None, "length"), STOP, unclosed("")),
    "hosted, blank reasoning": (Reply("<think>Add.</think>42", " ", "stop"), (), closed("Add.")),
    "hosted, no finish reason": (Reply("42", "Add.", None), (), closed("Add.")),
    "hosted, no thought": (Reply("42", None, "stop"), STOP, closed("")),
    "hosted, nothing at all": (Reply(None, None, "stop"), STOP, closed("")),
    "hosted, filtered": (Reply("", None, "content_filter"), STOP, Trajectory("", closed=False, refused=True)),
    "hosted, filtered within the thought": (Reply(None, "How to", "content_filter"), (), Trajectory("How to", closed=False, refused=True)),
    "empty thought": (Reply("<think>\n\n</think>\n\n42", None, "stop"), (), closed("")),
    "several blocks: the first": (Reply("<think>A</think>B<think>C</think>D", None, "stop"), (), closed("A")),
    "nested blocks keep the inner tag": (Reply("<think>A<think>B</think>C</think>D", None, "stop"), (), closed("A<think>B")),
    "text about tags is no opening": (Reply("It says <think> here.</think>D", None, "stop"), (), closed("It says <think> here.")),
    "white space inside stays": (Reply("\n <think> A\n\n  B\t</think>", None, "stop"), (), closed("A\n\n  B")),
}


@pytest.mark.parametrize("case", REASONING_CASES)
def test_the_thought_is_found(case: str) -> None:
    reply, stop, expected = REASONING_CASES[case]
    assert read_trajectory(reply, "reasoning", stop) == expected


CONTENT_CASES = {
    "plain": (Reply("The text says A.\n", None, "stop"), closed("The text says A.")),
    "cut": (Reply("The text s", None, "length"), unclosed("The text s")),
    "reasoning apart": (Reply("A.", "Hm.", "stop"), closed("A.")),
    "reasoning apart, the answer cut": (Reply("A", "Hm.", "length"), unclosed("A")),
    "reasoning apart, cut in the thought": (Reply(None, "Hm", "length"), unclosed("")),
    "inline": (Reply("<think>Hm.</think>\n\nA.", None, "stop"), closed("A.")),
    "inline, closing tag only": (Reply("Hm.</think>\n\nA.", None, "stop"), closed("A.")),
    "inline, cut in the thought": (Reply("<think>Hm", None, "length"), unclosed("")),
    "ended by its closing tag: no answer": (Reply("Hm.", None, "stop", "</think>"), closed("")),
    "filtered": (Reply("A", None, "content_filter"), Trajectory("A", closed=False, refused=True)),
}


@pytest.mark.parametrize("case", CONTENT_CASES)
def test_the_answer_is_found(case: str) -> None:
    reply, expected = CONTENT_CASES[case]
    assert read_trajectory(reply, "content", STOP) == expected


untagged = st.text().filter(lambda text: "<think>" not in text and "</think>" not in text)


@given(thought=untagged.filter(str.strip), answer=untagged, finish_reason=st.sampled_from(["stop", "length"]))
def test_every_shape_of_a_closed_thought_gives_its_very_characters(thought: str, answer: str, finish_reason: str) -> None:
    shapes = [
        Reply(f"<think>{thought}</think>{answer}", None, finish_reason),
        Reply(f"{thought}</think>{answer}", None, finish_reason),
        Reply(f"A.{answer}", thought, finish_reason),
        Reply(f"<think>{thought}", None, "stop"),
        Reply(None, thought, "stop", "</think>"),
        Reply(thought, None, "stop", "</think>"),
    ]
    for reply in shapes:
        assert read_trajectory(reply, "reasoning", STOP) == closed(thought.strip())


pieces = st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "</thi"])).map("".join)


@given(
    content=st.none() | pieces,
    reasoning=st.none() | pieces,
    finish_reason=st.sampled_from(["stop", "length", "content_filter", "tool_calls", None]),
    stop_reason=st.sampled_from([None, "</think>", "###"]),
    thought_from=st.sampled_from(["reasoning", "content"]),
)
def test_no_reply_is_invented_or_breaks_it(content, reasoning, finish_reason, stop_reason, thought_from) -> None:
    trajectory = read_trajectory(Reply(content, reasoning, finish_reason, stop_reason), thought_from, STOP)
    assert trajectory.text in (content or "") or trajectory.text in (reasoning or "")
    assert trajectory.text == trajectory.text.strip()
    assert trajectory.refused == (finish_reason == "content_filter")
