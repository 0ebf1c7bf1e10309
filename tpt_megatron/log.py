"""Logging and progress bars: people read them on standard error, so that standard output stays free for results.

One rank speaks: under torchrun only rank 0 logs below WARNING, and every line of another rank names its rank. Errors come
from all ranks.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def rank() -> int:
    """Return this process's global rank as torchrun sets it; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


console = Console(stderr=True, soft_wrap=not sys.stderr.isatty())


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the package's log lines to standard error, once per process."""
    prefix = "" if rank() == 0 else f"rank {rank()}: "
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False, markup=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    else:  # a file or a pipe: one line is one line, so that it can be searched
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"[%(asctime)s] %(levelname)-8s {prefix}%(message)s", "%H:%M:%S"))
    root = logging.getLogger("tpt_megatron")
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(level if rank() == 0 else logging.WARNING)


class Bar:
    """Handle on one progress bar: `advance` moves it, `say` changes the text behind it."""

    def __init__(self, progress: Progress, task: int) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Move the bar by `amount` of the total's unit."""
        self._progress.advance(self._task, amount)  # type: ignore[arg-type]

    def say(self, note: str) -> None:
        """Show `note` behind the bar."""
        self._progress.update(self._task, note=note)  # type: ignore[arg-type]


@contextmanager
def progress_bar(title: str, total: float | None, *, completed: float = 0) -> Iterator[Bar]:
    """Show a progress bar on rank 0 of a terminal; elsewhere nothing is drawn and the handle does nothing visible."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn() if total is not None and total == int(total) else TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=rank() != 0 or not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total, completed=int(completed), note="")
        yield Bar(progress, task)
