import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tpt_megatron.config.preprocess import KeepThoughts, PreprocessConfig
from tpt_megatron.datasets import PART_THINKING, open_dataset
from tpt_megatron.errors import DataError
from tpt_megatron.preprocess import long_text, pieces, reading
from tpt_megatron.preprocess.choosing import ThoughtChoice
from tpt_megatron.preprocess.reading import LongDocument
from tpt_megatron.preprocess.runner import run_preprocess
from tpt_megatron.records import AugmentedDocument, Document, Thought
from tpt_megatron.tokenizer import END_OF_DOCUMENT, load_tokenizer

scores = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, 2]), st.just(math.nan))


@given(
    st.lists(scores, max_size=6),
    st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 1.0])),
    st.one_of(st.none(), st.integers(1, 3)),
    st.sampled_from(["drop", "keep"]),
    st.sampled_from(["drop", "keep"]),
)
def test_exactly_those_that_the_config_says_stay(values: list[float | None], least: float | None, best: int | None, unscored: Any, without: Any) -> None:
    if least is None and best is None:
        least = 0.0
    choice = ThoughtChoice(KeepThoughts(score="s", min=least, best=best, unscored=unscored, without_thoughts=without))
    thoughts = tuple(Thought(str(number), "g", extra={"s": value}) for number, value in enumerate(values))
    chosen = choice.of(AugmentedDocument(Document("d", "text"), thoughts))
    known = {number: value for number, value in enumerate(values) if value is not None and not math.isnan(value)}
    enough = [number for number, value in known.items() if least is None or value >= least]
    better = {number: sum(known[other] > known[number] or (known[other] == known[number] and other < number) for other in enough) for number in enough}
    stay = [number for number in enough if best is None or better[number] < best]
    expected = sorted(stay + [number for number in range(len(values)) if number not in known and unscored == "keep"])
    if not expected and without == "drop":
        assert chosen is None
    else:
        assert chosen is not None
        assert [thought.text for thought in chosen.thoughts] == [str(number) for number in expected]
    counts = choice.counts
    assert counts.thoughts_read == len(values)
    assert counts.thoughts_read == counts.thoughts_kept + counts.thoughts_below_min + counts.thoughts_not_best + counts.thoughts_unscored
    assert counts.thoughts_kept == len(expected)
    assert counts.documents_dropped == (chosen is None)


def write(folder: Path, scored: list[list[Any]], *, repeated: int = 1) -> None:
    """Write a document a list, with a thought a score; `no` for no score at all."""
    with open(folder / "in.jsonl", "w") as file:
        for number, values in enumerate(scored):
            thoughts = [{"text": f"t{number}.{i}", "generator": "g"} | ({} if value == "no" else {"value": {"nats": value}}) for i, value in enumerate(values)]
            file.write(json.dumps({"id": f"d{number}", "text": f"document {number} " * repeated, "thoughts": thoughts}) + "\n")


def config(folder: Path, output: str = "out", **changes: Any) -> PreprocessConfig:
    given = {"input": str(folder / "in.jsonl"), "output": folder / output, "tokenizer": "byte", "keep_thoughts": {"score": "value.nats", "min": 0.0}}
    return PreprocessConfig.model_validate(given | changes)


def thoughts_of(prefix: Path) -> dict[str, str]:
    """Return what of each document is thinking."""
    dataset, tokenizer = open_dataset(prefix), load_tokenizer("byte", END_OF_DOCUMENT)
    assert dataset.parts is not None
    ids = pq.read_table(f"{prefix}.documents.parquet")["id"].to_pylist()
    spans = zip(dataset.offsets[:-1].tolist(), dataset.offsets[1:].tolist(), strict=True)
    texts = [tokenizer.decode(dataset.tokens[begin:end][dataset.parts[begin:end] == PART_THINKING].tolist()) for begin, end in spans]
    return {identity: re.sub(r"</?think>|\n", "", text) for identity, text in zip(ids, texts, strict=True)}


SCORED: list[list[Any]] = [[1.0, -1.0, 0.0], [-0.5], [None, 3], [], ["no"]]


@pytest.mark.parametrize("long", [False, True])
def test_datasets_hold_what_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    added: list[LongDocument] = []
    if long:  # every text is one that is not held at once
        monkeypatch.setattr(reading, "LONG_LINE", 50)
        monkeypatch.setattr(reading, "BLOCK", 64)
        monkeypatch.setattr(long_text, "LONG_LINE", 50)
        add_long = pieces._PieceAtWork.add_long
        monkeypatch.setattr(pieces._PieceAtWork, "add_long", lambda self, document: (added.append(document), add_long(self, document)))
    write(tmp_path, SCORED, repeated=40 if long else 1)
    made = run_preprocess(config(tmp_path))
    assert thoughts_of(tmp_path / "out/append/train") == {"d0": "t0.0t0.2", "d1": "", "d2": "t2.1", "d3": "", "d4": ""}
    counts = made["append/train"].counts
    assert {name: counts[name] for name in ("documents", "documents_without_thoughts", "records")} == {
        "documents": 5, "documents_without_thoughts": 3, "records": 5,
    }  # fmt: skip
    assert [counts[f"thoughts_{name}"] for name in ("read", "kept", "below_min", "not_best", "unscored")] == [7, 3, 2, 0, 2]
    assert len(added) == (5 if long else 0)
    best = {"score": "value.nats", "best": 1, "without_thoughts": "drop"}
    made = run_preprocess(config(tmp_path, "dropped", keep_thoughts=best, validation_fraction=0.9 if long else 0.35))
    for arm in ("append", "vanilla"):
        splits = {split: thoughts_of(tmp_path / f"dropped/{arm}/{split}") for split in ("train", "validation")}
        kept = {"d0": "t0.0", "d1": "t1.0", "d2": "t2.1"}
        assert splits["train"] | splits["validation"] == (kept if arm == "append" else dict.fromkeys(kept, ""))
    counts = made["append/train"].counts
    assert (counts["documents_dropped"], counts["thoughts_not_best"]) == (2, 2)
    assert counts["records"] == counts["documents"] + made["append/validation"].counts["documents"] + 2


def test_pieces_workers_and_duplicates_change_nothing(tmp_path: Path) -> None:
    write(tmp_path, SCORED * 30)
    once = run_preprocess(config(tmp_path, "one", deduplicate="exact"))
    cut = run_preprocess(config(tmp_path, "many", deduplicate="exact", piece_megabytes=0.001, workers=2))
    assert once["append/train"] == cut["append/train"]
    assert (tmp_path / "one/append/train.bin").read_bytes() == (tmp_path / "many/append/train.bin").read_bytes()


def test_without_the_key_nothing_is_counted_and_settings_are_as_before(tmp_path: Path) -> None:
    write(tmp_path, SCORED)
    manifest = run_preprocess(config(tmp_path, keep_thoughts=None))["append/train"]
    assert not [name for name in manifest.counts if name.startswith("thoughts_")]
    assert "keep_thoughts" not in manifest.settings
    assert thoughts_of(tmp_path / "out/append/train")["d0"] == "t0.0t0.1t0.2"


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    write(tmp_path, [["no"], ["no"]])
    with pytest.raises(DataError, match=r"none of 2 thoughts has a score at keep_thoughts\.score=value\.nats: have tpt value give them one"):
        run_preprocess(config(tmp_path))
    write(tmp_path, [[None], [None]])
    with pytest.raises(DataError, match=r"none of 2 thoughts has a score"):
        run_preprocess(config(tmp_path, "null"))
    write(tmp_path, [[1.0], ["high"], [True]])
    made = run_preprocess(config(tmp_path, "text"))
    assert made["append/train"].counts["bad_records"] == 2
    bad = [json.loads(line)["reason"] for line in (tmp_path / "text/bad_records.jsonl").read_text().splitlines()]
    assert bad == [f"thought 1: value.nats must be a number or null, found {kind}" for kind in ("str", "bool")]
    write(tmp_path, [[-1.0]])
    with pytest.raises(DataError, match=r"no document for train .* 1 were dropped, since none of their thoughts stayed"):
        run_preprocess(config(tmp_path, "none", keep_thoughts={"score": "value.nats", "min": 0, "without_thoughts": "drop"}))
    for changes, says in (({"keep_thoughts": {}}, "give min, best or both"), ({"arms": ["chat"]}, r"has no thoughts")):
        with pytest.raises(ValidationError, match=says):
            config(tmp_path, **changes)
