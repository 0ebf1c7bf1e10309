"""GSM8K, 5-shot, by `tpt evaluate` through lm-eval, as a user gives it: from a run's checkpoints, without a network, killed and continued."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval")

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "convert"))
from torch_dist import checkpoint_state, tiny_model, write_checkpoint
from transformers import LlamaConfig

from tests.support.chain_models import EOD, guesser, make_tokenizer
from tpt_megatron.evaluate.benchmarks.extraction import number
from tpt_megatron.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
ASKED, BATCH = 38, 4
STEPS = (100, 200)
WORDS = ("####", " 18", " 7", " 2", " 3", "\nQuestion:", "<think>", "</think>", " so", ".", " The answer is")

WITHOUT_NETWORK = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(sys.argv[0], "a") as file:
            print(event, arguments[1:], file=file)
        raise ConnectionRefusedError("there is no network here")

sys.argv.pop(0)
sys.addaudithook(watch)
from tpt_megatron.cli import main

main()
"""
"""Runs `tpt`. What asks for the network is refused, and written down in the file that the first argument names."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints that guess numbers, and think sometimes: what they say depends on all that they read."""
    if not (GSM8K / "test.jsonl").is_file():
        assert not os.environ.get("CI"), f"{GSM8K} is missing: CI must run this test"
        pytest.skip(f"needs GSM8K at {GSM8K}")
    run = tmp_path_factory.mktemp("gsm8k-benchmark") / "run"
    questions = [json.loads(line)["question"] for line in (GSM8K / "train.jsonl").read_text().splitlines()[:300]]
    tokenizer = make_tokenizer(WORDS, questions)
    size = tokenizer.get_vocab_size()
    shape = tiny_model(num_layers=2, vocab_size=size)
    for step in STEPS:
        config = LlamaConfig(
            **{"vocab_size": size, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12},
            **{"num_key_value_heads": 2, "rms_norm_eps": 3e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5_000.0}},
        )
        state = checkpoint_state(guesser(tokenizer, WORDS, config, seed=step), shape, padded_vocab=128 * (size // 128 + 1))
        folder = write_checkpoint(run, shape, state, step=step, sequence_length=4096)
        tokenizer.save(str(folder / "tokenizer.json"))
        made = load_tokenizer(str(folder / "tokenizer.json"), EOD)
        about = json.loads((folder / "tpt.json").read_text())
        about["tokenizer"] = {"fingerprint": made.fingerprint, "end_of_document": EOD, "eod_id": made.eod_id, "vocabulary_size": made.vocabulary_size}
        (folder / "tpt.json").write_text(json.dumps(about))
    return run


def start(run_dir: Path, output: Path) -> subprocess.Popen[str]:
    """Start `tpt evaluate`, away from any network."""
    benchmark = {"name": "gsm8k", "data": str(GSM8K / "test.jsonl"), "shots": str(GSM8K / "train.jsonl"), "limit": ASKED, "max_new_tokens": 24}
    output.mkdir(exist_ok=True)
    config = {"run_dir": str(run_dir), "output": str(output / "results"), "benchmarks": [benchmark], "batch_size": BATCH}
    (output / "evaluate.yaml").write_text(yaml.safe_dump(config))
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "HTTP", "HTTPS")}
    environment = {**os.environ, **nowhere, "HF_HOME": str(output / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_NETWORK, str(output / "network"), "evaluate", str(output / "evaluate.yaml")]
    with open(output / "stderr", "a") as stderr:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


def finish(process: subprocess.Popen[str], output: Path, code: int = 0) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, (output / "stderr").read_text()[-3000:]
    assert "Traceback" not in (output / "stderr").read_text()
    assert not (output / "network").exists(), f"it asked for the network: {(output / 'network').read_text()}"
    return said


def journal(output: Path, step: int) -> Path:
    return output / "results" / "journal" / f"iter_{step:07d}" / "gsm8k.jsonl"


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def stop_when(process: subprocess.Popen[str], path: Path, lines: int, number: signal.Signals) -> None:
    """Send a signal as soon as a journal has so many lines."""
    for _ in range(60_000):
        if lines_of(path) >= lines or process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(number)


def results_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "results").iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def unbroken(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("unbroken")
    return output, finish(start(run_dir, output), output)


def test_every_checkpoint_is_scored_through_lm_eval(unbroken: tuple[Path, str]) -> None:
    output, said = unbroken
    names = {f"iter_{step:07d}{ending}" for step in STEPS for ending in (".json", ".samples.jsonl")}
    assert {path.name for path in (output / "results").iterdir()} == {*names, "journal"}
    assert [line.split("  ")[0] for line in said.splitlines()] == [f"step {step} ({step * 1000:,} tokens)" for step in STEPS]
    problems = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text().splitlines()[:ASKED]]
    for step in STEPS:
        result: dict[str, Any] = json.loads((output / f"results/iter_{step:07d}.json").read_text())
        samples = [json.loads(line) for line in (output / f"results/iter_{step:07d}.samples.jsonl").read_text().splitlines()]
        found = result["tasks"]["gsm8k"]
        assert found["problems"] == len(samples) == ASKED
        for problem, sample in zip(problems, samples, strict=True):
            assert sample["prompt"].endswith(f"\n\nQuestion: {problem['question'].strip()}\nAnswer:")
            assert sample["prompt"].count("The answer is") == 5
            assert "<<" not in sample["prompt"]
            assert sample["answer"] == problem["answer"].rpartition("#### ")[2].replace(",", "")
            assert sample["extracted"] == number(sample["continuation"])
            assert sample["correct"] == (sample["extracted"] == sample["answer"])
        assert found["correct"] == sum(sample["correct"] for sample in samples)
        assert found["accuracy"] == found["metrics"]["gsm8k/accuracy,none"] == found["correct"] / ASKED
        assert found["failed_extractions"] == sum(sample["extracted"] is None for sample in samples)
        assert (found["cut_prompts"], result["step"], result["tokens_seen"]) == (0, step, step * 1000)
        assert len({sample["continuation"] for sample in samples}) > ASKED // 4, "hardly any choice was made: what follows would say little"
        assert lines_of(journal(output, step)) == -(-ASKED // BATCH)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 3)])
def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(
    run_dir: Path, unbroken: tuple[Path, str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    first, second = STEPS
    process = start(run_dir, tmp_path)
    stop_when(process, journal(tmp_path, first), 2, number)
    finish(process, tmp_path, code)
    before = journal(tmp_path, first).read_bytes()
    assert 2 <= before.count(b"\n") < -(-ASKED // BATCH), "it was to be stopped in the middle"
    assert results_of(tmp_path) == {}
    if number == signal.SIGKILL:  # torn, as a machine that goes down leaves it
        journal(tmp_path, first).write_bytes(before + b'{"answers": {"')
        assert list((tmp_path / "results").glob(".model.*")), "what was exported is still there"
    else:
        assert not list((tmp_path / "results").glob(".model.*"))
        assert (tmp_path / "stderr").read_text().rstrip().endswith("what was finished is kept, run the same command again to continue")

    said = finish(start(run_dir, tmp_path), tmp_path)
    assert said == unbroken[1]
    assert results_of(tmp_path) == results_of(unbroken[0])
    assert not list((tmp_path / "results").glob(".model.*"))
    assert journal(tmp_path, first).read_bytes().startswith(before), "what was answered stays"
    for step in (first, second):  # no request was asked twice, and each in the batch in which it would have been
        assert journal(tmp_path, step).read_bytes() == journal(unbroken[0], step).read_bytes()
