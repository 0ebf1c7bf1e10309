"""`tpt experiment` on two tiny arms: stopped by a signal while it trains, continued by the same command, compared at equal tokens and documents."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.support.train_runs import preprocess_corpus

TPT = [sys.executable, "-m", "tpt_megatron.cli"]
EVALUATION = {"tasks": {"modulo": {"prompt": "{question}", "answer_pattern": "is ([0-9])", "max_new_tokens": 8}}, "batch_size": 4}


def test_a_stopped_experiment_goes_on_and_compares_what_matches(tmp_path: Path) -> None:
    preprocess_corpus(tmp_path)
    preprocess = ["preprocess", str(tmp_path / "datasets.yaml"), f"output={tmp_path / 'both'}", "arms=[vanilla, append]", "validation_fraction=0.1"]
    subprocess.run([*TPT, *preprocess], check=True, capture_output=True)
    training = {
        "run_dir": "given",
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_heads": 4, "num_query_groups": 2},
        "data": {"train": "given", "sequence_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "steps": 1,
        "global_batch_sequences": 4,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(EVALUATION))
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps({"question": f"document {i} says", "answer": str(i % 7)}) + "\n" for i in range(4)))
    arms = {
        arm: {**{split: str(tmp_path / "both" / arm / split) for split in ("train", "validation")}, "evaluate": str(tmp_path / "evaluate.yaml")}
        for arm in ("vanilla", "append")
    }
    values = {
        "output": str(tmp_path / "out"),
        "train": str(tmp_path / "train.yaml"),
        "arms": arms,
        "tokens": 40 * 256,
        "checkpoints": 4,
        "match": ["tokens", "documents"],
        "evaluate_with": {"problems": str(tmp_path / "problems.jsonl")},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(values))
    command = [*TPT, "experiment", str(tmp_path / "experiment.yaml")]

    metrics = tmp_path / f"out/runs/vanilla-{40 * 256}-seed1/metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        while not metrics.exists() or not metrics.read_text():
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        out, err = first.communicate(timeout=60)
    assert first.returncode == 3, err[-3000:]
    assert "3 runs of" in out
    stopped_after = len(metrics.read_text().splitlines())
    assert stopped_after < 40, "it was not stopped within its first run: nothing was tested"

    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"continuing after step {stopped_after}" in again.stderr
    longer = json.loads((tmp_path / "out/plan.json").read_text())["arms"][-1]
    assert (longer["match"], longer["arm"]) == ("documents", "append")
    assert longer["tokens"] > 40 * 256
    for match, tokens in (("tokens", 40 * 256), ("documents", longer["tokens"])):
        report = json.loads((tmp_path / f"out/report-{match}/report.json").read_text())
        assert [folder.rsplit("/", 1)[1] for arm in report["arms"].values() for folder in arm["runs"]] == [
            f"vanilla-{40 * 256}-seed1",
            f"append-{tokens}-seed1",
        ]
        assert report["tasks"]["modulo"]["append"]["tokens"] == tokens

    third = subprocess.run([*command, "evaluate_with={problems: nowhere.jsonl}"], capture_output=True, text=True, check=False, timeout=300)
    assert third.returncode == 1
    assert "Traceback" not in third.stderr
    assert third.stderr.splitlines()[-1].startswith("tpt: `tpt evaluate ")
    assert "nowhere.jsonl" in third.stderr.splitlines()[-2]
