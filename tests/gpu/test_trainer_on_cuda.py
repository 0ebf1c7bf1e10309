"""The trainer's whole way on CUDA: documents apart, parts and resumes of `tpt train`, and exports of what was trained. Real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.exports import loss_of_export, train_and_save
from tests.support.leaks import losses_before_and_after
from tests.support.train_runs import preprocess_corpus, write_train_config

SHAPE = {"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 384, "num_heads": 4, "num_query_groups": 2}
BF16, FP8 = {"precision": "bf16"}, {"precision": "bf16", "fp8": "tensorwise"}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_document_sees_no_other(tmp_path: Path) -> None:
    before, after = losses_before_and_after(tmp_path, "document", **BF16)
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_a_document_sees_no_other_in_fp8(tmp_path: Path) -> None:
    """All tokens of a tensor have one scale, which may move with the largest value of any document: by far less than a leak moves them."""
    model = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 384, "num_heads": 4, "num_query_groups": 2, "vocab_size": 250, "init_std": 0.2}
    moved = {}
    for attention in ("document", "sequence"):
        before, after = losses_before_and_after(tmp_path, attention, **FP8, model=model)
        moved[attention] = [abs(mine - theirs) for mine, theirs in zip(before, after, strict=True)]
    assert all(10 * document < sequence for document, sequence in zip(moved["document"][1:], moved["sequence"][1:], strict=True))


def test_a_sequence_that_is_seen_whole_would_show(tmp_path: Path) -> None:
    before, after = losses_before_and_after(tmp_path, "sequence", **BF16)
    assert all(mine != theirs for mine, theirs in zip(before, after, strict=True))


@pytest.mark.parametrize(("changes", "bound"), [(BF16, 0.02), (FP8, 0.1), (FP8 | {"fp8_parameters": True}, 0.1)], ids=["bf16", "fp8", "fp8 parameters"])
def test_transformers_reads_what_was_trained(tmp_path: Path, changes: dict[str, Any], bound: float) -> None:
    expected = train_and_save(tmp_path, model=SHAPE | {"vocab_size": 201}, **changes)
    loss, _ = loss_of_export(tmp_path)
    assert loss < 4.8, "the model has learnt nothing: agreement would say little"
    assert loss == pytest.approx(expected, abs=bound)


def train(config: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "tpt_megatron.cli", "train", str(config), *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]


def learned(run: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl says of losses, apart from times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "loss" in name or name in ("step", "gradient_norm", "tokens_seen")} for line in lines]


@pytest.mark.parametrize("changes", [BF16, FP8], ids=["bf16", "fp8"])
def test_a_run_of_parts_goes_on_where_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    preprocess_corpus(tmp_path)
    data = {"train": str(tmp_path / "datasets/append/train"), "sequence_length": 64, "loss_weights": {"document": 0.3}}
    fixed = {"model": SHAPE, "data": data, "checkpoint": {"every_steps": 5}, "steps": 10} | changes
    whole = write_train_config(tmp_path / "whole", tmp_path, **fixed)
    train(whole)
    lines = learned(tmp_path / "whole/run")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all({"loss_document", "loss_thinking"} <= set(line) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    halves = write_train_config(tmp_path / "halves", tmp_path, **fixed)
    train(halves, "steps=5")
    train(halves, "steps=10")
    assert learned(tmp_path / "halves/run") == lines
