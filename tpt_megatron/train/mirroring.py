"""The mirror of a run's checkpoints as its trainer sees it: what it asks for, and when. What happens on the store is mirror.py's."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from tpt_megatron.config.checkpoint import CheckpointConfig
from tpt_megatron.errors import CheckpointError, ConfigError
from tpt_megatron.mcore import groups

log = logging.getLogger(__name__)

POLL_S = 0.1
LAST_TRIES = 3
"""Of the copying that a run waits for before it ends. While it trains it tries again and again."""
LONGEST_PAUSE_S = 600.0


class Mirroring:
    """Keeps `checkpoints.mirror` like `root`, from rank 0. Every rank has one; which methods all must call, they say."""

    def __init__(self, checkpoints: CheckpointConfig, root: Path, rank: int) -> None:
        assert checkpoints.mirror is not None
        self._place, self._root, self._rank = checkpoints.mirror, root, rank
        self._rules = checkpoints.model_dump_json()
        self._task: _Task | None = None
        self._is_due = False
        self._failures = 0
        self._problem: str | None = None
        self._not_before = 0.0
        self.seconds = 0.0
        """What the copying that ended last took."""

    def newer(self) -> tuple[int, dict[str, Any]] | None:
        """Return step and description of the checkpoint to fetch before the run continues, or None. For every rank.

        ConfigError or CheckpointError when no checkpoints can be kept there.
        """
        found = ask(self._rank, "check", self._place, str(self._root))
        return None if found["fetch"] is None else (int(found["fetch"]), found["description"])

    def fetch(self, step: int) -> None:
        """Make a mirrored checkpoint the run's own latest. For every rank; CheckpointError when it is damaged or does not come."""
        ask(self._rank, "fetch", self._place, str(self._root), str(step))

    def follow(self) -> None:
        """Have copied there what is not there yet; nothing waits for it. For rank 0."""
        self._is_due, self._not_before = True, 0.0
        self.poll()

    def poll(self) -> None:
        """Hear how the copying went, and begin what is due. Costs next to nothing."""
        if self._task is not None and not self._task.is_running():
            self._hear(self._task)
            self._task = None
        if self._is_due and self._task is None and time.monotonic() >= self._not_before:
            self._is_due = False
            self._task = _Task("follow", self._place, str(self._root), self._rules)

    def wait(self, still_waiting: Callable[[], None]) -> None:
        """Wait until all is there, however long that takes. For every rank; CheckpointError, on all, when it fails again and again."""
        self._failures, self._not_before = 0, 0.0
        # Many short questions, since a long one would run into the time limits of collective operations.
        while groups.any_rank(self._is_at_work()):
            still_waiting()
            time.sleep(POLL_S)
            self.poll()
        problem = groups.from_rank_0(self._problem)
        if problem is not None:
            raise CheckpointError(
                f"{self._place}: not all checkpoints are there ({problem}); those in {self._root} are complete: run the same command again to copy them"
            )

    def close(self) -> None:
        """End the copying that is under way, if any; the next start does it anew."""
        if self._task is not None:
            self._task.kill()

    def _is_at_work(self) -> bool:
        return self._task is not None or (self._is_due and self._failures < LAST_TRIES)

    def _hear(self, task: _Task) -> None:
        self._problem = task.answer().get("problem")
        if self._problem is None:
            self._failures, self.seconds = 0, task.seconds()
            return
        self._failures += 1
        self._is_due = True
        pause = min(2.0**self._failures, LONGEST_PAUSE_S)
        self._not_before = time.monotonic() + pause
        log.warning("%s: checkpoints could not be copied there (%s); tried again in %.0f s", self._place, self._problem, pause)


def ask(rank: int, *arguments: str) -> dict[str, Any]:
    """Have rank 0 start a task of mirror.py, and return its answer on every rank. Raises ConfigError or CheckpointError, on every rank, for its problem."""
    task = _Task(*arguments) if rank == 0 else None
    while groups.any_rank(task is not None and task.is_running()):
        time.sleep(POLL_S)
    answer = groups.from_rank_0({} if task is None else task.answer())
    if "problem" in answer:
        raise (ConfigError if answer["is_usage"] else CheckpointError)(answer["problem"])
    return answer


class _Task:
    """One task of mirror.py in a process that starts anew, and so has nothing of this one's memory, threads or devices."""

    def __init__(self, *arguments: str) -> None:
        self._began = time.monotonic()
        command = [sys.executable, "-m", "tpt_megatron.mirror", str(os.getpid()), *arguments]
        # Its own session, so that Ctrl-C does not reach it: the trainer says when to end.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def answer(self) -> dict[str, Any]:
        """Return what it said at its end."""
        assert self._process.stdout is not None
        with self._process.stdout as said:
            answer = said.read()
        if self._process.wait() != 0:
            return {"problem": f"the process that copies ended with code {self._process.returncode}, see above", "is_usage": False}
        return dict(orjson.loads(answer))

    def kill(self) -> None:
        self._process.kill()
        self.answer()
