"""A server of our own: started, watched, restarted, and ended with everything it started."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.scripted_server import thought_for
from tpt_megatron.augment.engines.openai import OpenAIEngine
from tpt_megatron.augment.engines.server import OwnServer
from tpt_megatron.config.augment import OpenAIGenerator, Sampling, ServerCommand
from tpt_megatron.errors import MachineError

ROOT = Path(__file__).resolve().parents[4]
SCRIPTED = f"cd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)} -m tests.support.scripted_server --port {{port}}"


def shell(script: str, start_timeout_s: float = 30) -> ServerCommand:
    return ServerCommand(command=("sh", "-c", script), start_timeout_s=start_timeout_s)


def engine_with(command: ServerCommand, log: Path, outage_limit_s: float = 30) -> OpenAIEngine:
    return OpenAIEngine(OpenAIGenerator(kind="openai", model="scripted", server=command, outage_limit_s=outage_limit_s), log)


async def ask(engine: OpenAIEngine) -> str | None:
    return (await engine.complete(({"role": "user", "content": "a document"},), Sampling(), 7)).reasoning


def is_running(process: int) -> bool:
    """Say whether a process runs; one that ended but that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_the_engine_starts_its_server_asks_it_and_ends_it(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "server.log"

    async def main() -> int:
        engine = engine_with(shell(f"echo $$; {SCRIPTED}"), log)
        await engine.open()
        assert await ask(engine) == thought_for("a document", 7)
        process = int(log.read_text().splitlines()[0])
        assert is_running(process)
        await engine.close()
        return process

    assert not is_running(asyncio.run(main()))
    assert '"port"' in log.read_text()


def test_what_the_server_started_ends_too_even_if_it_ignores_sigterm(tmp_path: Path) -> None:
    child = tmp_path / "child"

    async def main() -> None:
        server = OwnServer(shell(f"(trap '' TERM; while :; do sleep 1; done) & echo $! > {child}; {SCRIPTED}"), tmp_path / "log")
        await server.open()
        assert is_running(int(child.read_text()))
        await server.close()

    asyncio.run(main())
    wait_until(lambda: not is_running(int(child.read_text())))


def test_a_server_that_exits_at_once_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    command = shell("echo loading; echo 'CUDA out of memory' >&2; exit 3")
    with pytest.raises(MachineError, match=r"ended with code 3 before it answered; the end of .*log: loading \| CUDA out of memory"):
        asyncio.run(engine_with(command, tmp_path / "log").open())


def test_a_server_that_takes_too_long_is_an_error_and_is_ended(tmp_path: Path) -> None:
    command = shell("echo $$; exec sleep 1000", start_timeout_s=1)
    with pytest.raises(MachineError, match=r"did not answer on port [0-9]+ within start_timeout_s=1;"):
        asyncio.run(engine_with(command, tmp_path / "log").open())
    assert not is_running(int((tmp_path / "log").read_text()))


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"server\.command: 'no-such-server' is no program"):
        asyncio.run(engine_with(ServerCommand(command=("no-such-server",)), tmp_path / "log").open())


def test_a_server_that_dies_is_started_again_and_requests_wait_for_it(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def main() -> None:
        # Slower to come up than the outage limit: its start has a limit of its own.
        engine = engine_with(shell(f"echo $$; {SCRIPTED} --start-delay-s 1.5"), log, outage_limit_s=0.5)
        await engine.open()
        os.kill(int(log.read_text().splitlines()[0]), signal.SIGKILL)
        assert await asyncio.gather(*(ask(engine) for _ in range(10))) == [thought_for("a document", 7)] * 10
        await engine.close()

    asyncio.run(main())


def test_deaths_with_a_reply_in_between_do_not_add_up(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def main() -> None:
        engine = engine_with(shell(f"echo process $$; {SCRIPTED}"), log)
        await engine.open()
        for _ in range(5):
            os.kill(int(re.findall("process ([0-9]+)", log.read_text())[-1]), signal.SIGKILL)
            assert await ask(engine) == thought_for("a document", 7)
        await engine.close()

    asyncio.run(main())
    assert log.read_text().count("process") == 6


def test_a_server_that_dies_again_and_again_ends_the_run(tmp_path: Path) -> None:
    log, once = tmp_path / "log", tmp_path / "once"

    async def main() -> None:
        engine = engine_with(shell(f"echo $$; test -e {once} && echo broken && exit 9; touch {once}; {SCRIPTED}"), log)
        await engine.open()
        try:
            os.kill(int(log.read_text().splitlines()[0]), signal.SIGKILL)
            async with asyncio.timeout(60):
                await ask(engine)
        finally:
            await engine.close()

    with pytest.raises(MachineError, match=r"died with code 9.*broken.*death 5 in a row"):
        asyncio.run(main())
    assert log.read_text().count("broken") == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death signal is Linux's")
def test_the_server_does_not_outlive_a_worker_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    worker = f"""
import asyncio
from pathlib import Path
from tpt_megatron.augment.engines.server import OwnServer
from tpt_megatron.config.augment import ServerCommand

async def main():
    await OwnServer(ServerCommand(command=("sh", "-c", {f"echo $$; {SCRIPTED}"!r})), Path({str(log)!r})).open()
    print("open", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        process.kill()
    wait_until(lambda: not is_running(int(log.read_text().splitlines()[0])))
