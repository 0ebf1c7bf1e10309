"""Starts two ranks of `tpt train` by forking a process that has imported everything: in a second, not ten. Driven by test_train_kills.py.

Reads one JSON object a line, {"arguments": [...], "port": N}, and answers with the ranks' process ids.
"""

import json
import os
import signal
import sys

import tpt_megatron.train.loop  # noqa: F401 - the import is what takes so long
from tpt_megatron.cli import main


def serve() -> None:
    """Fork the ranks that each line asks for. A rank leaves the loop and becomes the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # killed ranks are nobody's business here
    for line in sys.stdin:
        order = json.loads(line)
        ranks = []
        for rank in range(2):
            process = os.fork()
            if process == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(order["port"]))
                sys.argv = ["tpt", "train", *order["arguments"]]
                main()
                sys.exit()
            ranks.append(process)
        print(json.dumps(ranks), flush=True)


if __name__ == "__main__":
    serve()
