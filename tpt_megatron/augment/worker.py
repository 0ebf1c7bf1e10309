"""A worker: takes shards that nobody holds, thinks about their documents, commits them, until none is left.

Any number of workers share an output, on one machine or many; they know of each other by their claims only. Within a
worker everything happens on one event loop; files are read, written and compressed in threads. The next shard is begun
while the last one's slowest documents are still under way, so that servers never run dry between shards.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tpt_megatron.augment.claims import Claim, Claims
from tpt_megatron.augment.generators import Generator, all_or_none
from tpt_megatron.augment.outcome import Outcome
from tpt_megatron.augment.plan import Plan, Shard
from tpt_megatron.augment.shards import Journal, OpenShard, ShardReader, ShardWriter, finished_shards, manifest_place, open_shard
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import ConfigError, RecordError, Stopped
from tpt_megatron.log import Bar
from tpt_megatron.processes import SAME_SIGNAL_S
from tpt_megatron.storage import Location, explain

logger = logging.getLogger(__name__)
OPEN_SHARDS = 8
OPEN_BYTES = 64_000_000
"""What open shards may take together before another is opened; one that is larger is open alone."""
SAVING_ATTEMPTS = 5
WARNINGS_SHOWN = 10


@dataclass(slots=True)
class Progress:
    """What this worker did so far, for people."""

    documents: int = 0
    restored: int = 0
    generated_tokens: int = 0
    requests: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    bad_records: int = 0

    def add(self, outcome: Outcome) -> None:
        """Count one document."""
        self.documents += 1
        self.generated_tokens += outcome.generated_tokens
        self.requests += outcome.requests
        self.rejected.update(rejection.reason for rejection in outcome.rejections)


class Worker:
    """Does shards of one output. `position` (0 to 1) is where in the plan it begins, so that workers seldom meet."""

    def __init__(self, config: AugmentConfig, plan: Plan, output: Location, generators: list[Generator], bar: Bar, position: float = 0.0) -> None:
        self._config = config
        self._plan = plan
        self._output = output
        self._generators = generators
        self._bar = bar
        start = int(position * len(plan.shards))
        self._order = [*plan.shards[start:], *plan.shards[:start]]
        self._claims = Claims(output / "claims", config.claim_timeout_s)
        self._journal = Journal(output / "journal", plan, self._claims.owner.worker)
        self._reader = ShardReader(plan, int(config.max_record_megabytes * 1e6))
        self._writer = ShardWriter(
            output,
            plan,
            self._claims.owner.worker,
            kind=config.format,
            keep_rejected=config.keep_rejected,
            difficulty_field=config.difficulty_field,
        )
        self._began = 0.0
        self._is_any_silent = False
        self._has_looked = False
        self._candidates: Iterator[Shard] = iter(())
        self._open: dict[int, OpenShard] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._stopping = False
        self._stopped_at = 0.0
        self._changed = asyncio.Event()
        self.progress = Progress()

    async def run(self) -> None:
        """Work until no shard is left that this worker may take.

        Raises Stopped after SIGTERM or SIGINT, when what was under way has finished or the grace period is over; and
        whatever ended the work (MachineError, RecordError under on_bad_record=fail, ...). What was finished is kept.
        """
        with self._signals():
            background: list[asyncio.Task[None]] = []
            try:
                await self._open_generators()
                await asyncio.to_thread(self._check_plan)
                self._began = asyncio.get_running_loop().time()
                for seconds, action in ((self._config.claim_timeout_s / 4, self._renew), (self._config.flush_s, self._save), (2.0, self._show)):
                    background.append(asyncio.create_task(self._every(seconds, action)))
                await self._take_shards()
                await self._drain()
            finally:
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
                await self._give_up_the_rest()
                self._reader.close()
                for generator in self._generators:
                    await _in_any_case(generator.close())
        if self._failure is not None:
            raise self._failure
        if self._stopping:
            raise Stopped

    def _check_plan(self) -> None:
        """Refuse to begin by a plan that another command has made anew meanwhile: a server may take long to start."""
        if (self._output / "plan.json").read_bytes() != self._plan.to_bytes():
            raise ConfigError(f"output={self._output}: was planned anew by another command meanwhile, with other settings or inputs; run this one again")

    @property
    def _halted(self) -> bool:
        return self._stopping or self._failure is not None

    async def _open_generators(self) -> None:
        """Open the generators; a signal does not wait for a server that takes long to answer."""

        async def open_all() -> None:
            for generator in self._generators:
                await generator.open()

        opening, halted = asyncio.create_task(open_all()), asyncio.create_task(self._until_halted())
        try:
            await asyncio.wait({opening, halted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            opening.cancel()  # nothing happens to one that is done
            halted.cancel()
            await asyncio.gather(opening, halted, return_exceptions=True)
        if not opening.cancelled():
            opening.result()

    async def _until_halted(self) -> None:
        while not self._halted:
            await self._wait()

    async def _take_shards(self) -> None:
        """Claim shards and start their documents, as many at once as the generators have room for."""
        while not self._halted:
            while not self._has_room_for_a_shard() and not self._halted:
                await self._wait()
            opened = None if self._halted else await self._next_shard()
            if opened is None:
                return
            for number in opened.pending():
                while len(self._tasks) >= self._room() and not self._halted:
                    await self._wait()
                if self._halted:
                    return
                if self._open.get(opened.shard.number) is not opened:  # taken over by another worker
                    break
                self._start(opened, number)

    def _has_room_for_a_shard(self) -> bool:
        return not self._open or (len(self._open) < OPEN_SHARDS and sum(opened.size for opened in self._open.values()) < OPEN_BYTES)

    def _room(self) -> int:
        """How many documents to have under way: what the generators can take, and some that wait for it."""
        return int(sum(generator.capacity for generator in self._generators) * 1.25) + 8

    async def _wait(self, timeout_s: float | None = None) -> None:
        """Wait until something ends or happens, or for `timeout_s`. Not to be wrapped in a task, which would begin after the caller has looked."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def _next_shard(self) -> OpenShard | None:
        """Claim and read the next free shard. Waits for shards of workers that may be dead; None when nothing is left to do here."""
        while not self._halted:
            for shard in self._candidates:
                opened = await self._claim(shard)
                if opened is not None or self._halted:
                    return opened
            first_look = not self._has_looked
            left = await asyncio.to_thread(self._look)
            if not left or (not first_look and all(self._claims.is_alive(shard.number) for shard in left)):
                return None
            if not first_look:
                await self._wait(min(1.0, self._config.claim_timeout_s / 4))
            self._candidates = iter(left)
        return None

    def _look(self) -> list[Shard]:
        """Return the shards that are neither finished nor at work here."""
        self._has_looked = True
        self._claims.look()
        finished = finished_shards(self._output)
        return [shard for shard in self._order if shard.number not in finished and shard.number not in self._open]

    async def _claim(self, shard: Shard) -> OpenShard | None:
        claim = await asyncio.to_thread(self._claims.take, shard.number)
        if claim is None:
            return None
        if await asyncio.to_thread(manifest_place(self._output, shard).is_file):  # finished since it was listed
            await asyncio.to_thread(self._claims.forget, shard.number)
            return None
        try:
            opened = await asyncio.to_thread(self._read, shard, claim)
            for _, error in opened.bad:
                self._report_bad(error)
        except BaseException:
            self._claims.release(claim)
            raise
        self.progress.restored += opened.restored
        self._bar.advance(shard.count - len(opened.works) + opened.restored)
        self._open[shard.number] = opened
        if opened.is_complete:
            self._track(opened, self._commit(opened))
        return opened

    def _read(self, shard: Shard, claim: Claim) -> OpenShard:
        opened = open_shard(shard, claim, self._reader.read(shard), self._config.fields.names())
        self._journal.restore(opened)
        return opened

    def _report_bad(self, error: RecordError) -> None:
        if self._config.on_bad_record == "fail":
            raise error
        self.progress.bad_records += 1
        if self.progress.bad_records <= WARNINGS_SHOWN:
            logger.warning("%s; set aside", error)

    def _start(self, opened: OpenShard, number: int) -> None:
        self._track(opened, self._think(opened, number))

    def _track(self, opened: OpenShard, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        opened.tasks.add(task)
        task.add_done_callback(lambda done: self._ended(opened, done))

    def _ended(self, opened: OpenShard, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        opened.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._failure is None:
            self._failure = task.exception()
        self._changed.set()

    async def _think(self, opened: OpenShard, number: int) -> None:
        work = opened.works[number]
        try:
            if len(self._generators) == 1:
                outcome = await self._generators[0].think(work.given.document, work.row.where)
            else:
                outcome = Outcome.joined(await all_or_none([generator.think(work.given.document, work.row.where) for generator in self._generators]))
        except RecordError as error:
            opened.set_aside(number, error)
            self._report_bad(error)
        else:
            opened.finish(number, outcome)
            self.progress.add(outcome)
        self._bar.advance(1)
        if opened.is_complete:
            await self._commit(opened)

    async def _commit(self, opened: OpenShard) -> None:
        committed = await asyncio.to_thread(self._writer.commit, opened)
        if not committed:
            logger.warning("shard %s: another worker finished it first; its result stands", opened.shard.name)
        self._open.pop(opened.shard.number, None)
        await asyncio.to_thread(self._journal.forget, opened.shard)
        await asyncio.to_thread(self._claims.forget, opened.shard.number)

    async def _every(self, seconds: float, action: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        while True:
            await asyncio.sleep(seconds)
            try:
                await action()
                failures = 0
            except Exception as error:  # noqa: BLE001  (a bug or a store that is gone ends the work; it is raised again by run)
                failures += 1
                if explain(error) is None or failures >= SAVING_ATTEMPTS:
                    self._failure = self._failure or error
                    self._changed.set()
                else:
                    logger.warning("%s; it is tried again", explain(error))

    async def _show(self) -> None:
        """Say behind the bar how fast this worker is."""
        progress, seconds = self.progress, asyncio.get_running_loop().time() - self._began
        said = [f"{progress.documents / seconds:.1f} documents/s"]
        if progress.generated_tokens:
            said.append(f"{progress.generated_tokens / seconds:,.0f} tokens/s")
        if progress.rejected:
            said.append(f"{progress.rejected.total():,} rejected")
        servers = [server for generator in self._generators for server in generator.notes().get("servers", ())]
        silent = [server for server in servers if server["resting"]]
        if silent:
            said.append(f"{len(silent)} of {len(servers)} servers do not answer")
        self._bar.say(", ".join(said))
        if bool(silent) != self._is_any_silent:
            self._is_any_silent = bool(silent)
            if silent:
                why = "; ".join(f"{server['url']}: {server['last_error']}" for server in silent)
                logger.warning("%d of %d servers do not answer, and are tried again (%s)", len(silent), len(servers), why)
            else:
                logger.info("all servers answer again")

    async def _save(self) -> None:
        for opened in list(self._open.values()):
            if not opened.is_complete:
                await asyncio.to_thread(self._journal.save, opened)

    async def _renew(self) -> None:
        for opened in list(self._open.values()):
            if not await asyncio.to_thread(self._claims.renew, opened.claim) and opened.shard.number in self._open:
                logger.warning("shard %s: another worker took it over, since this one was silent for too long; left to it", opened.shard.name)
                del self._open[opened.shard.number]
                for task in list(opened.tasks):
                    task.cancel()

    async def _drain(self) -> None:
        """Let what is under way finish: all of it, or for the grace period after a signal, or not at all after a failure."""
        deadline: float | None = None
        clock = asyncio.get_running_loop().time
        while self._tasks and self._failure is None:
            if self._stopping and deadline is None:
                deadline = clock() + self._config.grace_s
                logger.info("stopping: waiting up to %.0f s for %d documents under way", self._config.grace_s, len(self._tasks))
            if deadline is not None and clock() >= deadline:
                break
            await self._wait(None if deadline is None else deadline - clock())

    async def _give_up_the_rest(self) -> None:
        """End what is still under way, save what is finished of open shards, and let other workers have them."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for opened in list(self._open.values()):
            await _in_any_case(asyncio.to_thread(self._journal.save, opened))
            await _in_any_case(asyncio.to_thread(self._claims.release, opened.claim))
        self._open.clear()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT stop the work in good order; a second one ends the grace period."""
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _stop(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._stopping and now - self._stopped_at > SAME_SIGNAL_S:
            for task in self._tasks:
                task.cancel()
        elif not self._stopping:
            self._stopping, self._stopped_at = True, now
        self._changed.set()


async def _in_any_case(step: Awaitable[None]) -> None:
    """Do one step of cleaning up; its failure is logged, so that the steps after it happen and the first failure is the one that is told."""
    try:
        await step
    except Exception as error:
        logger.warning("while ending: %s", explain(error) or repr(error), exc_info=explain(error) is None)
