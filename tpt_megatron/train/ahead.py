"""The micro-batches of the next step, read while this one is computed: on a shared file system, a sequence of many documents is many slow reads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType

from tpt_megatron.mcore.engine import MicroBatch

Read = Callable[[int, int], list[MicroBatch]]


class ReadAhead:
    """For a `with` block. `read` gets a step's (first sequence, number of sequences), and is called in a thread, one step at a time."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._of: tuple[int, int] | None = None
        self._next: Future[list[MicroBatch]] | None = None

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def begin(self, first_sequence: int, count: int) -> None:
        """Begin to read."""
        self._of = first_sequence, count
        self._next = self._thread.submit(self._read, first_sequence, count)

    def take(self, first_sequence: int, count: int) -> list[MicroBatch]:
        """Return what was begun, or, where that was another step's (of a run that went back, whose batches grow), read now. Raises what `read` raised."""
        self.wait()
        begun, self._next = self._next, None
        if begun is None or self._of != (first_sequence, count):
            return self._read(first_sequence, count)
        return begun.result()

    def wait(self) -> None:
        """Return once nothing is being read: what is read from has a place of its own, and two threads would move it."""
        if self._next is not None:
            wait([self._next])
