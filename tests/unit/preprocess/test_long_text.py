from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.errors import RecordError
from tpt_megatron.preprocess import long_text
from tpt_megatron.preprocess.long_text import PLACEHOLDER, LongText, StringText, split_long_line

texts = st.text(st.one_of(st.sampled_from('\\"\nu0é中😀 '), st.characters(exclude_categories=("Cs",))), max_size=60)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "DECODED_AT_ONCE", 13)
    monkeypatch.setattr(long_text, "LONG_LINE", 10)


def literal(text: str, *, ascii_only: bool) -> memoryview:
    return memoryview(json.dumps(text, ensure_ascii=ascii_only).encode()[1:-1])


@given(texts, st.booleans())
def test_pieces_make_the_text_wherever_they_are_cut(text: str, ascii_only: bool) -> None:
    long = LongText(literal(text, ascii_only=ascii_only))
    assert "".join(long.pieces()) == text
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert long.measure() == (len(text), text.isspace() or not text, digest, False)
    for part in (text[3:9], text[12:14], "nowhere"):
        assert not part or long.measure(part)[3] == (part in text)


@given(texts)
def test_a_string_is_worked_off_in_pieces_too(text: str) -> None:
    pieces = list(StringText(text).pieces())
    assert "".join(pieces) == text
    assert all(1 <= len(piece) <= 13 for piece in pieces)


@pytest.mark.parametrize("bad", [b"abc\\", b"\\ud83d and more than one piece", b"x" * 30 + b"\xff" + b"y" * 30, b"\\q" + b"z" * 30, b"\xc3"])
def test_what_is_no_json_string_is_refused(bad: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        list(LongText(memoryview(bad)).pieces())


@given(texts.filter(lambda text: len(text.encode()) > 20), st.booleans(), st.booleans())
def test_a_line_is_split_into_record_and_text(text: str, first: bool, spaced: bool) -> None:
    others = {"id": "a", 'k"ey': 'v"text": "x', "n": {"text": "y"}}
    record = {"text": text, **others} if first else {**others, "text": text}
    line = json.dumps(record, separators=(" , ", " : ") if spaced else (",", ":")).encode()
    split = split_long_line(bytearray(line), "text", "f:1")
    assert split is not None
    assert split[0] == record | {"text": PLACEHOLDER} == json.loads(split[1])
    assert "".join(split[2].pieces()) == text


def test_a_line_that_is_long_for_another_reason_is_not_split() -> None:
    assert split_long_line(bytearray(b'{"text": "a", "other": "' + b"x" * 100 + b'"}'), "text", "f:1") is None
    assert split_long_line(bytearray(b'{"text": 12, "other": "' + b"x" * 100 + b'"}'), "text", "f:1") is None
    assert split_long_line(bytearray(b'{"text": "' + b"x" * 100), "text", "f:1") is None


def test_a_broken_record_around_a_long_text_is_refused() -> None:
    with pytest.raises(RecordError, match="f:1: not valid JSON"):
        split_long_line(bytearray(b'{"text": "' + b"x" * 100 + b'", "id": }'), "text", "f:1")
