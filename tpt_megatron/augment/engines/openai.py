"""Asks servers of the OpenAI chat-completions protocol over HTTP, many requests at once, and outlives their faults.

Each failure is someone's fault (`chat_completions.Blame`), and that decides what follows:

    the server's    refused or reset connections, 429, 502, 503, 504, time-outs: tried again as long as any server answered
                    within `outage_limit_s`, then MachineError; such a failure is never held against the request, save that
                    it timed out while others were answered
    the request's   500, half a reply, no JSON: tried again `attempts` times, then RequestFailed, if the server proved meanwhile
                    that it answers others; a request that is alone sends one that was answered before, or a simple one, to see
    refused         400 and the like: RequestFailed at once; MachineError when the first 20 all were
    the settings'   401, 403, 404: MachineError at once

Hot path: one ClientSession, JSON by orjson, no work per request that can be done once.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import tenacity
from yarl import URL

from tpt_megatron.augment.engines.balance import Balance, Place, Server
from tpt_megatron.augment.engines.base import Messages, Reply, RequestFailed
from tpt_megatron.augment.engines.chat_completions import Blame, Fault, fault_of_status, read_reply, request_body, served_models
from tpt_megatron.augment.engines.server import OwnServer
from tpt_megatron.config.augment import OpenAIGenerator, Sampling
from tpt_megatron.errors import ConfigError, MachineError

logger = logging.getLogger(__name__)

_CONNECT_S = 30.0
_MODELS_S = 10.0
_MODELS_POLL_S = 1.0
# uvicorn, under vLLM and most others, closes an idle connection after 5 s; a request sent on it at that moment would be reset.
_IDLE_CONNECTION_S = 4.0
_LONGEST_RETRY_AFTER_S = 120.0
_REFUSALS_BEFORE_END = 20
_SIMPLE_QUESTION: Messages = ({"role": "user", "content": "Say yes."},)
_LARGE_BODY = 1 << 20  # aiohttp warns of larger ones in one piece
_BACK_OFF = tenacity.wait_random_exponential(multiplier=0.5, max=30)
_AFTER_LOST_CONNECTION = tenacity.wait_random(0, 0.2)  # whether the server is back, its rests find out


@dataclass(slots=True)
class _Request:
    """One request over all its attempts. Times are monotonic seconds; `failures` are those held against it."""

    body: bytes
    attempts: int = 0
    failures: int = 0
    first_sent: float = 0.0
    sent: float = 0.0
    failed_at: Server | None = None


@dataclass(frozen=True, slots=True)
class _Answered:
    """A request that was answered with success, and how long that took."""

    body: bytes
    seconds: float


class OpenAIEngine:
    """The engine of `generator.kind=openai`. `server_log` takes the output of a server of our own."""

    def __init__(self, config: OpenAIGenerator, server_log: Path | None = None) -> None:
        self._config = config
        self._own = OwnServer(config.server, server_log or Path("server.log"), self._own_server_is_gone) if config.server else None
        urls = (self._own.base_url,) if self._own else config.base_urls
        self._urls = [URL(url.rstrip("/")) for url in urls]
        # A password in a URL belongs in no message.
        self._servers = [Server(str(url.with_user(None)), config.concurrency) for url in self._urls]
        self._chat_urls = {server: url / "chat" / "completions" for server, url in zip(self._servers, self._urls, strict=True)}
        self._balance = Balance(self._servers)
        self._key = _key_from(os.environ, config.api_key_env)
        self._session: aiohttp.ClientSession | None = None
        self._wanted = 0
        self._retries = self._refused = 0
        self._last_success = float("-inf")
        self._failing_since: float | None = None
        self._answered: _Answered | None = None
        self._proof: asyncio.Task[bool] | None = None

    async def open(self) -> None:
        """Start the server, if it is ours, and see that the model is served; waits for a server that does not answer yet."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
            headers=headers,
            skip_auto_headers=("User-Agent",),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_s, sock_connect=min(_CONNECT_S, self._config.timeout_s)),
        )
        try:
            if self._own:
                await self._own.open()
            await self._look_for_model()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close connections, and end the server if it is ours."""
        self._balance.end("the engine was closed")
        if self._proof is not None:
            self._proof.cancel()
            await asyncio.wait([self._proof])
        if self._session is not None:
            await self._session.close()
        if self._own:
            await self._own.close()

    @property
    def capacity(self) -> int:
        """The sum of the servers' limits. One that is down counts too: it may be back at any time, and requests wait in order."""
        return sum(server.limit.limit for server in self._servers)

    def notes(self) -> dict[str, Any]:
        """Return what a person may want to see: of each server the limit, requests under way, successes, failures, rests."""
        now = time.monotonic()
        return {"retries": self._retries, "servers": [server.notes(now) for server in self._servers]}

    async def complete(self, messages: Messages, sampling: Sampling, seed: int) -> Reply:
        """Return the reply to one request, after as many attempts as it takes; see the module for what ends them."""
        if not self._wanted:
            self._failing_since = None  # nobody asked meanwhile, so nothing is known
        self._wanted += 1
        request = _Request(request_body(self._config.model, messages, sampling, seed))
        try:
            return await self._attempt(request)
        except Fault as fault:
            return await self._try_again(request, fault)
        finally:
            self._wanted -= 1

    async def _try_again(self, request: _Request, first: Fault) -> Reply:
        """Go on after the first attempt failed. That one is not tenacity's, which would cost every request what few need."""
        known = [first]

        async def attempt() -> Reply:
            if known:
                raise known.pop()
            self._retries += 1
            return await self._attempt(request)

        return await tenacity.AsyncRetrying(retry=tenacity.retry_if_exception_type(Fault), wait=_pause, sleep=self._sleep)(attempt)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not far beyond the moment at which an outage is over the limit."""
        if self._failing_since is not None:
            seconds = min(seconds, max(0.05, self._failing_since + self._config.outage_limit_s - time.monotonic()))
        await asyncio.sleep(seconds)

    async def _attempt(self, request: _Request) -> Reply:
        """Send a request once. Fault when it is worth another attempt, else what `complete` raises."""
        try:
            return await self._send_once(request)
        except Fault as fault:
            await self._consider(request, fault)
            raise

    async def _send_once(self, request: _Request) -> Reply:
        place = await self._balance.place(avoid=request.failed_at)
        server, request.sent = place.server, place.sent
        request.first_sent = request.first_sent or place.sent
        request.attempts += 1
        try:
            reply = await self._post(self._chat_urls[server], request)
            self._note_success(place, request, reply)
            return reply
        except Fault as fault:
            request.failed_at = server
            self._note_failure(place, fault)
            raise
        finally:
            self._balance.give_back(place)

    async def _post(self, url: URL, request: _Request) -> Reply:
        assert self._session is not None, "open() comes first"
        data = request.body if len(request.body) < _LARGE_BODY else io.BytesIO(request.body)
        try:
            async with self._session.post(url, data=data, allow_redirects=False) as response:
                body = await response.read()
                headers = response.headers
                if response.status != 200:
                    raise fault_of_status(response.status, body, headers.get("Retry-After"))
                return read_reply(body, headers.get("Content-Type", ""), request.attempts)
        except Fault as fault:
            fault.hide(self._key)  # servers quote wrong keys
            raise
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            raise _fault_of(error, self._config.timeout_s) from None

    def _note_success(self, place: Place, request: _Request, reply: Reply) -> None:
        now = time.monotonic()
        server = place.server
        server.limit.replied(place.sent, now, reply.generated_tokens)
        server.answered()
        server.succeeded += 1
        self._last_success = now
        self._failing_since = None
        self._answered = _Answered(request.body, now - place.sent)
        if self._own:
            self._own.succeeded()

    def _note_failure(self, place: Place, fault: Fault) -> None:
        now = time.monotonic()
        server = place.server
        server.failed[fault.kind] += 1
        server.last_error = str(fault)
        if fault.is_overload:
            server.limit.overloaded(place.sent, now)
        if fault.blame in (Blame.REFUSED, Blame.SETTINGS):
            server.answered()
            return
        server.broke(place, now, unreachable=fault.is_unreachable)
        # A time-out proves silence since the request was sent; any other failure proves nothing about the time before it.
        began = place.sent if fault.is_time_out and self._last_success < place.sent else now
        self._failing_since = began if self._failing_since is None else min(began, self._failing_since)

    async def _consider(self, request: _Request, fault: Fault) -> None:
        """Return when a request shall be tried again; raise RequestFailed or MachineError otherwise."""
        server = request.failed_at
        assert server is not None
        if fault.blame is Blame.SETTINGS:
            self._end(f"{server.url}: {fault}{_hint(fault, self._config.api_key_env)}")
        if fault.blame is Blame.REFUSED:
            self._refused += 1
            if self._refused >= _REFUSALS_BEFORE_END and self._answered is None:
                self._end(f"{server.url} refused the first {self._refused} requests, and answered none: {fault}; correct generator.sampling or the prompts")
            raise RequestFailed(str(fault))
        if fault.blame is Blame.REQUEST or (fault.is_time_out and await self._answers_since(request.sent)):
            request.failures += 1
            if request.failures >= self._config.attempts and await self._answers_since(request.first_sent):
                raise RequestFailed(f"{fault} ({request.failures} times, while {server.url} answered other requests)")
        self._end_if_outage()

    async def _answers_since(self, moment: float) -> bool:
        """Say whether a server answered any request since; ask once more what was answered before, where nothing else tells.

        Where nothing was answered yet (a run that goes on with nothing left but documents that always fail), ask something simple.
        """
        if self._last_success > moment:
            return True
        if self._proof is None or self._proof.done():
            simple = _Answered(request_body(self._config.model, _SIMPLE_QUESTION, Sampling(max_tokens=16, stop=()), 0), 0)
            self._proof = asyncio.create_task(self._prove_alive(self._answered or simple))
        return await asyncio.shield(self._proof)

    async def _prove_alive(self, before: _Answered) -> bool:
        try:
            async with asyncio.timeout(min(10 + 3 * before.seconds, max(1, self._config.outage_limit_s))):
                await self._send_once(_Request(before.body))
        except (Fault, TimeoutError, MachineError):
            return False
        return True

    def _end_if_outage(self) -> None:
        """Raise MachineError when no server has answered for too long. Requests that may yet be answered are waited for."""
        if self._failing_since is None:
            return
        if self._own and self._own.is_starting:
            self._failing_since = None  # its start has a limit of its own
            return
        silent_s = time.monotonic() - self._failing_since
        if silent_s >= self._config.outage_limit_s and not any(server.awaits_replies for server in self._servers):
            errors = "; ".join(f"{server.url}: {server.last_error or 'not asked'}" for server in self._servers)
            self._end(f"no server answered for {silent_s:.0f} s ({errors}); finished work is kept, run the same command again when it is back")

    def _end(self, message: str) -> None:
        self._balance.end(message)
        raise MachineError(message)

    def _own_server_is_gone(self, reason: str) -> None:
        self._balance.end(reason)

    async def _look_for_model(self) -> None:
        """Return when any server answers. ConfigError when one lists its models and ours is not among them."""
        while True:
            answers = await asyncio.gather(*(self._models_of(server, url) for server, url in zip(self._servers, self._urls, strict=True)))
            if any(answers):
                self._failing_since = None
                return
            self._failing_since = self._failing_since or time.monotonic()
            self._end_if_outage()
            await self._sleep(_MODELS_POLL_S)

    async def _models_of(self, server: Server, url: URL) -> bool:
        """Say whether a server answers at all, and refuse a model that it does not serve."""
        assert self._session is not None
        try:
            async with self._session.get(url / "models", timeout=aiohttp.ClientTimeout(total=_MODELS_S), allow_redirects=False) as response:
                status, body = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            server.last_error = str(_fault_of(error, _MODELS_S))
            return False
        if status in (502, 503, 504):
            server.last_error = f"status {status} from GET /models"
            return False
        names = served_models(body) if status == 200 else None
        if names is None:
            logger.debug("%s: GET /models gave status %d and no list; whether it serves %s, the first request tells", server.url, status, self._config.model)
        # transformers serve lists what it has downloaded, and serves any folder that is named to it.
        elif names and self._config.model not in names and not Path(self._config.model).is_dir():
            raise ConfigError(f"generator.model={self._config.model} is not served by {server.url}, which has {', '.join(map(str, names[:20]))}")
        return True


def _key_from(environment: Mapping[str, str], name: str) -> str:
    key = environment.get(name, "").strip()
    if not key.isprintable() or not key.isascii():
        raise ConfigError(f"api_key_env={name}: the variable holds characters that no key has; set it again")
    return key


def _hint(fault: Fault, api_key_env: str) -> str:
    if fault.kind in ("status 401", "status 403"):
        return f"; put the right key into {api_key_env}"
    return "; check generator.model and base_urls" if fault.kind.startswith("status") else ""


def _fault_of(error: Exception, timeout_s: float) -> Fault:
    """Return the fault that an error of the connection stands for."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return Fault(Blame.SETTINGS, "too many open files", "raise the limit (ulimit -n) well above the number of requests under way")
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        fault = Fault(Blame.SERVER, "connection refused" if error.__cause__.__class__ is ConnectionRefusedError else "cannot connect", _reason(error))
        fault.is_unreachable = True
    elif isinstance(error, TimeoutError):
        fault = Fault(Blame.SERVER, "timed out", f"no whole reply within {timeout_s:g} s")
        fault.is_time_out = fault.is_overload = True
    elif isinstance(error, aiohttp.ClientPayloadError):
        fault = Fault(Blame.REQUEST, "truncated reply", _reason(error))
    elif isinstance(error, (aiohttp.ClientConnectionError, OSError)):
        fault = Fault(Blame.SERVER, "connection lost", _reason(error))
    else:
        fault = Fault(Blame.REQUEST, "no HTTP", getattr(error, "message", "") or type(error).__name__)
    return fault


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _pause(state: tenacity.RetryCallState) -> float:
    """Return the seconds before the next attempt: what the server asked for, if it did."""
    assert state.outcome is not None
    fault = state.outcome.exception()
    assert isinstance(fault, Fault)
    if fault.retry_after_s:
        return min(fault.retry_after_s, _LONGEST_RETRY_AFTER_S) + _AFTER_LOST_CONNECTION(state)
    if fault.blame is Blame.SERVER and not fault.is_overload:
        return _AFTER_LOST_CONNECTION(state)
    return _BACK_OFF(state)
