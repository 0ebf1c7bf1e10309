"""Checkpoints as Hugging Face folders for as long as something is asked of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PREFIX = ".model."
"""How folders begin that a checkpoint is exported to; the process's number follows."""


def remove_stale_exports(room: Path) -> None:
    """Delete what killed processes exported under `room`: it may be as large as a model, and counts as used disk."""
    for leftover in room.glob(f"{_PREFIX}*"):
        process = leftover.name.removeprefix(_PREFIX).partition(".")[0]
        # In containers, where the first process has number 1, this one may have a killed one's.
        if not process.isdecimal() or int(process) == os.getpid() or not psutil.pid_exists(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def model_folder(path: Path, room: Path) -> Iterator[Path]:
    """Yield a Hugging Face folder as it is; a checkpoint is exported to one under `room`, where there is space, which vanishes.

    CheckpointError and ConversionError for a checkpoint that cannot be exported.
    """
    if (path / "config.json").is_file():
        yield path
        return
    from tpt_megatron.convert.export import export_checkpoint

    room.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}.", dir=room) as temporary:
        folder = Path(temporary) / "hf"
        export_checkpoint(path, folder)
        yield folder
