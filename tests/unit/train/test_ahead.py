"""What the next step reads is read while this one is computed, once, and by one thread at a time."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tpt_megatron.errors import DataError
from tpt_megatron.train.ahead import ReadAhead


class Reader:
    """Says which steps were read by which thread; waits for `go`, and refuses to be called by two at once."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int, str]] = []
        self.go = threading.Event()
        self.go.set()
        self._busy = threading.Lock()

    def __call__(self, first: int, count: int) -> Any:
        assert self._busy.acquire(blocking=False), "two threads read at once"
        try:
            assert self.go.wait(30)
            self.read.append((first, count, threading.current_thread().name))
            if first == 666:
                raise DataError("a bad document")
            return [(first, count)]
        finally:
            self._busy.release()


def test_a_step_that_was_begun_is_read_once_and_elsewhere() -> None:
    reader = Reader()
    with ReadAhead(reader) as ahead:
        assert ahead.take(0, 4) == [(0, 4)]
        reader.go.clear()
        ahead.begin(4, 4)  # returns at once
        assert len(reader.read) == 1
        reader.go.set()
        assert ahead.take(4, 4) == [(4, 4)]
    here = threading.current_thread().name
    (_, _, first), (_, _, second) = reader.read
    assert first == here
    assert second != here


def test_what_was_begun_for_another_step_is_waited_for_and_left() -> None:
    reader = Reader()
    with ReadAhead(reader) as ahead:
        reader.go.clear()
        ahead.begin(4, 4)
        threading.Timer(0.2, reader.go.set).start()
        assert ahead.take(8, 4) == [(8, 4)]
        assert ahead.take(8, 2) == [(8, 2)]
    assert [read[:2] for read in reader.read] == [(4, 4), (8, 4), (8, 2)]


def test_an_error_comes_with_the_step_that_it_is_of() -> None:
    with ReadAhead(Reader()) as ahead:
        ahead.begin(666, 1)
        ahead.wait()
        assert ahead.take(0, 1) == [(0, 1)]  # not its step
        ahead.begin(666, 1)
        with pytest.raises(DataError, match="a bad document"):
            ahead.take(666, 1)


def test_waiting_is_for_what_is_being_read() -> None:
    reader = Reader()
    with ReadAhead(reader) as ahead:
        ahead.wait()  # nothing is
        reader.go.clear()
        ahead.begin(1, 1)
        threading.Timer(0.2, reader.go.set).start()
        ahead.wait()
        assert len(reader.read) == 1
        assert ahead.take(1, 1) == [(1, 1)]
        assert len(reader.read) == 1
