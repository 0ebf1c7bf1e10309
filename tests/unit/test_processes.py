from __future__ import annotations

import time

import pytest

from tpt_megatron.errors import TptError
from tpt_megatron.processes import WorkerProcesses


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
