from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.config.preprocess import Delimiters
from tpt_megatron.datasets import PART_DOCUMENT, PART_THINKING
from tpt_megatron.preprocess.compose import compose
from tpt_megatron.records import AugmentedDocument, Document, Thought

TWO = AugmentedDocument(Document("a", "doc"), (Thought("x", "g"), Thought("y", "g")))
MARKS = Delimiters(open="<", close=">", between="|", inside="_")


def test_each_arm_puts_the_thoughts_where_it_says() -> None:
    assert compose(TWO, "vanilla", MARKS) == [(PART_DOCUMENT, "doc")]
    assert compose(TWO, "append", MARKS) == [(PART_DOCUMENT, "doc"), (PART_THINKING, "|<_x_>"), (PART_THINKING, "|<_y_>")]
    assert compose(TWO, "prepend", MARKS) == [(PART_THINKING, "<_x_>|"), (PART_THINKING, "<_y_>|"), (PART_DOCUMENT, "doc")]


@given(st.text(min_size=1), st.lists(st.text(), max_size=3))
def test_without_the_thinking_every_arm_is_the_document(text: str, thoughts: list[str]) -> None:
    augmented = AugmentedDocument(Document("a", text), tuple(Thought(thought, "g") for thought in thoughts))
    for arm in ("vanilla", "append", "prepend"):
        segments = compose(augmented, arm, Delimiters())
        assert [segment for segment in segments if segment[0] == PART_DOCUMENT] == [(PART_DOCUMENT, text)]
        assert len(segments) == (1 if arm == "vanilla" else 1 + len(thoughts))
