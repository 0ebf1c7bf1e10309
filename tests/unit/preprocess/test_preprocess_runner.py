from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.datasets import PART_DOCUMENT, TokenDataset, open_dataset
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.preprocess import runner
from tpt_megatron.preprocess.runner import in_validation, run_preprocess
from tpt_megatron.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_word_tokenizer

ARMS = ("vanilla", "append", "prepend")


def config(folder: Path, **changes: Any) -> PreprocessConfig:
    return PreprocessConfig.model_validate({"input": str(folder / "in.jsonl"), "output": folder / "out", "tokenizer": "byte", "arms": ARMS} | changes)


def write(folder: Path, documents: list[tuple[str, list[str]]]) -> None:
    with open(folder / "in.jsonl", "w", encoding="utf-8") as file:
        for number, (text, thoughts) in enumerate(documents):
            file.write(json.dumps({"id": f"d{number}", "text": text, "thoughts": [{"text": thought, "generator": "g"} for thought in thoughts]}) + "\n")


def some(count: int) -> list[tuple[str, list[str]]]:
    return [(f"document {i}", [f"thought {i}"] * (i % 3)) for i in range(count)]


def documents_of(dataset: TokenDataset) -> list[list[int]]:
    return [dataset.tokens[a:b].tolist() for a, b in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)]


texts = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda text: text.strip() != "")


@hypothesis_settings(max_examples=20)
@given(st.lists(st.tuples(texts, st.lists(texts, max_size=2)), min_size=1, max_size=5))
def test_dropping_the_thinking_tokens_gives_exactly_vanilla(tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[str, list[str]]]) -> None:
    folder = tmp_path_factory.mktemp("arms")
    write(folder, documents)
    run_preprocess(config(folder))
    vanilla = open_dataset(folder / "out/vanilla/train")
    tokenizer = load_tokenizer("byte", END_OF_DOCUMENT)
    assert [tokenizer.decode(ids[:-1]) for ids in documents_of(vanilla)] == [text for text, _ in documents]
    for arm in ("append", "prepend"):
        dataset = open_dataset(folder / f"out/{arm}/train")
        assert dataset.parts is not None
        assert np.array_equal(dataset.tokens[dataset.parts == PART_DOCUMENT], vanilla.tokens)
        assert (dataset.tokens[dataset.offsets[1:] - 1] == tokenizer.eod_id).all()


def test_append_reads_as_the_paper_has_it(tmp_path: Path) -> None:
    write(tmp_path, [("d", ["t"])])
    manifests = run_preprocess(config(tmp_path))
    dataset = open_dataset(tmp_path / "out/append/train")
    assert load_tokenizer(str(tmp_path / "out/append/train.tokenizer.json"), END_OF_DOCUMENT).decode(dataset.tokens.tolist()) == (
        f"d\n<think>\nt\n</think>{END_OF_DOCUMENT}"
    )
    assert dataset.details == manifests["append/train"].details
    assert dataset.details["arm"] == "append"
    assert dataset.details["vocabulary_size"] == 257
    counts = manifests["append/train"].counts
    assert counts["tokens"] == counts["tokens_document"] + counts["tokens_thinking"] == len(dataset.tokens)
    assert counts["tokens_document"] == 2


def test_the_split_is_the_same_in_every_arm_and_follows_the_id(tmp_path: Path) -> None:
    write(tmp_path, some(400))
    manifests = run_preprocess(config(tmp_path, validation_fraction=0.25))
    assert list(manifests) == [f"{arm}/{split}" for arm in ARMS for split in ("train", "validation")]
    rows = {name: pq.read_table(tmp_path / f"out/{name}.documents.parquet").column("id").to_pylist() for name in manifests}
    assert rows["vanilla/validation"] == [f"d{i}" for i in range(400) if in_validation(f"d{i}", 0.25)]
    assert sorted(rows["vanilla/train"] + rows["vanilla/validation"]) == sorted(f"d{i}" for i in range(400))
    assert 60 < len(rows["vanilla/validation"]) < 140
    for arm in ("append", "prepend"):
        assert rows[f"{arm}/train"] == rows["vanilla/train"]
        assert rows[f"{arm}/validation"] == rows["vanilla/validation"]
    assert sum(manifests[f"append/{split}"].counts["documents_without_thoughts"] for split in ("train", "validation")) == 134


def test_batch_size_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(50))
    run_preprocess(config(tmp_path))
    monkeypatch.setattr(runner, "DOCUMENTS_PER_BATCH", 7)
    run_preprocess(config(tmp_path, output=tmp_path / "again"))
    for path in (tmp_path / "out").rglob("train.*"):
        assert (tmp_path / "again" / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes()


def test_finished_arms_are_kept_and_only_missing_or_damaged_ones_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, some(5))
    run_preprocess(config(tmp_path))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    (tmp_path / "out/append/train.manifest.json").unlink()
    (tmp_path / "out/prepend/train.bin").write_bytes(b"damaged")
    made = []
    original = runner._write_arms
    monkeypatch.setattr(runner, "_write_arms", lambda *arguments: made.append(arguments[2]) or original(*arguments))
    assert len(run_preprocess(config(tmp_path))) == 3
    run_preprocess(config(tmp_path))
    assert made == [["append", "prepend"]]
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")} == before


def test_outputs_of_other_settings_or_inputs_are_refused(tmp_path: Path) -> None:
    write(tmp_path, some(5))
    run_preprocess(config(tmp_path))
    for changes in ({"delimiters": {"open": "<t>"}}, {"validation_fraction": 0.5}):
        with pytest.raises(ConfigError, match="other settings; give another output"):
            run_preprocess(config(tmp_path, **changes))
    write(tmp_path, some(6))
    with pytest.raises(ConfigError, match="other inputs; give another output"):
        run_preprocess(config(tmp_path))


def test_delimiters_outside_a_closed_vocabulary_are_refused_before_any_work(tmp_path: Path) -> None:
    write(tmp_path, some(2))
    path = tmp_path / "tokenizer.json"
    train_word_tokenizer(["document thought"], ["<think>"]).save(path)
    with pytest.raises(ConfigError, match=r"delimiters\.close='</think>' is unknown to the tokenizer"):
        run_preprocess(config(tmp_path, tokenizer=str(path)))
    assert not (tmp_path / "out").exists()
    run_preprocess(config(tmp_path, tokenizer=str(path), arms=["vanilla"]))


def test_no_documents_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(DataError, match=r"no document for train \(0 lines read"):
        run_preprocess(config(tmp_path))
    write(tmp_path, [("a", [])])
    with pytest.raises(DataError, match=r"change validation_fraction=0\.5"):
        run_preprocess(config(tmp_path, validation_fraction=0.5))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
