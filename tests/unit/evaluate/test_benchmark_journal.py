from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.errors import DataError
from tpt_megatron.evaluate.benchmarks.journal import Journal, request_key

BATCHES = [{"a": {"text": "eins"}, "b": {"text": "zwei\n"}}, {"c": [-math.inf, True]}, {"d": -1.25, "e": "\N{GREEK SMALL LETTER ALPHA}"}]


def written(path: Path) -> bytes:
    journal = Journal(path)
    for batch in BATCHES:
        journal.add(batch)
    return path.read_bytes()


def test_answers_are_there_again(tmp_path: Path) -> None:
    written(tmp_path / "folder" / "j.jsonl")
    journal = Journal(tmp_path / "folder" / "j.jsonl")
    assert {key: journal[key] for batch in BATCHES for key in batch} == {key: answer for batch in BATCHES for key, answer in batch.items()}
    assert "f" not in journal


@given(st.data())
def test_killed_at_any_byte_it_has_the_batches_before_and_goes_on(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "j.jsonl"
        content = written(path)
        length = data.draw(st.integers(0, len(content)))
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        journal = Journal(path)
        for number, batch in enumerate(BATCHES):
            assert all((key in journal) == (number < whole) for key in batch), "a batch is there or it is not"
        for batch in BATCHES[whole:]:
            journal.add(batch)
        assert path.read_bytes() == content


def test_damage_in_the_middle_is_told_with_its_line(tmp_path: Path) -> None:
    content = written(tmp_path / "j.jsonl")
    (tmp_path / "j.jsonl").write_bytes(content.replace(b'"c"', b'"c', 1))
    with pytest.raises(DataError, match=r"j\.jsonl:2: the journal is damaged; remove the file"):
        Journal(tmp_path / "j.jsonl")


def test_a_key_is_of_everything_that_decides() -> None:
    first: dict[str, Any] = {"kind": "generate_until", "request": ("prompt", {"until": ["\n"]}), "settings": {"weights": "w", "seed": 0}}
    assert request_key(**first) == request_key(**dict(reversed(first.items())))
    others = [
        {**first, "kind": "loglikelihood"},
        {**first, "request": ("prompt ", {"until": ["\n"]})},
        {**first, "request": ("prompt", {"until": ["\n\n"]})},
        {**first, "settings": {"weights": "v", "seed": 0}},
        {**first, "settings": {"weights": "w", "seed": 1}},
    ]
    assert len({request_key(**each) for each in [first, *others]}) == 6
    assert len(json.dumps(request_key(**first))) == 66
