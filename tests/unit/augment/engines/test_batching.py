from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from tpt_megatron.augment.engines.batching import Batcher


class Recorder:
    """Doubles numbers, and keeps what came as one batch. It holds the first batch until `go` is set."""

    def __init__(self, hold: bool = False) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.go = threading.Event()
        if not hold:
            self.go.set()

    def run(self, kind: str, items: Sequence[int], is_abandoned: Callable[[], bool]) -> list[int]:
        self.batches.append((kind, list(items)))
        while not self.go.wait(0.01):
            if is_abandoned():
                return [-1] * len(items)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]


def test_a_later_request_joins_the_batch_that_gathers_and_a_full_one_does_not_wait() -> None:
    async def run() -> list[int]:
        batcher = Batcher(recorder.run, size=2, wait_s=30)
        async with asyncio.timeout(20):
            first = asyncio.create_task(batcher.submit("a", 1))
            await asyncio.sleep(0.05)
            results = await asyncio.gather(first, batcher.submit("a", 2))
            await batcher.close()
        return results

    recorder = Recorder()
    assert asyncio.run(run()) == [2, 4]
    assert recorder.batches == [("a", [1, 2])]


def test_kinds_stay_apart_and_the_oldest_comes_first() -> None:
    async def run() -> list[int]:
        batcher = Batcher(recorder.run, size=2, wait_s=0.01)
        results = await asyncio.gather(*(batcher.submit(kind, item) for kind, item in [("a", 1), ("b", 2), ("a", 3), ("a", 4)]))
        await batcher.close()
        return results

    recorder = Recorder()
    assert asyncio.run(run()) == [2, 4, 6, 8]
    assert recorder.batches == [("a", [1, 3]), ("b", [2]), ("a", [4])]


def test_an_error_reaches_its_batch_and_no_other() -> None:
    async def run() -> list[int | BaseException]:
        batcher = Batcher(recorder.run, size=2, wait_s=0.01)
        results = await asyncio.gather(*(batcher.submit("a", item) for item in (13, 1, 2)), return_exceptions=True)
        await batcher.close()
        return results

    recorder = Recorder()
    *failed, third = asyncio.run(run())
    assert [str(error) for error in failed] == ["thirteen", "thirteen"]
    assert third == 4


def test_who_is_cancelled_leaves_the_queue() -> None:
    async def run() -> int:
        batcher = Batcher(recorder.run, size=1, wait_s=0.01)
        under_way, waiting, last = (asyncio.create_task(batcher.submit("a", item)) for item in (1, 2, 3))
        while not recorder.batches:
            await asyncio.sleep(0.01)
        waiting.cancel()
        recorder.go.set()
        results = await asyncio.gather(under_way, last)
        await batcher.close()
        return results[1]

    recorder = Recorder(hold=True)
    assert asyncio.run(run()) == 6
    assert recorder.batches == [("a", [1]), ("a", [3])]


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_a_batch_that_nobody_waits_for_is_told(how: str) -> None:
    async def run() -> None:
        batcher = Batcher(recorder.run, size=1, wait_s=0.01)
        request = asyncio.create_task(batcher.submit("a", 1))
        while not recorder.batches:
            await asyncio.sleep(0.01)
        if how == "cancelled":
            request.cancel()
            second = asyncio.create_task(batcher.submit("a", 2))
            while len(recorder.batches) < 2:
                await asyncio.sleep(0.01)
            recorder.go.set()
            assert await second == 4
        await batcher.close()  # it would wait for ever for a batch that is not told
        with pytest.raises(asyncio.CancelledError):
            await request

    async def run_in_time() -> None:
        try:
            await asyncio.wait_for(run(), 20)
        finally:
            recorder.go.set()  # else a failed test's thread would live on

    recorder = Recorder(hold=True)
    asyncio.run(run_in_time())
