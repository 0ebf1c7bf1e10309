"""A server that a worker starts for itself, restarts when it dies, and ends with itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp

from tpt_megatron.config.augment import ServerCommand
from tpt_megatron.errors import MachineError

logger = logging.getLogger(__name__)

_DEATHS = 5
_FIRST_REST_S = 0.5
_TERM_S = 15.0
_POLL_S = 0.5
_LOG_LINES, _LOG_BYTES = 8, 3000

# Linux sends the server SIGTERM when this process is killed: an orphan would keep the GPUs that the next run needs.
_DIES_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the worker that started this server is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_lines(path: Path) -> str:
    """Return the end of a log on one line, for a message."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_LOG_LINES:]) or "nothing"


class OwnServer:
    """Runs `ServerCommand.command` in a process group of its own, with its output appended to `log`.

    `is_starting` says that it does not answer yet. `on_gone`, where given, hears the reason
    when it died five times without `succeeded` being called in between, or does not start again in time.
    """

    def __init__(self, command: ServerCommand, log: Path, on_gone: Callable[[str], object] | None = None) -> None:
        self.port = free_port()
        self.log = log
        self.is_starting = True
        self._words = [word.replace("{port}", str(self.port)) for word in command.command]
        self._start_timeout_s = command.start_timeout_s
        self._on_gone = on_gone
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._deaths = 0

    @property
    def base_url(self) -> str:
        """Where it answers, up to and including /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def open(self) -> None:
        """Start it and wait until it answers. MachineError, with the end of its log, when it exits before, or takes too long."""
        if shutil.which(self._words[0]) is None:
            raise MachineError(f"server.command: {self._words[0]!r} is no program that can be found here; install it, or give its full path")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        await self._start()
        self._watcher = asyncio.create_task(self._watch())

    def succeeded(self) -> None:
        """Take in that it answered a request: deaths before count no more."""
        self._deaths = 0

    async def close(self) -> None:
        """End it and whatever it started: SIGTERM, then SIGKILL."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
        await self._end()

    async def _start(self) -> None:
        self.is_starting = True
        with open(self.log, "ab") as output:
            words = (sys.executable, "-c", _DIES_WITH_PARENT, str(os.getpid()), *self._words)
            self._process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=asyncio.subprocess.STDOUT, start_new_session=True
            )
        logger.debug("server.command started as process %d on port %d, output in %s", self._process.pid, self.port, self.log)
        exited = asyncio.create_task(self._process.wait())
        answers = asyncio.create_task(self._answers())
        try:
            done, _ = await asyncio.wait({exited, answers}, timeout=self._start_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if exited in done:
                raise MachineError(f"server.command ended with code {exited.result()} before it answered; the end of {self.log}: {last_lines(self.log)}")
            if not done:
                raise MachineError(
                    f"server.command did not answer on port {self.port} within start_timeout_s={self._start_timeout_s:g}; "
                    f"the end of {self.log}: {last_lines(self.log)}"
                )
            self.is_starting = False
        except BaseException:
            await self._end()
            raise
        finally:
            for task in (exited, answers):
                task.cancel()
            await asyncio.wait({exited, answers})

    async def _answers(self) -> None:
        """Return when it answers anything but 503, which servers that still load their model say."""
        root = self.base_url.removesuffix("/v1")
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
            while True:
                for path in ("/health", "/v1/models"):
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        async with session.get(root + path) as reply:
                            if reply.status != 503:
                                return
                await asyncio.sleep(_POLL_S)

    async def _watch(self) -> None:
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self.is_starting = True
            self._deaths += 1
            reason = f"server.command died with code {code}; the end of {self.log}: {last_lines(self.log)}"
            if self._deaths >= _DEATHS:
                self._give_up(f"{reason} (death {self._deaths} in a row without a reply)")
                return
            logger.warning("%s; it is started again", reason)
            await self._end()
            await asyncio.sleep(_FIRST_REST_S * 2 ** (self._deaths - 1))
            began = time.monotonic()
            try:
                await self._start()
            except MachineError as error:
                if time.monotonic() - began >= self._start_timeout_s:
                    self._give_up(str(error))
                    return
            else:
                logger.warning("server.command answers again after %.0f s", time.monotonic() - began)

    def _give_up(self, reason: str) -> None:
        if self._on_gone is not None:
            self._on_gone(reason)

    async def _end(self) -> None:
        """End the whole process group. Its leader may be gone already while what it started still runs."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _TERM_S)
        self._signal(signal.SIGKILL)
        await self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
