from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.errors import RecordError
from tpt_megatron.records import AugmentedDocument, Document, FieldNames, Thought, augmented_to_record, read_augmented, read_document, text_id

texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip() != "")
thoughts = st.builds(
    Thought,
    text=texts,
    generator=texts,
    prompt=st.none() | texts,
    finish_reason=st.none() | texts,
    tokens=st.none() | st.integers(0, 2**31),
    seed=st.none() | st.integers(0, 2**31),
    extra=st.dictionaries(st.sampled_from(["temperature", "model"]), st.floats(0, 2)),
)
documents = st.builds(Document, id=texts, text=texts, source=st.none() | texts, extra=st.dictionaries(st.sampled_from(["url", "date"]), texts))


@given(st.builds(AugmentedDocument, documents, st.lists(thoughts, max_size=3).map(tuple)))
def test_an_augmented_document_survives_json_unchanged(augmented: AugmentedDocument) -> None:
    line = orjson.dumps(augmented_to_record(augmented))
    assert read_augmented(orjson.loads(line), "f:1") == augmented


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (None, "a record must be a JSON object, found null"),
        ([1], "a record must be a JSON object, found list"),
        ({}, "field 'text' is missing"),
        ({"text": None}, "field 'text' must be a string, found null"),
        ({"text": 3}, "field 'text' must be a string, found int"),
        ({"text": " \n"}, "field 'text' is empty"),
        ({"text": "a\ud800"}, "lone surrogate"),
        ({"text": "a", "id": True}, "field 'id' must be a string, found bool"),
        ({"text": "a", "source": 1}, "field 'source' must be a string, found int"),
        ({"text": "a", "thoughts": "x"}, "field 'thoughts' must be a list, found str"),
        ({"text": "a", "thoughts": [1]}, "a thought must be a JSON object"),
        ({"text": "a", "thoughts": [{"text": "b"}]}, "field 'generator' is missing"),
        ({"text": "a", "thoughts": [{"text": "b", "generator": "g", "tokens": True}]}, "field 'tokens' must be of type int, found bool"),
    ],
)
def test_a_bad_record_is_refused_with_its_place_and_reason(record: object, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        read_augmented(record, "corpus.jsonl:7")
    assert caught.value.where == "corpus.jsonl:7"
    assert reason in caught.value.reason


def test_ids_are_made_from_the_text_when_missing_and_numbers_become_strings() -> None:
    assert read_document({"text": "a"}, "f:1").id == text_id("a") != text_id("b")
    assert read_document({"text": "a", "id": 12}, "f:1").id == "12"


def test_fields_of_other_names_are_read_and_fields_in_the_way_of_ours_are_kept_beside() -> None:
    names = FieldNames(text="content", id="key", source="domain")
    document = read_document({"content": "the text", "key": "k", "domain": "web", "text": "another", "id": 5, "n": 1}, "f:1", names)
    assert document == Document("k", "the text", "web", {"input_text": "another", "input_id": 5, "n": 1})
    assert augmented_to_record(AugmentedDocument(document))["text"] == "the text"
