"""docs/paper.md from raw documents to the exported model: its own commands, on a CPU, with little of everything."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

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


def commands() -> list[list[str]]:
    """The page's commands, in order: lines that are indented by four."""
    lines = re.findall(r"^    (tpt .+)$", (ROOT / "docs/paper.md").read_text(), re.MULTILINE)
    return [shlex.split(line.replace("104857600000", str(TOKENS))) for line in lines]


def made_smaller(command: list[str], url: str) -> list[str]:
    """A command with what a CPU and a test need otherwise."""
    if command[1] == "augment":
        return [*command, f"generator.base_urls={url}", "generator.model=scripted"]
    if command[1] == "preprocess":
        return [*command, "validation_fraction=0.1"]
    if command[1] in ("plan", "experiment"):
        command = ["4" if word == "64" else word for word in command]  # as many GPUs as the batch has sequences
        epochs = [f"arms.{arm}.max_epochs=50" for arm in ("vanilla", "append")]
        return [*command, f"tokens={TOKENS}", "checkpoints=2", "ranks=1", f"override={json.dumps(OVERRIDE)}", f"evaluate_with={json.dumps(ASKED)}", *epochs]
    return command


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
    special = ["<|end_of_text|>", "<think>", "</think>"]
    tokenizer.train_from_iterator(questions, BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False))
    for name in ("Qwen3-8B", "Llama-3-8B"):
        (folder / "models" / name).mkdir(parents=True)
        tokenizer.save(str(folder / "models" / name / "tokenizer.json"))
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks/gsm8k").symlink_to(GSM8K)


def test_the_walk_of_docs_paper_ends_in_a_report_and_a_model(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    listed = commands()
    assert [command[1] for command in listed] == ["augment", "preprocess", "inspect", "plan", "experiment", "experiment", "convert"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "HF_HUB_OFFLINE": "1"}
    said = {}
    with running_server() as server:
        for command in listed:
            smaller = made_smaller(command, server.url)
            done = subprocess.run(
                [sys.executable, "-m", "tpt_megatron.cli", *smaller[1:]],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=900,
            )
            assert done.returncode == 0, (smaller, done.stdout[-2000:], done.stderr[-3000:])
            said[command[1]] = done.stdout
    assert "60 documents" in said["augment"] and "runs of experiments/paper-abundant-8b" in said["plan"]
    output = tmp_path / "experiments/paper-abundant-8b"
    report = json.loads((output / "report-tokens/report.json").read_text())
    assert list(report["arms"]) == ["vanilla", "append"] and list(report["tasks"]) == ["gsm8k"]
    assert (output / "report-tokens/report.html").is_file()
    config = json.loads((tmp_path / "models/append/config.json").read_text())
    assert config["num_hidden_layers"] == 2 and (tmp_path / "models/append/tokenizer.json").is_file()
