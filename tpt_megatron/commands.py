"""Commands of this package as a user would type them: shown, then run, each in processes of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import orjson
import yaml

from tpt_megatron.errors import Stopped, TptError
from tpt_megatron.log import console


def override(key: str, value: Any) -> str:
    """Return `key=value` as the command line reads it back."""
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return f"{key}={text if yaml.safe_load(text) == value else orjson.dumps(value).decode()}"


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Return `key=value` of each."""
    return [override(key, value) for key, value in values.items()]


def tpt(*arguments: str) -> list[str]:
    """Return a command of one process."""
    return ["tpt", *arguments]


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """Return a command of so many ranks on this machine; of one process for one rank."""
    return ["torchrun", "--standalone", f"--nproc-per-node={ranks}", "--module", "tpt_megatron.cli", *arguments] if ranks > 1 else tpt(*arguments)


def run(command: list[str], leave_out: str | None = None) -> None:
    """Print a command and run it; TptError when it fails. leave_out: an argument too long to be shown."""
    line = shlex.join(["..." if argument == leave_out else argument for argument in command])
    console.print(f"$ {line}", style="dim", markup=False, highlight=False)
    module = {"tpt": "tpt_megatron.cli", "torchrun": "torch.distributed.run"}[command[0]]  # of this very interpreter
    # One thread a process: ranks that share cores are slower when each starts more.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen([sys.executable, "-m", module, *command[1:]], env=environment)
    try:
        code = process.wait()
    except Stopped:
        process.terminate()
        process.wait()  # it saves first
        raise
    if code != 0:
        raise TptError(f"`{line}` ended with exit code {code}; its message is above. What is finished is kept: run the same command again to continue")
