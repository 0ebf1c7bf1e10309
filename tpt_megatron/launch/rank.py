"""One rank: `python -m tpt_megatron.launch.rank LOGS ARGUMENT...` runs `tpt ARGUMENT...`.

What it says goes to LOGS/rank_R.log, or, where LOGS is empty, to where the agent's goes.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tpt_megatron.errors import ConfigError


def log_of(logs: Path, rank: int) -> Path:
    """Return the file that a rank writes to."""
    return logs / f"rank_{rank}.log"


def make_log_folder(folder: Path) -> None:
    """Make a folder of logs. ConfigError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"launch.logs: the folder {folder} cannot be made ({error.strerror}); name one that can be written to") from None


def main() -> None:
    """Become the command, in this process: its exit code is the rank's."""
    logs = sys.argv[1]
    if logs:
        file = os.open(log_of(Path(logs), int(os.environ["RANK"])), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.close(file)
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("tpt_megatron.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
