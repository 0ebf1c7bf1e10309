"""What a run writes down of itself: losses by source, growing batches, its trace, and the documents of steps that were not learned from."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.metrics import learned
from tests.support.ranks import WarmRanks
from tpt_megatron.config.load import load_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.train.data import RunData, open_run_data

STEPS = 9
BATCHES = [2, 2, 2, 4, 4, 6, 6, 6, 6]
"""48 tokens at each of the sizes 2 and 4, in whole steps of 8 tokens a sequence, and then the full batch."""


def preprocess(root: Path, documents: list[dict[str, Any]], arm: str) -> str:
    """Return the prefix of a byte-level dataset."""
    (root / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (root / "preprocess.yaml").write_text(f"input: {root}/documents.jsonl\noutput: {root}/datasets\ntokenizer: byte\narms: [{arm}]\n")
    subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(root / "preprocess.yaml")], check=True, capture_output=True)
    return f"{root}/datasets/{arm}/train"


def write_config(folder: Path, data: dict[str, Any], **changes: Any) -> Path:
    config = {
        "run_dir": str(folder / "run"),
        "model": {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 2, "num_query_groups": 2},
        "data": data,
        "optimizer": {"learning_rate": 1e-3},
        **changes,
    }
    (folder / "train.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / "train.yaml"


def open_data(config: Path) -> RunData:
    return open_run_data(load_config(TrainConfig, str(config)))


@pytest.fixture(scope="module")
def ramped(tmp_path_factory: pytest.TempPathFactory, warm_ranks: WarmRanks) -> Path:
    """A run over documents of two sources, with batches that grow, two of whose steps are traced."""
    folder = tmp_path_factory.mktemp("ramped")
    documents = [
        {"text": f"{i} is a number", "source": ("web", "math")[i % 3 == 0], "thoughts": [{"text": f"think {i}", "generator": "g"}]} for i in range(100)
    ]
    config = write_config(
        folder,
        {"train": preprocess(folder, documents, "append"), "sequence_length": 8},
        steps=STEPS,
        global_batch_sequences=6,
        batch_ramp={"start_sequences": 2, "increment_sequences": 2, "tokens": 96},
        checkpoint={"every_steps": 4},
        watch={"profile": {"first_step": 3, "steps": 2}},
    )
    ended = warm_ranks.run("train", str(config))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def test_batches_grow_as_the_config_says_and_a_resume_among_them_is_exact(ramped: Path, warm_ranks: WarmRanks) -> None:
    lines = learned(ramped / "run")
    assert [line["first_sequence"] for line in lines] == [sum(BATCHES[:step]) for step in range(STEPS)]
    assert [line["tokens_seen"] for line in lines] == [8 * sum(BATCHES[: step + 1]) for step in range(STEPS)]
    (ramped / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("4\n")  # between the two steps of 4 sequences
    ended = warm_ranks.run("train", str(ramped / "train.yaml"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "continuing after step 4" in ended.stderr
    assert learned(ramped / "run") == lines


def test_losses_by_source_and_by_part_add_up_to_the_loss(ramped: Path) -> None:
    data = open_data(ramped / "train.yaml")
    for line, batch in zip(learned(ramped / "run"), BATCHES, strict=True):
        kinds = data.train.micro_batch(range(line["first_sequence"], line["first_sequence"] + batch)).kinds
        tokens = dict.fromkeys(("web", "math", "document", "thinking"), 0)
        for number, (source, part) in enumerate(data.kinds.table):
            for name in (source, part):
                if name in tokens:
                    tokens[name] += int((kinds == number).sum())
        assert set(line["loss_by_source"]) == {name for name in ("web", "math") if tokens[name]}
        by_source = sum(loss * tokens[source] for source, loss in line["loss_by_source"].items())
        by_part = sum(line[f"loss_{part}"] * tokens[part] for part in ("document", "thinking") if tokens[part])
        assert by_source / (8 * batch) == pytest.approx(line["loss"], rel=1e-6)
        assert by_part / (8 * batch) == pytest.approx(line["loss"], rel=1e-6)
    assert any(len(line["loss_by_source"]) == 2 for line in learned(ramped / "run"))


def test_the_trace_is_json_and_has_the_steps_that_were_asked_for(ramped: Path) -> None:
    with gzip.open(ramped / "run/profile/rank-00000.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"]: event for event in events if str(event.get("name")).startswith("step ")}
    assert sorted(steps) == ["step 3", "step 4"]
    for step in steps.values():
        inside = [event for event in events if event.get("name") == "aten::mm" and step["ts"] <= event["ts"] < step["ts"] + step["dur"]]
        assert len(inside) > 10  # matrix products


USUAL, ODD = 400, 2


def test_skipped_steps_name_the_documents_that_they_saw_when_these_are_packed_whole(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    letters = random.Random(1)
    texts = ["abababab" * letters.randint(6, 8) for _ in range(USUAL)] + ["".join(map(chr, letters.choices(range(33, 127), k=60))) for _ in range(ODD)]
    prefix = preprocess(tmp_path, [{"text": text, "thoughts": []} for text in texts], "vanilla")
    config = write_config(
        tmp_path,
        {"train": prefix, "sequence_length": 140, "packing": "best_fit"},
        model={"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2},
        steps=150,
        global_batch_sequences=4,
        faults={"spike_factor": 4},
        optimizer={"learning_rate": 3e-3},
    )
    ended = warm_ranks.run("train", str(config))
    assert ended.returncode == 0, ended.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert records, "nothing was skipped: nothing was tested"
    data = open_data(config)
    dataset = data.datasets[prefix]
    for record in records:
        assert record["sequences"] == [4 * (record["step"] - 1), 4 * record["step"]]
        assert any(seen["document"] >= USUAL for seen in record["documents"])
        batch = data.train.micro_batch(range(*record["sequences"]))
        for row, number in enumerate(range(*record["sequences"])):
            sequence = np.append(batch.tokens[row], batch.labels[row, -1])
            documents = [seen for seen in record["documents"] if seen["sequence"] == number]
            named = np.concatenate([dataset.tokens[dataset.begin(seen["document"]) :][: dataset.lengths[seen["document"]]] for seen in documents])
            np.testing.assert_array_equal(sequence[: len(named)], named)  # whole documents, in their order
            padding = sequence[len(named) :]
            assert set(padding) <= {dataset.details["eod_id"]}
            assert len(padding) == (batch.kinds[row] == data.kinds.padding).sum()
