"""A real run, the losses of its documents, and a report that holds how long their thoughts are against how hard they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.support.ranks import WarmRanks
from tests.support.train_runs import preprocess_corpus, write_train_config


def test_losses_and_fields_are_held_against_thinking(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    preprocess_corpus(tmp_path)
    ended = warm_ranks.run("train", str(write_train_config(tmp_path / "one", tmp_path, steps=3)))
    assert ended.returncode == 0, ended.stderr[-3000:]
    losses = {
        "models": {"base": str(tmp_path / "one/run")},
        "reference": "base",
        "data": str(tmp_path / "datasets/append/train"),
        "documents": 0,
        "output": str(tmp_path / "losses"),
    }
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump(losses))
    assert warm_ranks.run("losses", str(tmp_path / "losses.yaml")).returncode == 0
    ended = warm_ranks.run("compare", str(tmp_path / "one/run"), "--output", str(tmp_path / "report"), "--difficulty", str(tmp_path / "losses"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    thinking = json.loads((tmp_path / "report/report.json").read_text())["thinking"]
    arm = thinking["arms"]["append"]
    # A thought of `i mod 7 is d` is 11 bytes and the digits of i, in delimiters of 18.
    digits = [len(str(i)) for i in range(400)]
    assert arm["all"]["tokens_thinking"] == sum(11 + 18 + count for count in digits)
    assert arm["all"]["tokens_document"] == sum(len(f"document {i} says {i % 7}") + 1 for i in range(400))
    assert thinking["difficulty"] == {"what": "mean loss a token under base", "known": 400, "used": 400}
    assert arm["difficulty"]["documents"] == 400
    assert arm["difficulty"]["interval"][0] <= arm["difficulty"]["rho"] <= arm["difficulty"]["interval"][1]
    assert "rank correlation: append: Spearman's ρ" in " ".join(ended.stdout.split())

    with open(tmp_path / "levels.jsonl", "w") as file:
        for i, line in enumerate((tmp_path / "datasets.jsonl").read_text().splitlines()):
            file.write(json.dumps(json.loads(line) | {"digits": digits[i]}) + "\n")  # ids are of the text, as in the dataset
    report, command = str(tmp_path / "by-digits"), ["compare", str(tmp_path / "one/run")]
    ended = warm_ranks.run(*command, "--output", report, "--difficulty", str(tmp_path / "levels.jsonl"), "--difficulty-field", "digits")
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "by-digits/report.json").read_text())["thinking"]["arms"]["append"]["difficulty"]
    assert found["rho"] == pytest.approx(1)
    assert {name: group["documents"] for name, group in found["groups"].items()} == {"1": 10, "2": 90, "3": 300}
    assert re.search(r"append\W+all\W+400\W+400\W+32\W+32", ended.stdout)

    ended = warm_ranks.run(*command, "--output", report, "--difficulty", str(tmp_path / "levels.jsonl"))
    assert ended.returncode == 2
    assert "not an output of tpt losses" in ended.stderr.splitlines()[-1]
