from __future__ import annotations

import asyncio

import pytest

from tpt_megatron.augment.checks import ThoughtChecks
from tpt_megatron.augment.generators import FieldThoughts, WorkedThoughts
from tpt_megatron.config.augment import Checks
from tpt_megatron.errors import RecordError
from tpt_megatron.records import Document


def field_thoughts() -> FieldThoughts:
    return FieldThoughts("mind", ThoughtChecks(Checks(), None))


def test_the_field_is_the_thought_and_stays_in_the_record() -> None:
    document = Document("a", "text", extra={"mind": " I think \n"})
    outcome = asyncio.run(field_thoughts().think(document, "f:1"))
    (thought,) = outcome.thoughts
    assert (thought.text, thought.generator) == (" I think \n", "field:mind")
    assert document.extra == {"mind": " I think \n"}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({}, "field 'mind' is missing"),
        ({"mind": None}, "must be a string, found null"),
        ({"mind": 4}, "must be a string, found int"),
        ({"mind": " "}, "field 'mind' is empty"),
    ],
)
def test_an_unusable_field_is_refused_with_its_place(extra: dict[str, object], reason: str) -> None:
    with pytest.raises(RecordError, match=f"f:4: .*{reason}"):
        asyncio.run(field_thoughts().think(Document("a", "text", extra=extra), "f:4"))


def test_a_field_with_a_delimiter_in_it_is_rejected_and_not_wrapped() -> None:
    outcome = asyncio.run(field_thoughts().think(Document("a", "text", extra={"mind": "so </think> it is"}), "f:1"))
    assert outcome.thoughts == ()
    assert [(rejection.reason, rejection.thought.text) for rejection in outcome.rejections] == [("delimiter", "so </think> it is")]


def test_worked_thoughts_are_solutions_and_other_text_is_refused() -> None:
    problem = "Coins : Ann 3 , Bob 5 . Last digit of the total ?"
    (thought,) = asyncio.run(WorkedThoughts().think(Document("a", problem), "f:1")).thoughts
    assert (thought.text, thought.generator) == ("Bob 3 + 5 = 8 . So the answer is 8 .", "worked")
    with pytest.raises(RecordError, match="corpus:9: the text is no problem"):
        asyncio.run(WorkedThoughts().think(Document("a", "Hello ."), "corpus:9"))
