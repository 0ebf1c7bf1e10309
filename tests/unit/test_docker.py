"""The images, as far as they can be checked without a container engine: linted, and what they copy and install is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def test_there_is_one_for_each_purpose() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "generate.Dockerfile", "train.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None
    found = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_it_builds_on_copies_and_installs_is_there(path: Path) -> None:
    text = path.read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", base), "a base without a version changes under us"
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in copied.split():
            assert (ROOT / source).exists() and f"!{source}" in kept
    (extras,) = re.findall(r"'\.\[([a-z0-9,]+)\]'", text)
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))
    assert "USER 10001" in text and "HEALTHCHECK" in text


def test_the_training_image_leaves_to_its_base_what_belongs_there() -> None:
    """The very filter of the image over the very constraints."""
    (pattern,) = re.findall(r"grep -viE '([^']+)' constraints.txt", (ROOT / "docker/train.Dockerfile").read_text())
    kept = subprocess.run(["grep", "-viE", pattern, "constraints.txt"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pinned = {line.split("==")[0] for line in kept.splitlines() if "==" in line}
    assert "megatron-core" in pinned and "transformers" in pinned
    assert not {name for name in pinned if name.startswith(("torch", "nvidia", "triton", "transformer-engine")) or name == "numpy"} - {"torchdata"}


def test_the_entry_point_runs_tpt_or_what_is_named(tmp_path: Path) -> None:
    (tmp_path / "tpt").write_text('#!/bin/sh\necho tpt "$@"\n')
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho torchrun "$@"\n')
    for program in tmp_path.iterdir():
        program.chmod(0o755)

    def said(*arguments: str) -> str:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run([str(ROOT / "docker/entrypoint.sh"), *arguments], env=environment, capture_output=True, text=True, check=True).stdout

    assert said("train", "a b.yaml", "steps=3") == "tpt train a b.yaml steps=3\n"
    assert said("torchrun", "--nnodes", "2") == "torchrun --nnodes 2\n"
    assert said() == "tpt\n", "which shows its help"
