"""Every `tpt launch` command of docs/launch.md: run where this machine can, else printed with --dry-run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.train_runs import preprocess_corpus

PAGE = (Path(__file__).parents[2] / "docs" / "launch.md").read_text()
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith("    tpt launch ") and "CONFIG" not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files that the page names; its options are the page's own."""
    folder = tmp_path_factory.mktemp("docs")
    preprocess_corpus(folder, "data")
    (folder / "preprocess.yaml").write_text(f"input: {folder}/data.jsonl\noutput: again\ntokenizer: byte\narms: [append]\n")
    (folder / "augment.yaml").write_text("input: a.jsonl\noutput: augmented\ngenerator: {kind: worked}\n")
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL):
        name = re.match(r"# (\S+)\n", block)
        assert name
        (folder / name.group(1)).write_text(block)
    return folder


def test_the_page_has_commands_of_every_kind() -> None:
    assert {command.split()[2] for command in COMMANDS} == {"local", "slurm", "kubernetes"}
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("command", COMMANDS)
def test_it_does_what_the_page_says(folder: Path, command: str) -> None:
    line = command.partition(" > ")[0]
    words = shlex.split(line)[1:]
    runs = words[1] == "local" and "--dry-run" not in words
    if not runs and "--dry-run" not in words:
        words.append("--dry-run")  # there is no such cluster here
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "tpt_megatron.cli", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    if not runs:
        assert ended.stderr == ""
        assert ended.stdout.startswith({"slurm": "#!/bin/bash\n#", "kubernetes": "apiVersion: v1\nkind: ConfigMap", "local": ""}[words[1]])
    elif "train.yaml" in words:
        assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_commands_that_make_the_tests_are_the_repositorys() -> None:
    script = Path(__file__).parents[2] / "tests/support/packages.sh"
    assert "tests/support/packages.sh " in PAGE and script.is_file() and os.access(script, os.X_OK)
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    marked = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slurm or hosts"], cwd=script.parents[2], capture_output=True, text=True, check=False
    )
    for name in ("test_launch_slurm.py", "test_launch_hosts.py", "test_augment_slurm.py"):
        assert name in marked.stdout
