from __future__ import annotations

import pytest

from tpt_megatron.augment.generators import FieldThoughts, make_generator
from tpt_megatron.augment.worked import WorkedThoughts
from tpt_megatron.config.augment import FieldGenerator, WorkedGenerator
from tpt_megatron.errors import RecordError
from tpt_megatron.records import Document


def test_the_config_chooses_the_generator() -> None:
    assert isinstance(make_generator(WorkedGenerator(kind="worked")), WorkedThoughts)
    assert isinstance(make_generator(FieldGenerator(kind="field", field="x")), FieldThoughts)


def test_the_field_is_the_thought_and_stays_in_the_record() -> None:
    document = Document("a", "text", extra={"mind": " I think \n"})
    (thought,) = FieldThoughts("mind").think(document, "f:1")
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
        FieldThoughts("mind").think(Document("a", "text", extra=extra), "f:4")
