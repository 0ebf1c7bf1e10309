"""One run in a run folder at a time: two would delete each other's checkpoints and mix their metrics."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tpt_megatron.errors import ConfigError
from tpt_megatron.mcore import groups

log = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE_S = 10.0
"""A run that is started anew finds the last processes of the one before still ending."""
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)


@contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of `run_dir` while the block lasts. For every rank; ConfigError, on all, when another is in it.

    The system releases the lock of a killed run, on a network disk that of another machine, too.
    """
    with ExitStack() as stack:
        groups.ask_rank_0(lambda: stack.enter_context(_locked(run_dir)))
        yield


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir}: no folder can be made there ({error.strerror}); give another run_dir") from None
    with open(run_dir / LOCK, "ab") as file:
        until = time.monotonic() + PATIENCE_S
        while not _is_taken(file.fileno(), run_dir):
            if time.monotonic() > until:
                raise ConfigError(f"run_dir={run_dir}: another run is at work there; wait for its end, stop it, or give another run_dir")
            time.sleep(0.1)
        yield


def _is_taken(file: int, run_dir: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        log.warning("%s: its file system has no locks (%s); see to it that no other run works there", run_dir, os.strerror(error.errno))
    return True
