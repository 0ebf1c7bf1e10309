"""Signals to stop, where libraries are at work that catch every exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tpt_megatron.errors import Stopped


@contextmanager
def stops_noticed() -> Iterator[Callable[[], None]]:
    """Yield a check that raises Stopped when SIGTERM or SIGINT came since the block began.

    The signal raises at once, too, as it does outside of the block. But a library may take that for a failure of its own, an answer that cannot
    be parsed for instance; so nothing is to be written down before the check was called.
    """
    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        yield lambda: None
        return
    came = False

    def check() -> None:
        if came:
            raise Stopped

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        raise Stopped

    before: dict[signal.Signals, Any] = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
