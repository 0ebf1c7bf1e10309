"""Starts ranks by forking a process that has imported the trainer: in a second, not ten. Driven by ranks.py.

Reads one JSON object a line, an order: {"module": its `main` is what a rank runs, "arguments": [...], "ranks": N, "port": N or null where there
is one rank, "output": PREFIX or null, "timeout_s": N}. Without an output the ranks are left to themselves and the answer is their process ids;
with one the answer comes when all have ended: their exit codes. Their stdout and stderr are in PREFIX.out and PREFIX.err then.
"""

import importlib
import json
import os
import signal
import sys
from typing import Any

import tpt_megatron.cli
import tpt_megatron.train.loop  # noqa: F401 - the import is what takes so long


def main() -> None:
    """Carry out one order after the other."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ranks that are left to themselves are nobody's business here
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(start(order) if order["output"] is None else carry_out(order)), flush=True)


def start(order: dict[str, Any]) -> list[int]:
    """Fork the ranks and return their process ids. In a rank it does not return: that becomes the command."""
    ranks = []
    for rank in range(order["ranks"]):
        process = os.fork()
        if process == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if order["port"] is not None:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_PORT": order["port"]}
                os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
            sys.argv = [order["module"], *order["arguments"]]
            importlib.import_module(order["module"]).main()
            sys.exit()
        ranks.append(process)
    return ranks


def carry_out(order: dict[str, Any]) -> list[int]:
    """Run the ranks to their end and return their exit codes, as subprocess has them. When one fails the others are killed, as torchrun does."""
    answer, told = os.pipe()
    if os.fork() == 0:  # a process of its own, which may wait for its children
        os.close(answer)
        os.set_inheritable(told, False)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for ending, descriptor in (("out", 1), ("err", 2)):
            with open(f"{order['output']}.{ending}", "wb") as file:
                os.dup2(file.fileno(), descriptor)
        ranks = start(order)
        os.write(told, json.dumps(wait(ranks, order["timeout_s"])).encode())
        os._exit(0)
    os.close(told)
    with open(answer, "rb") as file:
        return json.loads(file.read())  # type: ignore[no-any-return]


def wait(ranks: list[int], timeout_s: int) -> list[int]:
    """Return the exit codes of children. What takes longer than timeout_s is killed."""
    codes: dict[int, int] = {}

    def kill(*_: Any) -> None:
        for process in set(ranks) - set(codes):
            os.kill(process, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(timeout_s)
    while len(codes) < len(ranks):
        process, status = os.wait()
        codes[process] = os.waitstatus_to_exitcode(status)
        if codes[process]:
            kill()
    return [codes[process] for process in ranks]


if __name__ == "__main__":
    main()
