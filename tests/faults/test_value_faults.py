"""`tpt value` killed and stopped: the same command finishes, and the bytes are those of an unbroken run."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.byte_model import make_byte_model
from tpt_megatron.errors import DataError
from tpt_megatron.record_files import expand_inputs

FILES = 8


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and input files in three formats whose shards take some tenths of a second each."""
    folder = tmp_path_factory.mktemp("value")
    make_byte_model(folder / "model", positions=1024)
    (folder / "in").mkdir()
    draw = random.Random(0)
    for number in range(FILES):
        with open(folder / f"in/{number}.jsonl", "w") as file:
            for i in range(80):
                text = " ".join(f"word{draw.randrange(99)}" for _ in range(40))
                thoughts = [{"text": f"{i} {draw.randrange(9)}", "generator": "g", "seen_end": draw.randrange(len(text))} for _ in range(i % 3)]
                file.write(json.dumps({"text": text, "source": f"s{i % 3}", "thoughts": thoughts}) + ("\n" if i else "\n{broken\n"))
    return folder


def command(work: Path, output: Path) -> list[str]:
    config = output.with_suffix(".yaml")
    config.write_text(json.dumps({"input": str(work / "in"), "output": str(output), "model": str(work / "model"), "device": "cpu"}))
    return [sys.executable, "-m", "tpt_megatron.cli", "value", str(config)]


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifests(output: Path) -> set[str]:
    return {path.name for path in output.glob("shards/[0-9]*.manifest.json")}


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


def test_killed_and_stopped_the_bytes_are_those_of_an_unbroken_run(work: Path, tmp_path: Path) -> None:
    run(command(work, tmp_path / "unbroken"))
    words, output = command(work, tmp_path / "out"), tmp_path / "out"
    draw, kept = random.Random(0), set[str]()
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        with started(words) as process:
            wait_for(lambda kept=kept: manifests(output) - kept, process)
            time.sleep(draw.uniform(0, 0.2))
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == (3 if number == signal.SIGTERM else -signal.SIGKILL), said
        assert kept < manifests(output)
        kept = manifests(output)
        for name in kept:  # whatever has a finished name is whole
            entries = json.loads((output / "shards" / name).read_text())["outputs"]
            assert all((output / entry["name"]).stat().st_size == entry["bytes"] for entry in entries)
        with pytest.raises(DataError, match="run it again, it goes on where it stopped"):
            expand_inputs((str(output),))
    assert said.splitlines()[-1] == "tpt: stopped by a signal; what was finished is kept, run the same command again to continue"
    assert not list(output.glob(".scratch*")), "a stopped run leaves no half-made shard"
    assert len(kept) < FILES, "it was done before it could be killed; make the inputs larger"
    before = {name: (output / "shards" / name).stat().st_mtime_ns for name in kept}
    assert f"{len(kept)} of {FILES} shards were finished before, kept" in run(words)
    assert {name: (output / "shards" / name).stat().st_mtime_ns for name in kept} == before
    assert files_of(output) == files_of(tmp_path / "unbroken")
