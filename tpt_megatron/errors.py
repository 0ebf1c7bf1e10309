"""Errors that a user can act on.

    TptError                    exit code 1: something failed; the message says what, where and what to do
    ├── UsageError              exit code 2: wrong arguments
    │   └── ConfigError         exit code 2: a config key is unknown, of the wrong type, or impossible
    ├── RecordError             exit code 1: one input record cannot be used; carries file and line
    ├── DataError               exit code 1: a file or dataset is missing, damaged, or not what it says it is
    ├── CheckpointError         exit code 1: a checkpoint is missing, incomplete, or of another model
    ├── ConversionError         exit code 1: the other format cannot express this model, or tensors do not match
    ├── MachineError            exit code 1: this machine lacks what the run needs (a package, a device, disk)
    └── Stopped                 exit code 3: a signal came, the work was saved; run the same command again

The command line prints the message of any of these on one line and exits with `exit_code`. Every other exception is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import ClassVar


class TptError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code: ClassVar[int] = 1


class UsageError(TptError):
    """The command was called wrongly."""

    exit_code: ClassVar[int] = 2


class ConfigError(UsageError):
    """A config file or an override is wrong; the message names the key, the value and what is allowed."""


class RecordError(TptError):
    """One record cannot be used. `where` is `FILE:LINE`, `reason` says what is wrong with it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where = where
        self.reason = reason


class DataError(TptError):
    """A file or dataset is missing, damaged, or not what it claims to be."""


class CheckpointError(TptError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class ConversionError(TptError):
    """A model cannot be expressed in the other format, or its tensors do not match."""


class MachineError(TptError):
    """The machine lacks something the run needs."""


class Stopped(TptError):  # noqa: N818 - no error: the work is saved
    """A signal asked the run to stop; everything finished was saved."""

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str = "stopped by a signal; what was finished is kept, run the same command again to continue") -> None:
        super().__init__(message)
