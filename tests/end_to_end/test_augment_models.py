"""The whole command with a real model on real documents: through a real server that the worker starts itself, and in process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.augment_runs import output_of, run
from tests.support.tiny_model import tiny_model_folder, transformers_serve_command
from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.preprocess.runner import run_preprocess

GSM8K = Path(__file__).resolve().parents[3] / "shared/data/gsm8k/train.jsonl"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K's train.jsonl")]


def augment(folder: Path, documents: int, generator: dict[str, Any], **changes: Any) -> str:
    lines = GSM8K.read_text(encoding="utf-8").splitlines()[:documents]
    (folder / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {"input": str(folder / "in.jsonl"), "output": str(folder / "out"), "fields": {"text": "question"}, "generator": generator} | changes
    (folder / "c.yaml").write_text(json.dumps(values))
    return run(folder / "c.yaml", timeout_s=500)


def check_output(folder: Path, documents: int) -> None:
    """Every document is there as it was; most have a thought, each of which ended, and says where it comes from."""
    outputs = list(output_of(folder / "out"))
    given = [json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()[:documents]]
    assert [augmented.document.text for augmented in outputs] == given
    thoughts = [thought for augmented in outputs for thought in augmented.thoughts]
    assert len(thoughts) > documents // 2
    assert len({thought.text for thought in thoughts}) > documents // 4
    for thought in thoughts:
        assert thought.text
        assert "think>" not in thought.text
        assert (thought.finish_reason, thought.prompt, thought.generator) == ("stop", "expert", "tiny")
        assert thought.prompt_tokens is not None
        assert thought.prompt_tokens > 100
    counts = json.loads((folder / "out/manifest.json").read_text())["counts"]
    assert counts["thoughts"] + counts["rejected_thoughts"] == documents
    prepared = run_preprocess(PreprocessConfig(input=(str(folder / "out"),), output=folder / "data", tokenizer="byte"))
    assert prepared["append/train"].counts["tokens_thinking"] > sum(len(thought.text) for thought in thoughts)
    assert prepared["append/train"].counts["tokens_document"] == prepared["vanilla/train"].counts["tokens_document"]


@pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="needs the packages of transformers' extra `serving`")
def test_a_server_that_the_worker_starts_and_ends(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model_folder(tmp_path_factory)
    (tmp_path / "home/hub").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    generator = {
        "kind": "openai",
        "model": str(model),
        "name": "tiny",
        "tokenizer": str(model),
        "server": {"command": transformers_serve_command(model), "start_timeout_s": 300},
        "sampling": {"max_tokens": 96},
        "concurrency": {"initial": 4, "maximum": 8},
    }
    augment(tmp_path, 20, generator)
    check_output(tmp_path, 20)
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(model) in " ".join(process.info["cmdline"] or ())]


def test_a_model_in_this_process(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_model_folder(tmp_path_factory)
    generator = {"kind": "transformers", "model": str(model), "name": "tiny", "sampling": {"max_tokens": 96}, "device": "cpu"}
    augment(tmp_path, 30, generator)
    check_output(tmp_path, 30)
