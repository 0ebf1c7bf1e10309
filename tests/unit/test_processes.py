from __future__ import annotations

import multiprocessing
import os
import sys
import time
from typing import Any

import psutil
import pytest

from tpt_megatron.errors import TptError
from tpt_megatron.processes import WorkerProcesses, die_with_parent


def be_quick(number: int) -> None:
    """Be a process that has nothing to do."""


def fail(number: int) -> None:
    raise SystemExit(4 if number else 0)


def test_nobody_is_waited_for_once_all_have_ended() -> None:
    with WorkerProcesses(be_quick, 2) as processes:
        while processes.are_at_work(60):
            pass
        begun = time.monotonic()
        assert not processes.are_at_work(60)
    assert time.monotonic() - begun < 30
    processes.check()


def test_a_process_that_failed_is_named() -> None:
    with WorkerProcesses(fail, 2) as processes:
        while processes.are_at_work():
            pass
    with pytest.raises(TptError, match="worker 1 failed"):
        processes.check()


def _sleeper(parent: int, alone: bool, pids: Any) -> None:
    if not alone:
        die_with_parent(parent)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    pids.put((os.getpid(), child.pid))
    child.join()


def _killed_parent(alone: bool, pids: Any) -> None:
    multiprocessing.get_context("fork").Process(target=_sleeper, args=(os.getpid(), alone, pids)).start()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
@pytest.mark.parametrize("alone", [False, True])
def test_what_dies_with_its_parent_takes_its_own_children_along(alone: bool) -> None:
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    parent = context.Process(target=_killed_parent, args=(alone, pids))
    parent.start()
    family = [psutil.Process(pid) for pid in pids.get(timeout=60)]
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs(family, timeout=0.5 if alone else 10)
    for orphan in alive:
        orphan.kill()
    assert len(alive) == (2 if alone else 0)  # what nobody asked to die stays: the test can tell
