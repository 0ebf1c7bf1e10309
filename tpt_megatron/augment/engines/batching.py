"""Requests that come one by one, served in batches by something that blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Kind = TypeVar("Kind")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting(Generic[Kind, Item, Result]):
    kind: Kind
    item: Item
    result: asyncio.Future[Result]


class Batcher(Generic[Kind, Item, Result]):
    """Gathers up to `size` items of equal kind, waits `wait_s` at most for more to come, and runs them in a thread.

    `run(kind, items, is_abandoned)` returns the items' results in their order. It runs in one thread, one batch at a time, while
    the next items gather; the oldest item's kind is the next batch's. It may ask `is_abandoned` whether anybody still
    waits for what it computes. What it raises reaches every waiter of its batch.
    """

    def __init__(self, run: Callable[[Kind, Sequence[Item], Callable[[], bool]], Sequence[Result]], *, size: int, wait_s: float) -> None:
        self._run = run
        self._size = size
        self._wait_s = wait_s
        self._waiting: list[_Waiting[Kind, Item, Result]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    async def submit(self, kind: Kind, item: Item) -> Result:
        """Return the item's result. A cancelled caller is taken out of the queue; its batch, once running, goes on for the others."""
        if self._closed:
            raise RuntimeError("the batcher is closed")
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        entry: _Waiting[Kind, Item, Result] = _Waiting(kind, item, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._arrived.set()
        return await entry.result

    async def close(self) -> None:
        """Cancel who still waits and end the thread: the batch under way is told that it is abandoned."""
        self._closed = True
        for entry in self._waiting:
            entry.result.cancel()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        await asyncio.to_thread(self._thread.shutdown)

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            try:
                await self._serve(batch)
            finally:
                for entry in batch:
                    entry.result.cancel()  # nothing happens to one that has its result

    async def _serve(self, batch: list[_Waiting[Kind, Item, Result]]) -> None:
        def is_abandoned() -> bool:
            return all(entry.result.cancelled() for entry in batch)

        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, batch[0].kind, [entry.item for entry in batch], is_abandoned)
        try:
            results = await running
        except Exception as error:  # noqa: BLE001  whatever it is, it belongs to those who wait for the batch
            for entry in batch:
                if not entry.result.done():
                    entry.result.set_exception(error)
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.result.done():
                entry.result.set_result(result)

    async def _next_batch(self) -> list[_Waiting[Kind, Item, Result]]:
        while not self._alike():
            await self._more()
        try:
            async with asyncio.timeout(self._wait_s):
                while len(self._alike()) < self._size:
                    await self._more()
        except TimeoutError:
            pass
        batch = self._alike()[: self._size]
        if not batch:  # cancelled meanwhile
            return await self._next_batch()
        self._waiting = [entry for entry in self._waiting if entry not in batch]
        return batch

    async def _more(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    def _alike(self) -> list[_Waiting[Kind, Item, Result]]:
        self._waiting = [entry for entry in self._waiting if not entry.result.done()]
        return [entry for entry in self._waiting if entry.kind == self._waiting[0].kind]
