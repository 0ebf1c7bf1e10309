"""Which server a request goes to: the one with most room that is not resting after failures; requests wait where none has room."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

from tpt_megatron.augment.engines.concurrency import AdaptiveLimit
from tpt_megatron.config.augment import Concurrency
from tpt_megatron.errors import MachineError

# A server that cannot be reached rests at once, one that fails otherwise after so many failures and no success.
_FAILURES_BEFORE_REST = 8
_FIRST_REST_S, _LONGEST_REST_S = 0.25, 10.0


class Server:
    """One server: its limit, its rests, and what is counted for people."""

    def __init__(self, url: str, concurrency: Concurrency) -> None:
        self.url = url
        self.limit = AdaptiveLimit(concurrency)
        self.succeeded = 0
        self.failed: Counter[str] = Counter()
        self.last_error: str | None = None
        self.is_unreachable = False
        self.has_trial = False
        self._failures_in_a_row = 0
        self._rests_in_a_row = 0
        self._rest_began = float("-inf")
        self.resting_until = float("-inf")

    @property
    def is_down(self) -> bool:
        """Whether it gets nothing but a trial request after each rest, until it answers one."""
        return self._rests_in_a_row > 0

    def room(self, now: float) -> int:
        """Return how many more requests it can be sent."""
        if self.is_down:
            return 0 if self.has_trial or now < self.resting_until else 1
        return self.limit.room

    def answered(self) -> None:
        """Take in that it works."""
        self._failures_in_a_row = self._rests_in_a_row = 0
        self.is_unreachable = False

    def broke(self, place: Place, now: float, *, unreachable: bool) -> None:
        """Take in that it failed a request; those sent before its rest began say nothing new."""
        if place.sent < self._rest_began and not place.is_trial:
            return
        self._failures_in_a_row += 1
        self.is_unreachable = unreachable
        if unreachable or place.is_trial or self._failures_in_a_row >= _FAILURES_BEFORE_REST:
            rest_s = min(_FIRST_REST_S * 2**self._rests_in_a_row, _LONGEST_REST_S)
            self._rests_in_a_row = min(self._rests_in_a_row + 1, 16)
            self._rest_began = now
            self.resting_until = now + random.uniform(0.8, 1.2) * rest_s  # workers shall not come back all at once

    @property
    def awaits_replies(self) -> bool:
        """Whether requests are under way that may well be answered."""
        return not self.is_unreachable and self.limit.under_way > self.has_trial

    def notes(self, now: float) -> dict[str, Any]:
        """Return what a person may want to see."""
        return {
            "url": self.url,
            "limit": self.limit.limit,
            "under_way": self.limit.under_way,
            "succeeded": self.succeeded,
            "failed": dict(self.failed),
            "resting": self.is_down,
            "resting_s": round(max(0.0, self.resting_until - now), 1) if self.is_down else 0.0,
            "last_error": self.last_error,
        }


@dataclass(slots=True, eq=False)
class Place:
    """One request's place at a server, from `sent` (monotonic seconds) on."""

    server: Server
    sent: float
    is_trial: bool


class Balance:
    """Hands out places at servers, in the order in which they were asked for."""

    def __init__(self, servers: list[Server]) -> None:
        self.servers = servers
        self._waiting: deque[asyncio.Future[Place]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._ended: str | None = None

    async def place(self, avoid: Server | None = None) -> Place:
        """Return a place, as soon as a server has one: at `avoid` only where no other has room. MachineError after `end`."""
        if self._ended is not None:
            raise MachineError(self._ended)
        if not self._waiting and (place := self._take(avoid)) is not None:
            return place
        waiter: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self.hand_out()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.give_back(waiter.result())
            raise

    def give_back(self, place: Place) -> None:
        """Free a place, for whoever waits."""
        place.server.limit.release()
        if place.is_trial:
            place.server.has_trial = False
        if self._waiting:
            self.hand_out()

    def hand_out(self) -> None:
        """Give places to those who wait, as far as there are any, and come back when the next rest ends."""
        while self._waiting:
            if self._waiting[0].done():  # cancelled
                self._waiting.popleft()
            elif (place := self._take(None)) is not None:
                self._waiting.popleft().set_result(place)
            else:
                self._come_back()
                return

    def end(self, message: str) -> None:
        """Let every waiting and every further request fail with MachineError."""
        self._ended = self._ended or message
        while self._waiting:
            if not (waiter := self._waiting.popleft()).done():
                waiter.set_exception(MachineError(self._ended))
        if self._timer is not None:
            self._timer.cancel()

    def _take(self, avoid: Server | None) -> Place | None:
        now = time.monotonic()
        best, best_rank = None, (False, 0)
        for server in self.servers:
            room = server.room(now)
            if room > 0 and (rank := (server is not avoid, room)) > best_rank:
                best, best_rank = server, rank
        if best is None:
            return None
        best.limit.acquire()
        is_trial = best.is_down
        best.has_trial = best.has_trial or is_trial
        return Place(best, now, is_trial)

    def _come_back(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        rests = [server.resting_until for server in self.servers if server.is_down and not server.has_trial]
        if rests:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, min(rests) - time.monotonic()) + 0.001, self.hand_out)
