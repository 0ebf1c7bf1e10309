"""The adaptive limit against simulated servers: a clock of our own, no sleeping."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable

import pytest

from tpt_megatron.augment.engines.concurrency import AdaptiveLimit
from tpt_megatron.config.augment import Concurrency


class SimulatedServer:
    """Works on `slots` requests at once, queues the rest, refuses what is above `refuse_above`; a request takes `seconds()`."""

    def __init__(self, slots: int, seconds: Callable[[], float], refuse_above: int = 10**6, tokens: int | None = 100, refused_share: float = 0.0) -> None:
        self.slots, self.seconds, self.refuse_above, self.tokens = slots, seconds, refuse_above, tokens
        self.refused_share, self.rng = refused_share, random.Random(2)
        self.now, self.replies, self.refused = 0.0, 0, 0
        self._ends: list[tuple[float, float, bool]] = []  # (time of reply, time of sending, good)
        self._free: list[float] = []  # when each slot that is taken becomes free

    def run(self, limit: AdaptiveLimit, until: float, wanted: int = 10**9) -> None:
        """Keep as many requests under way as the limit allows, and at most `wanted`, until the clock says `until`."""
        while self.now < until:
            while limit.room > 0 and limit.under_way < wanted:
                self._send(limit)
            self.now, sent, good = heapq.heappop(self._ends)
            if good:
                self.replies += 1
                limit.replied(sent, self.now, self.tokens)
            else:
                self.refused += 1
                limit.overloaded(sent, self.now)
            limit.release()
            assert limit.limit >= 1

    def _send(self, limit: AdaptiveLimit) -> None:
        limit.acquire()
        if limit.under_way > self.refuse_above or self.rng.random() < self.refused_share:
            heapq.heappush(self._ends, (self.now + 0.05 * self.seconds(), self.now, False))
            return
        start = self.now
        while len(self._free) >= self.slots:
            start = max(start, heapq.heappop(self._free))
        end = start + self.seconds()
        heapq.heappush(self._free, end)
        heapq.heappush(self._ends, (end, self.now, True))


def varying(mean: float, seed: int = 1) -> Callable[[], float]:
    rng = random.Random(seed)
    return lambda: mean * rng.uniform(0.5, 1.5)


@pytest.mark.parametrize("seconds", [0.005, 1.0, 180.0])
@pytest.mark.parametrize("tokens", [100, None])
def test_it_grows_to_the_maximum_where_every_request_more_brings_throughput(seconds: float, tokens: int | None) -> None:
    limit = AdaptiveLimit(Concurrency(initial=32, maximum=512))
    SimulatedServer(10**6, varying(seconds), tokens=tokens).run(limit, until=max(12 * seconds, 4))
    assert limit.limit == 512


@pytest.mark.parametrize("seconds", [0.02, 2.0, 180.0])
def test_it_holds_where_more_requests_only_queue(seconds: float) -> None:
    limit = AdaptiveLimit(Concurrency(initial=16, maximum=512))
    server = SimulatedServer(100, varying(seconds))
    server.run(limit, until=max(40 * seconds, 20))
    assert 90 <= limit.limit <= 200
    before, since = server.replies, server.now
    server.run(limit, until=since + max(50 * seconds, 10))
    assert (server.replies - before) / (server.now - since) > 0.9 * 100 / seconds
    assert limit.limit <= 200


def test_a_request_at_a_time_is_enough_for_a_server_that_does_one_at_a_time() -> None:
    limit = AdaptiveLimit(Concurrency(initial=1, maximum=64))
    SimulatedServer(1, varying(1.0)).run(limit, until=500)
    assert limit.limit <= 4


def test_refusals_bring_it_under_what_the_server_takes_and_it_stays_near() -> None:
    limit = AdaptiveLimit(Concurrency(initial=256, maximum=512))
    server = SimulatedServer(10**6, varying(1.0), refuse_above=80)
    server.run(limit, until=60)
    server.replies = server.refused = 0
    server.run(limit, until=360)
    assert 40 <= limit.limit <= 110
    assert server.refused < 0.25 * server.replies
    assert server.replies > 0.6 * 80 * 300


def test_it_backs_off_once_for_all_requests_of_one_round_trip() -> None:
    limit = AdaptiveLimit(Concurrency(initial=100, maximum=100))
    for _ in range(100):
        limit.acquire()
    for _ in range(100):
        limit.overloaded(sent=0.0, now=1.0)
    assert limit.limit == 70
    for _ in range(8):
        limit.overloaded(sent=1.5, now=2.0)
    assert limit.limit == 49


def test_it_never_falls_below_one() -> None:
    limit = AdaptiveLimit(Concurrency(initial=8, maximum=8))
    for second in range(200):
        limit.overloaded(sent=second + 0.5, now=second + 1.0)
    assert limit.limit == 1


@pytest.mark.parametrize("seconds", [0.005, 60.0])
def test_a_few_refusals_at_any_load_do_not_keep_it_small(seconds: float) -> None:
    limit = AdaptiveLimit(Concurrency(initial=32, maximum=256))
    SimulatedServer(10**6, varying(seconds), refused_share=0.05).run(limit, until=max(40 * seconds, 10))
    assert limit.limit >= 128


def test_after_an_overload_that_passes_it_soon_has_its_old_limit_again() -> None:
    limit = AdaptiveLimit(Concurrency(initial=256, maximum=256))
    server = SimulatedServer(10**6, varying(1.0), refuse_above=2)
    server.run(limit, until=20)
    assert limit.limit <= 4
    server.refuse_above = 10**6
    server.run(limit, until=60)
    assert limit.limit >= 128


def test_it_finds_room_that_comes_later() -> None:
    limit = AdaptiveLimit(Concurrency(initial=32, maximum=512))
    server = SimulatedServer(32, varying(1.0))
    server.run(limit, until=100)
    assert limit.limit <= 64
    server.slots = 400
    server.run(limit, until=400)
    assert limit.limit >= 300


def test_a_limit_that_is_not_reached_does_not_grow() -> None:
    limit = AdaptiveLimit(Concurrency(initial=32, maximum=512))
    SimulatedServer(10**6, varying(0.1)).run(limit, until=30, wanted=20)
    assert limit.limit == 32


def test_a_reply_costs_a_few_microseconds() -> None:
    limit = AdaptiveLimit(Concurrency(initial=512, maximum=512))
    started = time.process_time()
    for index in range(20_000):
        limit.acquire()
        limit.replied(index * 0.001, index * 0.001 + 0.005, 100)
        limit.release()
    assert (time.process_time() - started) / 20_000 < 20e-6
