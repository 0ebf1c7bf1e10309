"""A watchdog for each rank: a step that never ends is found, every stack is written down, and the job ends.

Collective operations make one rank's stall everybody's; so all ranks write, and the one whose stack is not in a collective is the one.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

GRACE_S = 20.0
"""After which the interpreter's own timer ends a process whose watchdog thread got no turn: it needs no lock."""


class Watchdog:
    """For a `with` block. `step` says that all is well; after `seconds` without it the process ends with code 1. seconds 0: never."""

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._path = folder / f"rank-{rank:05}.txt"
        self._last, self._doing = time.monotonic(), "start"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self.step("start")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._seconds:
            self._ended.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def step(self, doing: str) -> None:
        """Say what is begun now; it has `seconds`."""
        if self._seconds:
            self._last, self._doing = time.monotonic(), doing
            faulthandler.dump_traceback_later(self._seconds + GRACE_S, exit=True)

    def _watch(self) -> None:
        while not self._ended.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last < self._seconds:
                continue
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "w") as file:
                file.write(f"rank {self._rank}: {self._doing} took more than {self._seconds:g} s\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            message = f"rank {self._rank}: {self._doing} took more than faults.stall_seconds={self._seconds:g}; its stacks are in {self._path}"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
