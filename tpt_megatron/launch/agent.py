"""One node's ranks: torchrun's agent in this process, which ends as its ranks ended. Slurm, Kubernetes and `tpt launch local` start it.

    python -m tpt_megatron.launch.agent --ranks 8 [--nodes 2 --rendezvous HOST:PORT --node 1] [--logs FOLDER] -- train CONFIG [key=value ...]

Two things differ from torchrun. Its exit code is 1 whatever its ranks ended with; here it is 3 when they stopped after saving, 2 when they
refused their config, and 128 + N when signal N killed one. And a signal to torchrun gives ranks half a minute, if torch is not told
otherwise, and ends in a traceback; here SIGTERM and SIGINT are handed to the ranks, which have --stop-s to save.

Nothing is started again here: with torchrun's own restarts a stop after saving would count as a failure, and nodes would not agree on what they count.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from tpt_megatron.errors import ConfigError, MachineError, Stopped, UsageError
from tpt_megatron.launch.rank import log_of, make_log_folder
from tpt_megatron.launch.rendezvous import JOIN_S, Rendezvous
from tpt_megatron.processes import die_with_parent


def main() -> None:
    """Run this node's ranks to their end and exit with their code."""
    options, command = _arguments(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop_at_once)  # until there are ranks
    if options.parent:
        die_with_parent(options.parent)
    try:
        code = run(options, command)
    except (UsageError, MachineError, Stopped) as error:
        print(f"tpt launch: {error}", file=sys.stderr)
        code = error.exit_code
    if code not in (0, ConfigError.exit_code, Stopped.exit_code):
        time.sleep(options.failed_pause_s)
    if options.failed_exit_code and code not in (0, ConfigError.exit_code):
        code = options.failed_exit_code
    sys.exit(code)


def exit_code(ended: Sequence[int]) -> int:
    """Return what a node exits with whose ranks ended so, as `subprocess` has exit codes.

    When one ends the agent ends the others by SIGTERM, which they answer with 3 or die of: those codes count only where there are no others.
    """
    if ConfigError.exit_code in ended:
        return ConfigError.exit_code
    killed = [-code for code in ended if code < 0 and code != -signal.SIGTERM]
    if killed:
        return 128 + killed[0]
    failed = [code for code in ended if code > 0 and code != Stopped.exit_code]
    if failed:
        return failed[0]
    if Stopped.exit_code in ended:
        return Stopped.exit_code
    return 128 + signal.SIGTERM if any(ended) else 0


def run(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Run the ranks and return what this node exits with."""
    if options.logs:
        make_log_folder(options.logs)
    _pause(options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks that share cores are slower when each starts more threads
    try:
        from torch.distributed import DistError
        from torch.distributed import run as torchrun
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig
    except ModuleNotFoundError:
        raise MachineError("torch is not installed; run: pip install 'tpt-megatron[train]'") from None
    if "signals_to_handle" not in LaunchConfig.__dataclass_fields__:
        raise MachineError("this torch does not leave signals to its caller (torchrun --signals-to-handle); install a newer one")
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # what it says is said below, once
    forwarding = Forwarding(options.stop_s)
    ended: dict[int, int] = {}
    rendezvous = Rendezvous(options.rendezvous, _node(options), options.nodes, options.id)
    with tempfile.TemporaryDirectory(prefix="tpt-launch-") as scratch, rendezvous:
        try:
            torchrun.run(torchrun.parse_args(_torchrun_arguments(options, command, scratch)))  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except (RendezvousError, DistError) as error:
            # It makes folders for ranks when it starts them; those have ended with this.
            raise _lost(options, error, started=any(Path(scratch).glob("*/attempt_*"))) from None
        finally:
            signal.alarm(0)
        code = exit_code(list(ended.values()))
        if forwarding.asked and code == 128 + signal.SIGTERM:
            code = Stopped.exit_code  # they had not come so far as to know what to do with it: nothing is lost
        rendezvous.linger = code in (0, ConfigError.exit_code, Stopped.exit_code)
    _report(ended, code, options.logs)
    return code


def _lost(options: argparse.Namespace, error: Exception, *, started: bool) -> MachineError:
    said = " ".join(str(error).split())
    if started:
        return MachineError(f"node 0 is gone, which held the rendezvous at {options.rendezvous} ({said})")
    where = f"{options.rendezvous}, node {_node(options)} of {options.nodes}"
    return MachineError(f"{where}: the nodes did not find each other ({said}); see that all run and reach that address")


class Forwarding:
    """Hands SIGTERM and SIGINT to this process's ranks, once, and kills those that have not ended after `stop_s`.

    SIGINT again kills at once: it is a person who waits.
    """

    def __init__(self, stop_s: float) -> None:
        self.asked = False
        self._stop_s = stop_s
        self._asked_at = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGALRM, self._kill)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            # Ctrl-C comes twice where a parent hands it on too.
            if number == signal.SIGINT and time.monotonic() - self._asked_at > 2:
                self._kill(number, frame)
            return
        self.asked, self._asked_at = True, time.monotonic()
        ranks = psutil.Process().children()
        if not ranks:
            _stop_at_once(number, frame)
        for rank in ranks:
            rank.terminate()
        signal.alarm(max(1, round(self._stop_s)))

    def _kill(self, number: int, frame: FrameType | None) -> None:
        for rank in psutil.Process().children():
            print(f"tpt launch: rank process {rank.pid} has not ended after {self._stop_s:g} s; it is killed", file=sys.stderr)
            rank.kill()


def _arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    split = list(words).index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m tpt_megatron.launch.agent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--ranks", type=int, required=True, help="of this node")
    parser.add_argument("--id", default="tpt", help="of the run and the attempt; the same on all nodes")
    parser.add_argument("--rendezvous", help="HOST:PORT of node 0")
    parser.add_argument("--node", type=int, default=0, help="number of this one; node 0 holds the rendezvous")
    parser.add_argument("--node-variable", help="environment variable that has the number")
    parser.add_argument("--address", help="this node, as others reach it")
    parser.add_argument("--logs", type=Path, help="folder for rank_R.log")
    parser.add_argument("--stop-s", type=float, default=300, help="seconds that ranks may take to save after a signal")
    parser.add_argument("--attempt-variable", help="environment variable that has how often all was started before")
    parser.add_argument("--backoff-s", type=float, default=0, help="seconds to wait where that is more than 0; twice as many each time")
    parser.add_argument("--max-backoff-s", type=float, default=600)
    parser.add_argument("--failed-exit-code", type=int, help="to exit with for anything but 0 and 2, for schedulers that want one")
    parser.add_argument("--failed-pause-s", type=float, default=0, help="seconds to wait before it ends so after a failure")
    parser.add_argument("--parent", type=int, help="process that this one must not outlive")
    options = parser.parse_args(words[:split])
    command = list(words[split + 1 :])
    if not command:
        parser.error("give what to run after --: train CONFIG ...")
    if options.nodes > 1 and not options.rendezvous:
        parser.error("--nodes needs --rendezvous")
    return options, command


def _torchrun_arguments(options: argparse.Namespace, command: Sequence[str], scratch: str) -> list[str]:
    where = ["--standalone"]
    if options.nodes > 1:
        host = "true" if _node(options) == 0 else "false"
        where = [f"--nnodes={options.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={options.rendezvous}", f"--rdzv-id={options.id}"]
        where += [f"--rdzv-conf=is_host={host},join_timeout={JOIN_S}"]
        if options.address:
            where += [f"--local-addr={options.address}"]
    return [
        *where,
        f"--nproc-per-node={options.ranks}",
        "--max-restarts=0",
        f"--log-dir={scratch}",
        "--signals-to-handle=SIGHUP",  # not those of `Forwarding`
        *("--module", "tpt_megatron.launch.rank", str(options.logs or ""), *command),
    ]


def _node(options: argparse.Namespace) -> int:
    if options.node_variable is None:
        return int(options.node)
    return _number(os.environ, options.node_variable)


def _number(environment: Mapping[str, str], variable: str) -> int:
    value = environment.get(variable, "")
    if not value.isdigit():
        raise UsageError(f"the variable {variable} should have a number, and has {value!r}")
    return int(value)


def _pause(options: argparse.Namespace) -> None:
    """Wait before another attempt, where what starts this agent has no back-off of its own."""
    if options.attempt_variable is None or (before := _number(os.environ, options.attempt_variable)) == 0:
        return
    seconds = min(options.backoff_s * 2 ** (before - 1), options.max_backoff_s)
    print(f"tpt launch: attempt {before + 1}; ranks are started in {seconds:g} s", file=sys.stderr)
    time.sleep(seconds)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise Stopped("stopped by a signal before ranks were started")


def _report(ended: Mapping[int, int], code: int, logs: Path | None) -> None:
    """Say how ranks failed, with the last line that each has written where that is in a file."""
    if code == Stopped.exit_code:
        print("tpt launch: this node's ranks stopped by a signal after saving; start the same again to continue", file=sys.stderr)
        return
    for rank, rank_ended in sorted(ended.items()):
        if rank_ended in (Stopped.exit_code, -signal.SIGTERM) and code != 128 + signal.SIGTERM:
            continue  # the agent asked it to, since another one had failed
        how = f"was killed by {signal.Signals(-rank_ended).name}" if rank_ended < 0 else f"ended with exit code {rank_ended}"
        print(f"tpt launch: rank {rank} {how}{_last_words(logs, rank)}", file=sys.stderr)


def _last_words(logs: Path | None, rank: int) -> str:
    if logs is None:
        return "; its message is above"
    log = log_of(logs, rank)
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return f"; {log}: {next((line for line in reversed(lines) if line.strip()), 'nothing was written')}"


if __name__ == "__main__":
    main()
