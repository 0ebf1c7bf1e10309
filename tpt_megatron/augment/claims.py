"""Which worker does which shard: claims, as files beside the output, on any store that can create a file exclusively.

    OUTPUT/claims/00012.000.json    worker, host, process, and a beat that its holder renews
    OUTPUT/claims/00012.001.json    of one that took the shard over

A claim is taken by creating the next generation's file, which succeeds for exactly one worker; no claim of another is ever
changed or removed while its shard is unfinished. A shard may be taken over when its holder released it, when its holder
ran on this machine and is gone, or when its beat has stood still for the claim time-out by this worker's own clock, so
that clocks of different machines need not agree. A holder that was taken over (a machine asleep, say) notices when it
renews; should it still finish, committing a shard is exclusive too (see `shards.py`).
"""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from tpt_megatron.errors import DataError
from tpt_megatron.files import read_json
from tpt_megatron.storage import Location


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a claim. `machine` tells machines and containers apart; `started` tells a process from a later one of its number."""

    worker: str
    host: str
    machine: str
    process: int
    started: float

    @classmethod
    def here(cls) -> Owner:
        """Return this process as an owner, under a name of its own."""
        process = os.getpid()
        return cls(uuid.uuid4().hex[:12], socket.gethostname(), _machine(), process, psutil.Process(process).create_time())

    def is_gone(self) -> bool:
        """Say whether this owner certainly runs no more: it ran on this machine, where no such process is left."""
        if self.machine != _machine():
            return False
        try:
            return bool(abs(psutil.Process(self.process).create_time() - self.started) > 1)
        except psutil.NoSuchProcess:
            return True


def _owner(claim: dict[str, Any]) -> Owner:
    return Owner(*(claim[key] for key in ("worker", "host", "machine", "process", "started")))


def _machine() -> str:
    """Return what tells this boot of this machine, and this container's process numbers, from any other's."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}-{uuid.getnode():x}-{psutil.boot_time():.0f}"


@dataclass(slots=True)
class Claim:
    """This worker's hold on one shard."""

    shard: int
    generation: int
    beat: int = 0


class Claims:
    """The claims of one output, seen by one worker."""

    def __init__(self, folder: Location, timeout_s: float, owner: Owner | None = None) -> None:
        self._folder = folder
        self._timeout_s = timeout_s
        self.owner = owner or Owner.here()
        self._latest: dict[int, int] = {}
        self._seen: dict[int, tuple[int, int, float]] = {}  # shard: generation, beat, when it was first seen (monotonic)
        self._alive_at: dict[int, float] = {}  # shard: when its holder was last known to live (monotonic)

    def look(self) -> None:
        """Read which claims there are."""
        self._latest = {}
        for name in self._folder.names():
            number, _, rest = name.partition(".")
            generation = rest.removesuffix(".json")
            if number.isdigit() and generation.isdigit():
                self._latest[int(number)] = max(int(generation), self._latest.get(int(number), 0))

    def take(self, shard: int) -> Claim | None:
        """Claim a shard, as `look` saw it last; None when another worker holds it or was faster."""
        generation = self._latest.get(shard)
        if generation is not None and not self._observe(shard, generation):
            return None
        claim = Claim(shard, 0 if generation is None else generation + 1)
        return claim if self._place(claim).create(self._content(claim)) else None

    def is_alive(self, shard: int) -> bool:
        """Say whether the holder of a shard is known to live: it runs on this machine, or its beat moved while this worker looked."""
        return time.monotonic() - self._alive_at.get(shard, -math.inf) <= self._timeout_s

    def holder(self, shard: int) -> str | None:
        """Return HOST:PROCESS of the worker that holds a shard and may be alive, as `look` saw it last; None where nobody does."""
        generation = self._latest.get(shard)
        value = None if generation is None else self._read(shard, generation)
        if value is None or value.get("released") or _owner(value).is_gone():
            return None
        return f"{value['host']}:{value['process']}"

    def renew(self, claim: Claim) -> bool:
        """Show that this worker is alive; False when the shard was taken over."""
        if self._place(Claim(claim.shard, claim.generation + 1)).is_file():
            return False
        claim.beat += 1
        self._place(claim).write(self._content(claim))
        return True

    def release(self, claim: Claim) -> None:
        """Give an unfinished shard up, so that another worker may take it at once."""
        self._place(claim).write(self._content(claim, released=True))

    def forget(self, shard: int) -> None:
        """Remove the claims of a finished shard."""
        for name in self._folder.names():
            if name.startswith(f"{shard:05d}."):
                (self._folder / name).remove()

    def _place(self, claim: Claim) -> Location:
        return self._folder / f"{claim.shard:05d}.{claim.generation:03d}.json"

    def _content(self, claim: Claim, *, released: bool = False) -> bytes:
        owner = self.owner
        return orjson.dumps(
            {
                "worker": owner.worker,
                "host": owner.host,
                "machine": owner.machine,
                "process": owner.process,
                "started": owner.started,
                "beat": claim.beat,
                "released": released,
            }
        )

    def _read(self, shard: int, generation: int) -> dict[str, Any] | None:
        """Return a claim's content; None when its shard was finished meanwhile, or when it is no claim."""
        try:
            value = read_json(self._place(Claim(shard, generation)))
        except DataError:
            return None
        return value if isinstance(value, dict) and {"worker", "host", "machine", "process", "started", "beat"} <= value.keys() else None

    def _observe(self, shard: int, generation: int) -> bool:
        """Look at a claim, remember what its holder shows of life, and say whether the shard may be taken over."""
        value = self._read(shard, generation)
        beat = -1
        if value is not None:
            owner = _owner(value)
            if value.get("released") or owner.is_gone():
                return True
            if owner.machine == self.owner.machine:
                self._alive_at[shard] = time.monotonic()
            beat = value["beat"]
        seen = self._seen.get(shard)
        if seen is None or seen[:2] != (generation, beat):
            self._seen[shard] = (generation, beat, time.monotonic())
            if seen is not None:
                self._alive_at[shard] = time.monotonic()
            return False
        return time.monotonic() - seen[2] > self._timeout_s
