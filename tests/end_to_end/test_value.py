"""From augmented documents to a dataset of the thoughts that help, by the commands that a user types; and the model may be a run's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.support.byte_model import make_byte_model
from tests.support.ranks import WarmRanks
from tests.support.train_runs import preprocess_corpus, write_train_config
from tpt_megatron.datasets import PART_THINKING, open_dataset
from tpt_megatron.record_files import expand_inputs, read_rows
from tpt_megatron.tokenizer import load_tokenizer

LEAST = 0.002


def write_config(path: Path, **values: object) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_the_dataset_holds_exactly_the_thoughts_that_help(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    """Thoughts that end as the target begins, before a model that looks at the last byte: some help, some do harm."""
    model = make_byte_model(tmp_path / "model", is_bigram=True)
    with open(tmp_path / "augmented.jsonl", "w") as file:
        for number in range(30):
            text = f"{chr(97 + number % 26)}{chr(97 + 7 * number % 26)} ends here"
            thoughts = [{"text": f"thought {number}.{i}", "generator": "g", "seen_end": 1 + i} for i in range(2)]
            file.write(json.dumps({"id": f"d{number}", "text": text, "source": f"s{number % 2}", "thoughts": thoughts}) + "\n")
    values = write_config(tmp_path / "value.yaml", input=str(tmp_path / "augmented.jsonl"), output=str(tmp_path / "valued"), model=str(model))
    ended = warm_ranks.run("value", values)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "30 documents with scores at their thoughts" in ended.stdout
    assert "that help" in ended.stdout
    scores = {
        thought["text"]: thought["value"]["nats_per_token"]
        for place in expand_inputs((str(tmp_path / "valued"),))
        for row in read_rows(place)
        for thought in row.parse()["thoughts"]
    }
    helping = {text for text, score in scores.items() if score >= LEAST}
    assert 10 < len(helping) < 50
    preprocess = write_config(
        tmp_path / "preprocess.yaml",
        input=str(tmp_path / "valued"),
        output=str(tmp_path / "data"),
        tokenizer="byte",
        arms=["append"],
        thoughts="samples",
        keep_thoughts={"score": "value.nats_per_token", "min": LEAST, "without_thoughts": "drop"},
    )
    ended = warm_ranks.run("preprocess", preprocess)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert f"60 thoughts read, {len(helping)} thoughts kept, {60 - len(helping)} thoughts below min" in ended.stdout
    dataset, tokenizer = open_dataset(tmp_path / "data/append/train"), load_tokenizer("byte", "<|endoftext|>")
    assert dataset.parts is not None
    found = set()
    for begin, end in zip(dataset.offsets[:-1].tolist(), dataset.offsets[1:].tolist(), strict=True):
        thinking = dataset.tokens[begin:end][dataset.parts[begin:end] == PART_THINKING].tolist()
        found.add(tokenizer.decode(thinking).removeprefix("\n<think>\n").removesuffix("\n</think>"))
    assert found == helping
    ids = pq.read_table(tmp_path / "data/append/train.documents.parquet")["id"].to_pylist()
    assert set(ids) == {f"d{text.split()[1].split('.')[0]}" for text in helping}


def test_the_model_may_be_a_run(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    preprocess_corpus(tmp_path)
    ended = warm_ranks.run(
        "train", str(write_train_config(tmp_path / "one", tmp_path, steps=3, data={"train": str(tmp_path / "datasets/append/train"), "sequence_length": 256}))
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    given = {"input": str(tmp_path / "datasets.jsonl"), "output": str(tmp_path / "out"), "model": str(tmp_path / "one/run"), "target": "document"}
    summaries = []
    for changes in ({}, {"output": str(tmp_path / "other"), "delimiters": {"open": "<thought>"}}):
        ended = warm_ranks.run("value", write_config(tmp_path / "value.yaml", **{**given, **changes}))
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert ("was trained on" in ended.stderr and "<thought>" in ended.stderr) == bool(changes)
        summaries.append(json.loads((Path(str({**given, **changes}["output"])) / "summary.json").read_text()))
        assert not list(tmp_path.rglob(".scratch*"))
    assert summaries[0]["counts"]["thoughts_with_value"] == 400
    assert summaries[0]["settings"]["model"] == summaries[1]["settings"]["model"]
    assert summaries[0]["all"] != summaries[1]["all"]
    ended = warm_ranks.run("value", write_config(tmp_path / "value.yaml", **given))  # exported anew, it is the same model
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "1 of 1 shards were finished before, kept" in ended.stderr


@pytest.mark.parametrize(
    ("key", "says"), [("target=answer", "target=answer needs answer.field"), ("modell=x", "unknown key 'modell'"), ("shard=0/2", "must be NUMBER/COUNT")]
)
def test_a_wrong_config_is_one_line(tmp_path: Path, warm_ranks: WarmRanks, key: str, says: str) -> None:
    ended = warm_ranks.run("value", write_config(tmp_path / "value.yaml", input="in", output="out", model="model"), key)
    assert ended.returncode == 2
    assert says in ended.stderr.splitlines()[-1]
