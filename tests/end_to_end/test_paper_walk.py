"""docs/paper.md and docs/mid-training.md, from raw documents to the exported model: their own commands, on a CPU, with little of everything."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Config

from tests.support.families import random_model
from tests.support.scripted_server import running_server

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT.parent / "shared/data/gsm8k"
TOKENS = 8 * 4 * 128
MODEL = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2}
OVERRIDE = {
    "model": MODEL,
    "parallel": {},
    "precision": "fp32",
    "data.sequence_length": 128,
    "global_batch_sequences": 4,
    "optimizer.warmup_steps": 2,
    "checkpoint.asynchronous": False,
}
ASKED = {
    "benchmarks": [{"name": "gsm8k", "data": "benchmarks/gsm8k/test.jsonl", "shots": "benchmarks/gsm8k/train.jsonl", "limit": 2}],
    "benchmark_options.max_new_tokens": 8,
    "dtype": "float32",
}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not GSM8K.is_dir(), reason="needs GSM8K")]


def commands(page: str) -> list[list[str]]:
    """A page's commands, in order: lines that are indented by four."""
    lines = re.findall(r"^    (tpt .+)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    return [shlex.split(line.replace("104857600000", str(TOKENS))) for line in lines]


def made_smaller(command: list[str], url: str, override: dict[str, Any]) -> list[str]:
    """A command with what a CPU and a test need otherwise."""
    if command[1] == "augment":
        return [*command, f"generator.base_urls={url}", "generator.model=scripted"]
    if command[1] == "preprocess":
        return [*command, "validation_fraction=0.1"]
    if command[1] in ("plan", "experiment"):
        command = ["4" if word == "64" else word for word in command]  # as many GPUs as the batch has sequences
        epochs = [f"arms.{arm}.max_epochs=50" for arm in ("vanilla", "append")]
        return [*command, f"tokens={TOKENS}", "checkpoints=2", "ranks=1", f"override={json.dumps(override)}", f"evaluate_with={json.dumps(ASKED)}", *epochs]
    return command


def walk(page: str, folder: Path, override: dict[str, Any]) -> dict[str, str]:
    """Take a page's commands in a folder, and return what each printed, the last one of a name."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    said = {}
    with running_server() as server:
        for command in commands(page):
            smaller = [sys.executable, "-m", "tpt_megatron.cli", *made_smaller(command, server.url, override)[1:]]
            done = subprocess.run(smaller, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900)
            assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
            said[command[1]] = done.stdout
    return said


def make_inputs(folder: Path) -> None:
    """Raw documents of both kinds with the fields that they come with, the models' tokenizers, and GSM8K."""
    questions = [json.loads(line)["question"] for line in (GSM8K / "train.jsonl").read_text().splitlines()[:60]]
    (folder / "raw/fineweb-edu").mkdir(parents=True)
    (folder / "raw/megamath").mkdir()
    fineweb = [
        {
            "text": f"Lesson {i}. {text}",
            "id": f"<urn:uuid:{i}>",
            "dump": "CC-MAIN-2024-10",
            "url": f"https://example.org/{i}",
            "language_score": 0.97,
            "score": 3.2,
            "int_score": 3,
        }
        for i, text in enumerate(questions[:30])
    ]
    pq.write_table(pa.Table.from_pylist(fineweb), folder / "raw/fineweb-edu/000_00000.parquet")
    (folder / "raw/megamath/part-0.jsonl").write_text(
        "".join(json.dumps({"text": text, "url": "https://example.org", "math_score": 0.9}) + "\n" for text in questions[30:])
    )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<|end_of_text|>", "<|endoftext|>", "<think>", "</think>"]
    tokenizer.train_from_iterator(questions, BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    for name in ("Qwen3-8B", "Llama-3-8B", "DeepSeek-R1-Distill-Qwen-7B", "Qwen2.5-Math-1.5B"):
        (folder / "models" / name).mkdir(parents=True)
        tokenizer.save(str(folder / "models" / name / "tokenizer.json"))
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks/gsm8k").symlink_to(GSM8K)


def check_report(output: Path) -> None:
    report = json.loads((output / "report-tokens/report.json").read_text())
    assert list(report["arms"]) == ["vanilla", "append"] and list(report["tasks"]) == ["gsm8k"]
    assert (output / "report-tokens/report.html").is_file()


def test_the_walk_of_docs_paper_ends_in_a_report_and_a_model(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    assert [command[1] for command in commands("paper.md")] == ["augment", "preprocess", "inspect", "plan", "experiment", "experiment", "convert"]
    said = walk("paper.md", tmp_path, OVERRIDE)
    assert "60 documents" in said["augment"] and "runs of experiments/paper-abundant-8b" in said["plan"]
    check_report(tmp_path / "experiments/paper-abundant-8b")
    config = json.loads((tmp_path / "models/append/config.json").read_text())
    assert config["num_hidden_layers"] == 2 and (tmp_path / "models/append/tokenizer.json").is_file()


def test_mid_training_starts_from_released_weights_and_ends_as_a_model_of_their_family(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    released = tmp_path / "models/Qwen2.5-Math-1.5B"
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    config = Qwen2Config(**shape, tie_word_embeddings=True, rms_norm_eps=1e-6, max_position_embeddings=4096, eos_token_id=1, bos_token_id=1)
    random_model(config).save_pretrained(released)
    (released / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    model = MODEL | {"qkv_bias": True, "tie_embeddings": True, "norm_epsilon": 1e-6, "vocab_size": 400}
    listed = [command[1:3] for command in commands("mid-training.md")]
    assert [name for name, _ in listed] == ["convert", "augment", "preprocess", "plan", "experiment", "convert"]
    said = walk("mid-training.md", tmp_path, OVERRIDE | {"model": model, "checkpoint.load_from": "checkpoints/released", "optimizer.learning_rate": 1e-3})
    output = tmp_path / "experiments/paper-midtrain-1.5b-arms"
    check_report(output)
    assert "verified: " in said["convert"]
    first = json.loads((output / f"runs/append-{TOKENS}-seed1/metrics.jsonl").read_text().splitlines()[0])
    unlike = torch.tensor(400.0).log().item()
    assert first["loss"] > unlike + 0.2, "random weights of this size are surer than fresh ones, and wrong: the run did not start from them"
    made, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "models/append", released))
    assert {key: made[key] for key in ("model_type", "vocab_size", "tie_word_embeddings", "max_position_embeddings")} == {
        key: given[key] for key in ("model_type", "vocab_size", "tie_word_embeddings", "max_position_embeddings")
    }
