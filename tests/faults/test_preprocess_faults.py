"""Preprocessing killed, stopped, out of disk, without permission: the same command finishes, and the bytes are those of an unbroken run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import tokenizers

from tests.support.disks import small_disk
from tpt_megatron.datasets import open_dataset

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and a tokenizer.json in a folder; so much that no run with the slow engine is done before it is killed."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [" ".join(f"word{(i * j) % 997}" for j in range(40)) for i in range(300)]
    texts = [line for path in sorted(Path(json.__file__).parent.parent.glob("*.py")) for line in path.read_text(errors="replace").split("\n\n")] + words
    draw = random.Random(0)
    with open(folder / "in.jsonl", "w") as file:
        for number in range(80_000):
            thoughts = [{"text": draw.choice(texts)[:300], "generator": "g"}] * (number % 3)
            file.write(json.dumps({"text": f"{number} {draw.choice(texts)} {draw.choice(texts)}", "source": f"s{number % 7}", "thoughts": thoughts}) + "\n")
            if number % 1000 == 7:
                file.write("{broken\n\n")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts[:2000], trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def command(corpus: Path, output: Path, **changes: Any) -> list[str]:
    given = {"input": corpus / "in.jsonl", "output": output, "tokenizer": corpus / "tokenizer.json", "piece_megabytes": 0.5, "validation_fraction": 0.05}
    config = output.parent / f"{output.name}.yaml"
    config.write_text(json.dumps({key: value if not isinstance(value, Path) else str(value) for key, value in (given | changes).items()}))
    return [sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(config)]


@contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def run(words: list[str], exit_code: int = 0, **options: Any) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "plan.json"}


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.002)


def pieces(output: Path) -> set[str]:
    return {path.name for path in output.glob("pieces/[0-9]*")}


@pytest.fixture(scope="module")
def unbroken(corpus: Path) -> dict[str, bytes]:
    run(command(corpus, corpus / "unbroken", arms=["vanilla", "append", "prepend"]))
    return files_of(corpus / "unbroken")


@pytest.mark.slow
def test_killed_at_twenty_moments_the_bytes_are_those_of_an_unbroken_run(corpus: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    draw, output, kept = random.Random(0), tmp_path / "out", set()
    arms = ["vanilla", "append", "prepend"]
    for kill in range(20):
        slow = command(corpus, output, arms=arms, workers=1 + kill % 2, engine="tokenizers")
        before = pieces(output)
        with started(slow) as process:
            if kill % 4:  # in the middle of its work; every fourth anywhere from its very start
                wait_for(lambda before=before: pieces(output) - before, process)
            time.sleep(draw.uniform(0, 0.5))
            assert process.poll() is None, "it was done before it could be killed; make the corpus larger"
            process.send_signal(signal.SIGKILL)
        assert kept <= pieces(output)
        kept = pieces(output)
        assert not [path for path in output.rglob("*") if path.name.endswith((".manifest.json", ".idx"))]
    assert len(kept) > 15, "too little was finished between the kills to say anything"
    said = run(command(corpus, output, arms=arms, workers=2))
    assert "pieces were finished before, kept" in said
    assert files_of(output) == unbroken
    assert sorted(path.name for path in output.iterdir()) == ["append", "bad_records.jsonl", "plan.json", "prepend", "vanilla"]


@pytest.mark.parametrize("moment", ["first joined bytes", "first dataset named", "first manifest"])
def test_killed_while_datasets_are_joined_and_named(corpus: Path, unbroken: dict[str, bytes], tmp_path: Path, moment: str) -> None:
    output = tmp_path / "out"
    words = command(corpus, output, arms=["vanilla", "append", "prepend"])
    seen = {
        "first joined bytes": lambda: any(output.glob("*/.*.bin.*.tmp")),
        "first dataset named": lambda: any(output.glob("[a-z]*/train.bin")),
        "first manifest": lambda: any(output.glob("*/train.manifest.json")),
    }[moment]
    with started(words) as process:
        while not seen() and process.poll() is None:
            pass
        process.send_signal(signal.SIGKILL)
    run(words)
    assert files_of(output) == unbroken


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_stops_it_with_code_3_and_one_line(corpus: Path, tmp_path: Path, workers: int, number: int) -> None:
    output = tmp_path / "out"
    words = command(corpus, output, workers=workers, engine="tokenizers")
    with started(words) as process:
        wait_for(lambda: len(pieces(output)) > 2, process)
        running = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        assert len(running) == (0 if workers == 1 else 2)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert err.splitlines()[-1] == "tpt: stopped by a signal; what was finished is kept, run the same command again to continue"
    assert "Traceback" not in err
    assert not [child for child in running if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not list(output.glob("pieces/.[0-9]*"))
    assert len(pieces(output)) > 2


def test_a_killed_worker_ends_the_run_and_a_killed_parent_its_workers(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = command(corpus, output, workers=2, engine="tokenizers")
    with started(words) as process:
        wait_for(lambda: len(pieces(output)) > 1, process)
        victim = next(child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline()))
        victim.kill()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "was killed by signal 9; what was finished is kept, run the same command again to continue" in err.splitlines()[-1]
    with started(words) as process:
        wait_for(lambda: len(psutil.Process(process.pid).children()) >= 3, process)  # two workers and multiprocessing's tracker
        children = psutil.Process(process.pid).children()
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.parametrize("megabytes", [4, 45])
def test_a_full_disk_is_one_line_and_with_room_the_same_command_goes_on(corpus: Path, unbroken: dict[str, bytes], tmp_path: Path, megabytes: int) -> None:
    """4 MB: full while pieces are made. 45 MB: while datasets are joined from them."""
    with small_disk(tmp_path / "disk", megabytes) as disk:
        words = command(corpus, disk / "out", arms=["vanilla", "append", "prepend"])
        said = run(words, exit_code=1)
        assert "No space left on device" in said.splitlines()[-1]
        assert not [path for path in (disk / "out").rglob("*") if path.name.endswith((".manifest.json", ".idx"))]
        assert not [path for path in (disk / "out").rglob(".*") if path.name.endswith(".tmp")]
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        made = len(pieces(disk / "out"))
        assert f"{made} of " in run(words)
        assert files_of(disk / "out") == unbroken


def test_an_unreadable_input_and_an_output_that_may_not_be_written_are_one_line(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    # Root may read and write everything, unless it gives these rights away.
    as_anybody = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    words = as_anybody + command(corpus, tmp_path / "out", input=tmp_path / "in.jsonl", validation_fraction=0)
    (tmp_path / "in.jsonl").chmod(0)
    assert f"{tmp_path / 'in.jsonl'}" in (last := run(words, exit_code=1).splitlines()[-1])
    assert "Permission denied" in last
    (tmp_path / "in.jsonl").chmod(0o644)
    (tmp_path / "out").chmod(0o555)
    assert "Permission denied" in run(words, exit_code=1).splitlines()[-1]
    (tmp_path / "out").chmod(0o755)
    run(words)


def test_two_at_once_on_one_output_are_refused(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = command(corpus, output, engine="tokenizers")
    with started(words) as process:
        wait_for(lambda: pieces(output), process)
        assert "another tpt preprocess is at work there" in run(words, exit_code=2)
        process.kill()


def test_what_was_killed_can_be_read_by_nobody(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with started(command(corpus, output, engine="tokenizers")) as process:
        wait_for(lambda: pieces(output), process)
        process.kill()
    with pytest.raises(Exception, match="no such file"):
        open_dataset(output / "append/train")
