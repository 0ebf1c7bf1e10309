"""Other programs asked a question: a Python that tries an import, nvidia-smi."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

IMPORT_TIMEOUT_S = 180


def ask_python(code: str) -> tuple[dict[str, Any] | None, str]:
    """Run code in a Python of its own; return the JSON object that its last line is, or None and why there is none."""
    try:
        ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, errors="replace", timeout=IMPORT_TIMEOUT_S, env=_alone())
    except subprocess.TimeoutExpired:
        return None, f"nothing happened for {IMPORT_TIMEOUT_S} s"
    if ended.returncode < 0:
        return None, f"killed by {signal.Signals(-ended.returncode).name}"
    lines = ended.stdout.strip().splitlines()
    if ended.returncode or not lines:
        return None, (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
    answer = json.loads(lines[-1])
    assert isinstance(answer, dict)
    return answer, ""


def _alone() -> dict[str, str]:
    """The environment without the place in a job, which is the asking process's own."""
    places = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in places and not name.startswith("TORCHELASTIC_")}


def ask_program(*command: str, timeout_s: float = 60) -> tuple[str | None, str]:
    """Return what a program prints, or None and why: FileNotFoundError's message, a time that was over, its own complaint."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except FileNotFoundError:
        return None, "not found"
    except OSError as error:
        return None, str(error)
    except subprocess.TimeoutExpired:
        return None, f"no answer in {timeout_s:g} s"
    if ended.returncode:
        said = (ended.stdout.strip() or ended.stderr.strip()).splitlines()
        return None, " ".join(said) or f"exit code {ended.returncode}"
    return ended.stdout, ""
