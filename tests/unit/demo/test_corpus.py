from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpt_megatron.augment.worked import answer_of, parse_problem, work_out_text
from tpt_megatron.demo.corpus import NAMES, read_statements, vocabulary, write_corpus, write_problems, write_tokenizer
from tpt_megatron.errors import DataError
from tpt_megatron.tokenizer import END_OF_DOCUMENT, load_tokenizer


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_seed_alone_decides_the_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_corpus(tmp_path / name, 50, seed, set())
        write_problems(tmp_path / f"p{name}", 50, seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    assert (tmp_path / "pa").read_bytes() == (tmp_path / "pb").read_bytes() != (tmp_path / "pc").read_bytes()


def test_the_raw_corpus_has_the_stated_mixture_and_every_text_can_be_thought_about(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", 4000, 3, set())
    records = read(tmp_path / "corpus.jsonl")
    worked = sum(" Working : " in record["text"] for record in records)
    direct = sum(" Answer : " in record["text"] for record in records)
    assert 0.04 < worked / 4000 < 0.06
    assert 0.27 < (4000 - worked - direct) / 4000 < 0.33
    assert {record["steps"] for record in records} == {1, 2, 3, 4, 5}
    assert len({record["id"] for record in records}) == 4000
    for record in records[:500]:
        thought = work_out_text(record["text"])
        assert thought is not None
        assert thought.count("+") == record["steps"]
        for cue in (" Working : ", " Answer : "):
            if cue in record["text"]:
                said = record["text"].split(cue)[1]
                assert said == thought or thought.endswith(f" {said}")


def test_problems_are_new_distinct_balanced_and_rightly_answered(tmp_path: Path) -> None:
    write_problems(tmp_path / "problems.jsonl", 500, 0)
    problems = read(tmp_path / "problems.jsonl")
    held_out = read_statements(tmp_path / "problems.jsonl")
    assert len(held_out) == 500
    write_corpus(tmp_path / "all.jsonl", 5000, 0, set())
    write_corpus(tmp_path / "corpus.jsonl", 5000, 0, held_out)
    stated = [{record["text"].split(" ?")[0] + " ?" for record in read(tmp_path / name)} for name in ("all.jsonl", "corpus.jsonl")]
    assert stated[0] & held_out, "nothing to hold out: the test says nothing"
    assert not stated[1] & held_out
    for problem in problems:
        values = parse_problem(problem["problem"])
        assert values is not None
        assert problem["answer"] == str(answer_of(values))
        assert problem["steps"] == len(values) - 1
        assert len({name for name, _ in values}) == len(values)
    assert [sum(problem["steps"] == steps for problem in problems) for steps in range(1, 6)] == [100] * 5


def test_asking_for_more_problems_than_there_are_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpt_megatron.demo.corpus.NAMES", NAMES[:2])
    monkeypatch.setattr("tpt_megatron.demo.corpus.MAX_STEPS", 1)
    with pytest.raises(DataError, match="no new problem of 1 additions"):
        write_problems(tmp_path / "problems.jsonl", 40, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_vocabulary_is_closed_over_documents_thoughts_and_delimiters(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path), END_OF_DOCUMENT)
    assert tokenizer.vocabulary_size == len(set(vocabulary())) + 2 == len(vocabulary()) + 2
    write_corpus(tmp_path / "corpus.jsonl", 500, 0, set())
    for record in read(tmp_path / "corpus.jsonl"):
        thought = work_out_text(record["text"])
        ids = tokenizer.encode(f"{record['text']}\n<think>\n{thought}\n</think>")
        assert tokenizer.unknown_id not in ids
        assert tokenizer.decode(ids) == f"{record['text']} <think> {thought} </think>"
