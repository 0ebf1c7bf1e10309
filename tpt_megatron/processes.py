"""Worker processes of one machine: started together, ended in good order together, and never waited for in vain.

A pool of processes hangs when one of them is killed, since its task is then never answered. Here a process that fails or
dies ends the others, and the command says which it was.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import Self

from tpt_megatron.errors import Stopped, TptError

WAIT_S = 2.0
SAME_SIGNAL_S = 2.0
"""Ctrl-C and Slurm signal a whole group of processes, and a parent its workers too: what comes so close together is one signal."""


def end_with_parent() -> None:
    """Have this worker process end at once when the process that started it is gone: killed, it cannot say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process, which `parent` forked, and all that are forked from it, the moment their parent ends.

    For processes that must not outlive a killed parent by one write. Linux only; elsewhere they end when they are done.
    """
    if not sys.platform.startswith("linux"):
        return
    _be_killed_with(parent)
    forking = [os.getpid()]
    os.register_at_fork(before=lambda: forking.append(os.getpid()), after_in_child=lambda: _be_killed_with(forking[-1]))


def _be_killed_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not inherited by forks
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


class WorkerProcesses:
    """`count` processes, each of which runs `work(number)`. For a `with` block, in which SIGTERM and SIGINT stop them."""

    def __init__(self, work: Callable[[int], None], count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = [context.Process(target=work, args=(number,), name=f"worker {number}") for number in range(count)]
        self._asked: set[str] = set()
        self._stopped, self._stopped_at = False, 0.0

    def __enter__(self) -> Self:
        # Ctrl-C is ignored until a process has its own way to stop; SIGTERM reaches it at any time.
        self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._stop), signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
        for process in self._processes:
            process.start()
        signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._end()
        for process in self._processes:
            process.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def are_at_work(self, seconds: float = WAIT_S) -> bool:
        """Wait so long, or until one ends; say whether any is still alive. One that failed has the others asked to end."""
        alive = [process.sentinel for process in self._processes if process.is_alive()]
        if alive:  # for nothing at all it would wait, too
            wait(alive, timeout=seconds)
        if self.are_ending():
            self._end()
        return bool(alive)

    def are_ending(self) -> bool:
        """Say whether a signal came, or one of them has failed: what they do is not going to be finished."""
        return self._stopped or any(process.exitcode for process in self._processes)

    def check(self) -> None:
        """Raise Stopped after a signal to this process or to one of them, and TptError when one failed or was killed by itself."""
        if self._stopped:
            raise Stopped
        by_themselves_first = sorted(self._processes, key=lambda process: process.name in self._asked)
        for process in by_themselves_first:
            if process.exitcode == Stopped.exit_code:
                raise Stopped(f"{process.name} was stopped by a signal; what was finished is kept, run the same command again to continue")
            if process.exitcode != 0:
                how = f"was killed by signal {-process.exitcode}" if process.exitcode and process.exitcode < 0 else "failed, see above"
                raise TptError(f"{process.name} {how}; what was finished is kept, run the same command again to continue")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._stopped and now - self._stopped_at > SAME_SIGNAL_S:
            self._asked.clear()  # the second signal, which ends grace periods, is for them too
        elif not self._stopped:
            self._stopped, self._stopped_at = True, now
        self._end()

    def _end(self) -> None:
        """Ask all to stop in good order, once: a second signal would end their grace period."""
        for process in self._processes:
            if process.is_alive() and process.name not in self._asked:
                self._asked.add(process.name)
                process.terminate()
