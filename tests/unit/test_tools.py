"""The scripts in tools/, as users start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.families import configs, random_model, save_model, tensors_of

ROOT = Path(__file__).parents[2]
SCRIPTS = ["preprocess_data.py", "checkpoint/convert.py", "pretrain_gpt.py"]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help_and_refuses_what_has_no_place_in_one_line(script: str, tmp_path: Path) -> None:
    ended = run(script, "--help")
    assert ended.returncode == 0
    assert "usage:" in ended.stdout.lower()
    given = {
        "preprocess_data.py": ["--input", "a", "--output-prefix", "b", "--tokenizer-model", "byte", "--append-eod"],
        "checkpoint/convert.py": ["--load-dir", tmp_path, "--save-dir", tmp_path / "out"],
        "pretrain_gpt.py": ["config.yaml"],
    }
    ended = run(script, *given[script], "--num-layers", "12")
    assert ended.returncode == 2
    assert "No such option: --num-layers" in ended.stderr


def test_documents_become_a_dataset_over_two_processes(tmp_path: Path) -> None:
    texts = ["one document", "and another one"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"body": text}) + "\n")
    words = ["--output-prefix", tmp_path / "data", "--tokenizer-model", "byte", "--append-eod", "--json-keys", "body", "--workers", 2]
    ended = run("preprocess_data.py", "--input", tmp_path / "0.jsonl", tmp_path / "1.jsonl", *words, "piece_megabytes=0.00001")
    assert ended.returncode == 0, ended.stderr
    counts = json.loads((tmp_path / "data" / "vanilla" / "train.manifest.json").read_text())["counts"]
    assert counts["tokens"] == sum(len(text) + 1 for text in texts)


def test_a_model_is_imported_and_exported(tmp_path: Path) -> None:
    source = save_model(random_model(configs()["llama"]), tmp_path / "source")
    for origin, target in (("source", "checkpoints"), ("checkpoints", "model")):
        ended = run("checkpoint/convert.py", "--load-dir", tmp_path / origin, "--save-dir", tmp_path / target)
        assert ended.returncode == 0, ended.stderr
    found = tensors_of(tmp_path / "model")
    assert all(tensor.equal(found[name]) for name, tensor in tensors_of(source).items())


def test_training_takes_a_config_that_is_checked(tmp_path: Path) -> None:
    ended = run("pretrain_gpt.py", "demo-train", f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'nothing'}", "validate_every_steps=0")
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("tpt: ")
    assert "nothing" in ended.stderr
