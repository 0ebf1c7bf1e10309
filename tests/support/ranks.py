"""Ranks of the trainer for tests, started in a second each: a process that has imported everything forks them (warm_ranks.py)."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import psutil

ROOT = Path(__file__).parents[2]


class WarmRanks:
    """For a `with` block. `folder` gets what the ranks write to stdout and stderr."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self.stderr = folder / "stderr"
        """Of ranks that were started and left to themselves."""
        with open(self.stderr, "ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm_ranks"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def start(self, *arguments: str) -> list[psutil.Process]:
        """Start two ranks of `tpt` and return while they run."""
        return [psutil.Process(process) for process in self._order("tpt_megatron.cli", arguments, ranks=2, output=None)]

    def run(self, *arguments: str, module: str = "tpt_megatron.cli", ranks: int = 1, timeout_s: int = 200) -> subprocess.CompletedProcess[str]:
        """Run `tpt`, or another module's `main`, as torchrun would on so many ranks, to its end. The exit code is the first one that is not 0."""
        output = self._folder / str(next(self._numbers))
        codes = self._order(module, arguments, ranks=ranks, output=str(output), timeout_s=timeout_s)
        said = [output.with_suffix(ending).read_text(errors="replace") for ending in (".out", ".err")]
        return subprocess.CompletedProcess([module, *arguments], next((code for code in codes if code), 0), *said)

    def _order(self, module: str, arguments: tuple[str, ...], *, ranks: int, **others: Any) -> list[int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"module": module, "arguments": arguments, "ranks": ranks, "port": free_port() if ranks > 1 else None, "timeout_s": 0, **others}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: list[int] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._process)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started, whatever has gone wrong."""
    family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
    for member in family:
        member.kill()
    process.wait(30)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
