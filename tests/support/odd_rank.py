"""`tpt` whose rank 1 is not like the others: `slow`, or with a folder of other packages first on its path. For torchrun and WarmRanks.

python -m tests.support.odd_rank slow|FOLDER COMMAND ...
"""

import os
import signal
import sys
import time

import torch  # noqa: F401 - before it is slow: its import takes long enough

from tpt_megatron import cli
from tpt_megatron.processes import die_with_parent


def main() -> None:
    """Take the first argument off and run the command."""
    how = sys.argv.pop(1)
    if os.environ["RANK"] == "1":
        if how == "slow":
            slow_down(os.getpid())
        else:
            sys.path.insert(0, how)
    cli.main()


def slow_down(process: int) -> None:
    """Leave a process a tenth of the time from now on, as a control group's quota does: stopped for 90 of every 100 ms."""
    if os.fork():
        return
    die_with_parent(process)
    while True:
        os.kill(process, signal.SIGSTOP)
        time.sleep(0.09)
        os.kill(process, signal.SIGCONT)
        time.sleep(0.01)


if __name__ == "__main__":
    main()
