from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.augment.contamination import ContaminationIndex, normalised_words, run_hashes
from tpt_megatron.config.augment import Contamination
from tpt_megatron.errors import ConfigError, DataError

QUESTION = "A train leaves the station at noon and travels sixty miles an hour; when does it reach the town?"


def write(path: Path, *records: object) -> str:
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes({".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data))
    return str(path)


def index(*files: str, words: int = 13, fields: tuple[str, ...] = ()) -> ContaminationIndex:
    return ContaminationIndex(Contamination(files=files, words=words, fields=fields))


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20))
def test_equal_runs_and_no_others_have_equal_hashes(values: list[int], length: int) -> None:
    hashes = run_hashes(np.array(values, np.uint64), length).tolist()
    runs = [tuple(values[i : i + length]) for i in range(len(values) - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(hashes, runs, strict=True))) == len(set(hashes)) == len(set(runs))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't STOP_now: 3.5%", ["don", "t", "stop", "now", "3", "5"]),
        ("«Ünïcode» — Straße!", ["ünïcode", "straße"]),
        ("ｆｕｌｌ ｗｉｄｔｈ", ["full", "width"]),
        ("水は100度で。", ["水", "は", "100", "度", "で"]),
        ("", []),
    ],
)
def test_words_are_compared_without_case_width_and_punctuation(text: str, words: list[str]) -> None:
    assert normalised_words(text) == words


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_thought_that_repeats_a_question_is_found_with_its_words(tmp_path: Path, name: str) -> None:
    record = {"question": QUESTION, "n": 3, "none": None}
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / name)
    else:
        write(tmp_path / name, record)
    sets = index(str(tmp_path / name))
    assert len(sets) == len(normalised_words(QUESTION)) - 12
    thought = f"Let me see. {QUESTION.upper().replace(' ', '  ')} That is easy."
    assert sets.find(thought) == "a train leaves the station at noon and travels sixty miles an hour"
    assert sets.find(" ".join(QUESTION.split()[:12])) is None
    assert sets.find(QUESTION.replace("station", "depot").replace("reach", "get to")) is None
    assert sets.find("") is None


def test_choices_and_nested_texts_are_compared_too_but_no_run_crosses_from_one_to_the_next(tmp_path: Path) -> None:
    choices = ["the first of all the choices that are given here", "the second of all the choices that are given here"]
    sets = index(write(tmp_path / "a.jsonl", {"choices": {"text": choices, "label": ["A", "B"]}}), words=10)
    assert sets.find(choices[1]) == choices[1]
    assert sets.find("that are given here the second of all the choices that") is None


def test_only_the_named_fields_count(tmp_path: Path) -> None:
    other = "quite another text of more than thirteen words that stands in a field nobody named here"
    path = write(tmp_path / "a.jsonl", {"question": QUESTION, "meta": other})
    assert index(path).find(other) is not None
    assert index(path, fields=("question",)).find(other) is None
    with pytest.raises(ConfigError, match=r"a\.jsonl has a field 'qestion'; it has: meta, question"):
        index(path, fields=("qestion",))
    second = write(tmp_path / "b.jsonl", {"query": QUESTION})
    assert index(path, second, fields=("question", "query")).find(QUESTION) is not None
    with pytest.raises(ConfigError, match="has a field 'answer'"):
        index(path, second, fields=("question", "query", "answer"))


def test_a_short_text_is_compared_as_a_whole_from_eight_words_on(tmp_path: Path) -> None:
    eight, seven = "what is the tallest mountain of all Africa", "what is the tallest mountain of Africa"
    sets = index(write(tmp_path / "a.jsonl", {"q": QUESTION}, {"q": eight}, {"q": seven}))
    assert sets.find(f"They ask {eight}?") == eight.lower()
    assert sets.find(f"They ask {seven}?") is None
    assert sets.find(" ".join(eight.split()[:7])) is None


def test_chinese_is_compared_by_characters(tmp_path: Path) -> None:
    sets = index(write(tmp_path / "a.jsonl", {"q": "小明有三个苹果，他又买了五个苹果，一共有几个？"}))
    assert sets.find("我们来看：小明有三个苹果,他又买了五个苹果。") == "小 明 有 三 个 苹 果 他 又 买 了 五 个"
    assert sets.find("小明有三个梨，他又买了五个苹果。") is None


def test_a_mistake_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such file"):
        index(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"a\.csv: of no known kind"):
        index(str(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": QUESTION}) + "\n\n{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3: not valid JSON"):
        index(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match=r"b\.jsonl:1: a record must be a JSON object, found a list"):
        index(write(tmp_path / "b.jsonl", [QUESTION]))
    with pytest.raises(DataError, match=r"c\.jsonl: nothing to compare with"):
        index(write(tmp_path / "c.jsonl", {"q": "too short", "n": 1}))
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no, it is not")
    with pytest.raises(DataError, match=r"d\.parquet: not a readable Parquet file"):
        index(str(tmp_path / "d.parquet"))


def test_the_fingerprint_is_that_of_the_contents_in_every_process(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", {"q": QUESTION}), write(tmp_path / "b.jsonl", {"q": QUESTION.replace("noon", "one")})
    both = index(first, second).fingerprint
    assert both == index(second, first).fingerprint
    assert len({both, index(first).fingerprint, index(second).fingerprint, index(first, words=12).fingerprint}) == 4
    program = "from tpt_megatron.augment.contamination import *; import sys;print(ContaminationIndex(Contamination(files=tuple(sys.argv[1:]))).fingerprint)"
    for seed in ("1", "2"):
        ended = subprocess.run([sys.executable, "-c", program, first, second], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed})
        assert ended.stdout.strip() == both
