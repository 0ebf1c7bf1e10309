"""The guides' own commands: docs/your-corpus.md and docs/when-things-go-wrong.md, one after the other, in a folder that has what they name."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from tests.support.scripted_server import running_server

DOCS = Path(__file__).resolve().parents[2] / "docs"
TRAIN = {
    "run_dir": "runs/append",
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2},
    "data": {"train": "data/append/train", "sequence_length": 64},
    "optimizer": {"learning_rate": 1e-3},
    "checkpoint": {"every_steps": 3},
    "steps": 6,
    "global_batch_sequences": 8,
}

pytestmark = pytest.mark.slow


def take(page: str, folder: Path) -> dict[str, str]:
    """Take a page's commands, lines that are indented by four, in a folder; return what each printed."""
    said = {}
    for line in re.findall(r"^    (tpt .+)$", (DOCS / page).read_text(), re.MULTILINE):
        few = ["validation_fraction=0.1"] if line.startswith("tpt preprocess") else []  # of forty documents
        said[line] = tpt(folder, *shlex.split(line)[1:], *few)
    return said


def tpt(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent), "COLUMNS": "160"}
    command = [sys.executable, "-m", "tpt_megatron.cli", *words]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, (words, ended.stdout[-1000:], ended.stderr[-3000:])
    return ended.stdout


def make_corpus(folder: Path) -> None:
    """Forty documents in two files, and a tokenizer that was trained on them."""
    texts = [f"Document {i} tells of {i % 7} rivers, {i % 5} hills and {i % 3} roads. It was written in the year {1900 + i}." for i in range(40)]
    (folder / "corpus").mkdir()
    for part in range(2):
        lines = (json.dumps({"id": f"d{i}", "text": texts[i], "source": "atlas"}) + "\n" for i in range(20 * part, 20 * part + 20))
        (folder / f"corpus/{part}.jsonl").write_text("".join(lines))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<think>", "</think>"]
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    (folder / "models/Qwen3-8B").mkdir(parents=True)
    tokenizer.save(str(folder / "models/Qwen3-8B/tokenizer.json"))


def test_a_corpus_becomes_datasets(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    (config,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "your-corpus.md").read_text(), re.DOTALL)
    values = yaml.safe_load(config)
    with running_server() as server:
        values["generator"] |= {"base_urls": server.url, "model": "scripted"}
        (tmp_path / "augment.yaml").write_text(yaml.safe_dump(values))
        said = take("your-corpus.md", tmp_path)
    assert len(said) == 8
    assert "40" in said["tpt inspect corpus"]
    assert "GPU-hours" in said["tpt augment augment.yaml --estimate"]
    assert (tmp_path / "augmented/sample/sample.html").is_file() and (tmp_path / "augmented/report.html").is_file()
    assert "finding" not in said["tpt inspect data --verify"] and "ok" in said["tpt inspect data --verify"]


def test_what_went_wrong_is_found(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    worked = {"input": "corpus", "output": "data", "tokenizer": "models/Qwen3-8B", "arms": ["append"]}
    (tmp_path / "preprocess.yaml").write_text(yaml.safe_dump(worked))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    tpt(tmp_path, "preprocess", "preprocess.yaml")
    tpt(tmp_path, "train", "train.yaml")
    said = take("when-things-go-wrong.md", tmp_path)
    assert len(said) == 8
    assert "DP8" in said["tpt plan train.yaml --world-size 8"]
    assert "layouts for 8 x H100" in said["tpt plan train.yaml --world-size 8 --search"]
    assert "step 3: sequences 16 to 23" in said["tpt inspect runs/append --step 3"] and "atlas" in said["tpt inspect runs/append --step 3"]
    assert said["tpt inspect runs/append --verify"] == "iter_0000003: ok\niter_0000006: ok\n"
    assert "verified: " in said["tpt convert export runs/append models/append --verify"]
