"""A run's checkpoints once more, on object storage or another disk: how they get there, and back onto a machine that has none.

    MIRROR/iter_0000100/                        the files of RUN/checkpoints/iter_0000100
    MIRROR/iter_0000100/checksums.json          uploaded last, removed first: without it a folder is half uploaded, or half deleted
    MIRROR/latest_checkpointed_iteration.txt    the one that a run continues from
    RUN/checkpoints/mirrored.json               which that was when this folder last uploaded or fetched one

A trainer runs this module as a process (train/mirroring.py) for each thing that it wants of a store, so that it holds no connections
and no threads of a client library when it forks, and gives no time to uploads. A run is the only one that writes to its mirror.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from tpt_megatron.checkpoints import (
    CHECKSUMS,
    DESCRIPTION,
    TRACKER,
    damages,
    discard,
    finished_steps,
    iteration_folder,
    latest_step,
    read_checksums,
    steps_of,
    temporary_folder,
    to_discard,
)
from tpt_megatron.config.checkpoint import CheckpointConfig
from tpt_megatron.errors import CheckpointError, ConfigError, TptError, UsageError
from tpt_megatron.files import read_json, sync_tree, write_json, write_text
from tpt_megatron.log import set_up_logging
from tpt_megatron.processes import die_with_parent
from tpt_megatron.storage import Location, explain, locate, sync_folder

log = logging.getLogger("tpt_megatron.mirror")  # by which it is called when it runs as a process, too

NOTE = "mirrored.json"
FILES_AT_ONCE = 2
"""Files that are copied at a time; a client library may hold ten parts of 50 MB of each."""


class Mirror:
    """The checkpoints at `place`, and those of `root`, a run's own folder of them. CheckpointError for what is damaged; a store raises its own errors."""

    def __init__(self, place: Location, root: Path) -> None:
        self._place, self._root = place, root

    def check(self) -> None:
        """Refuse a place that cannot be written to (CheckpointError), or that is the run's own folder (ConfigError)."""
        own = locate(self._root)
        if self._place.contains(own) or own.contains(self._place):
            raise ConfigError(f"checkpoint.mirror={self._place} is where the run's own checkpoints are, {self._root}; give another disk, or a URL")
        with _explained(f"checkpoint.mirror={self._place}: it cannot be written to"):
            probe = self._place / ".write_test"
            probe.write(b"written and removed at the start of a run\n")
            probe.remove()
        try:
            self._place.remove_unfinished_uploads()
        except OSError as error:  # some stores do not offer it, or not to everybody
            log.warning("%s: parts of uploads that were killed cannot be removed (%s); let the store remove them after some days", self._place, explain(error))

    def complete_steps(self) -> list[int]:
        """Return the steps of the mirrored checkpoints that are complete, in order."""
        return [step for step in steps_of(self._place.names()) if (self._there(step) / CHECKSUMS).is_file()]

    def newest(self) -> int | None:
        """Return the step that the mirror's tracker names, or of the last complete checkpoint before it; None where there is none."""
        named = latest_step(self._place)
        return max((step for step in self.complete_steps() if named is None or step <= named), default=None)

    def ahead(self) -> int | None:
        """Return the step to fetch before the run continues; None when what it has itself is what it continues from.

        A mirror that is ahead of the run's own tracker was either written by another machine, and then this disk is stale; or it is as this
        folder left it, and a person has set the tracker back since. The note tells which.
        """
        theirs, ours = self.newest(), latest_step(self._root)
        if theirs is None or (ours is not None and theirs <= ours):
            return None
        if ours is not None and self._noted() == theirs:
            log.warning("%s: it names step %d: continuing from there, not from step %d, which %s has", self._root / TRACKER, ours, theirs, self._place)
            return None
        return theirs

    def description(self, step: int) -> dict[str, Any]:
        """Return tpt.json of a mirrored checkpoint, its checksum compared."""
        there = self._there(step)
        sums = {entry.name: entry.sha256 for entry in read_checksums(there) or []}
        description = (there / DESCRIPTION).read_bytes()
        if hashlib.sha256(description).hexdigest() != sums.get(DESCRIPTION):
            raise CheckpointError(f"{there / DESCRIPTION}: it is not what {CHECKSUMS} says; {self._way_out(step)}")
        return dict(orjson.loads(description))

    def fetch(self, step: int) -> None:
        """Make a mirrored checkpoint the run's own latest."""
        try:
            fetch_checkpoint(self._there(step), iteration_folder(self._root, step))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._way_out(step)}") from None
        write_text(self._root / TRACKER, f"{step}\n")
        self._note(step)  # after it: a start between the two would take the tracker for set back

    def follow(self, rules: CheckpointConfig) -> None:
        """Upload what the run has and the mirror has not, the latest first, and remove what need not be kept there."""
        latest = latest_step(self._root)
        if latest is None:
            return
        ours = {step for step in finished_steps(self._root) if step <= latest}
        theirs = {step for step in self.complete_steps() if step <= latest}
        for step in sorted(ours - self._superfluous(ours | theirs, rules), reverse=True):
            is_there = self._upload(step)
            if step == latest and is_there:
                self._note(step)
                (self._place / TRACKER).write(b"%d\n" % step)
                self._tidy(ours, latest, rules)
            if latest_step(self._root) != latest:
                return  # a newer one is waiting, which goes first
        self._tidy(ours, latest, rules)

    def _upload(self, step: int) -> bool:
        """Upload one checkpoint unless it is there; say whether it is there now. It is not when the run deletes it meanwhile."""
        folder, there = iteration_folder(self._root, step), self._there(step)
        marker = there / CHECKSUMS
        if marker.is_file() and _content(folder / CHECKSUMS) == marker.read_bytes():
            return True
        began = time.monotonic()
        with _held(folder) as held:
            entries = None if held is None else read_checksums(held)
            if held is None or entries is None:
                return False
            marker.remove()
            there.remove()  # half of it, or one of a past that was taken back
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                list(pool.map(lambda entry: (there / entry.name).upload(held / entry.name), entries))
            sizes = there.sizes()
            for entry in entries:
                if sizes.get(entry.name) != entry.bytes:
                    raise CheckpointError(f"{there / entry.name}: {sizes.get(entry.name)} bytes came there of {entry.bytes}")
            marker.write((held / CHECKSUMS).read_bytes())
        log.info("%s: copied to %s, %.3f GB in %.1f s", folder, there, sum(entry.bytes for entry in entries) / 1e9, time.monotonic() - began)
        return True

    def _tidy(self, ours: set[int], latest: int, rules: CheckpointConfig) -> None:
        """Remove half uploads that nobody will finish, and checkpoints that need not be kept."""
        complete = {*self.complete_steps()}
        for step in {*steps_of(self._place.names())} - complete - ours:
            self._there(step).remove()
        for step in self._superfluous({step for step in complete if step <= latest}, rules):
            there = self._there(step)
            (there / CHECKSUMS).remove()
            there.remove()
            log.info("%s: deleted, it need not be kept", there)

    def _superfluous(self, steps: set[int], rules: CheckpointConfig) -> set[int]:
        losses = {}
        for step in steps if rules.keep_best else ():
            path = locate(iteration_folder(self._root, step)) / DESCRIPTION
            loss = read_json(path if path.is_file() else self._there(step) / DESCRIPTION).get("validation_loss")
            if loss is not None:
                losses[step] = float(loss)
        return {*to_discard(sorted(steps), losses, rules)}

    def _there(self, step: int) -> Location:
        return self._place / iteration_folder(self._root, step).name

    def _way_out(self, step: int) -> str:
        before = [other for other in self.complete_steps() if other < step]
        tracker = self._place / TRACKER
        return f"write {before[-1]}, the complete one before it, into {tracker}" if before else f"remove what is in {self._place} to start anew"

    def _note(self, step: int) -> None:
        write_json(self._root / NOTE, {"mirror": str(self._place), "step": step})

    def _noted(self) -> int | None:
        path = self._root / NOTE
        note = read_json(path) if path.is_file() else {}
        return int(note["step"]) if note.get("mirror") == str(self._place) else None


def fetch_checkpoint(source: Location, final: Path) -> None:
    """Copy a complete checkpoint to the folder `final`, every file verified, over any that is there. CheckpointError when it is not whole."""
    entries = read_checksums(source)
    if entries is None:
        raise CheckpointError(f"{source}: no complete checkpoint is there ({CHECKSUMS} is missing)")
    for entry in entries:
        if Path(entry.name).name != entry.name:
            raise CheckpointError(f"{source / CHECKSUMS}: it names {entry.name!r}, which is no file of that folder")
    checksums = (source / CHECKSUMS).read_bytes()
    if (final / CHECKSUMS).is_file() and (final / CHECKSUMS).read_bytes() == checksums:
        return
    began = time.monotonic()
    temporary = temporary_folder(final, "fetched")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with _explained(f"{source}: it cannot be fetched"), ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda entry: (source / entry.name).download(temporary / entry.name), entries))
        for problem in damages(temporary, entries):
            raise CheckpointError(f"{source}: what was fetched is not what {CHECKSUMS} says ({problem})")
        (temporary / CHECKSUMS).write_bytes(checksums)
        sync_tree(temporary)
        if final.exists():
            discard(final)
        os.rename(temporary, final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s: fetched from %s, %.3f GB in %.1f s", final, source, sum(entry.bytes for entry in entries) / 1e9, time.monotonic() - began)


@contextmanager
def _held(folder: Path) -> Iterator[Path | None]:
    """Yield a hidden folder with links to the files of `folder`, which the run may delete or replace meanwhile; None when it just did."""
    held = temporary_folder(folder, uuid.uuid4().hex)
    try:
        held.mkdir()
        try:
            # By the folder itself and not by its name, which another checkpoint may take.
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for name in os.listdir(descriptor):
                    os.link(name, held / name, src_dir_fd=descriptor)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            yield None
            return
        yield held
    finally:
        shutil.rmtree(held, ignore_errors=True)


@contextmanager
def _explained(failed: str) -> Iterator[None]:
    """Turn what a store or the system raises into one line that begins with `failed`."""
    try:
        yield
    except TptError:
        raise
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        raise CheckpointError(f"{failed} ({line})") from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _answer(task: str, *arguments: str) -> dict[str, Any]:
    """Do what a trainer asks for, and return what it is told.

    check MIRROR ROOT         whether checkpoints can be kept there, and which is to be fetched: `fetch`, with its `description`
    fetch MIRROR ROOT STEP    that one
    follow MIRROR ROOT RULES  upload and remove what differs
    copy SOURCE ROOT          any checkpoint, complete, to a folder of its name in ROOT: `folder`. SOURCE may be a folder of checkpoints: its latest
    """
    if task == "copy":
        source = locate(arguments[0])
        latest = latest_step(source)
        source = source if latest is None else source / iteration_folder(Path(), latest).name
        folder = Path(arguments[1]) / source.name
        fetch_checkpoint(source, folder)
        return {"folder": str(folder)}
    mirror = Mirror(locate(arguments[0]), Path(arguments[1]))
    if task == "check":
        mirror.check()
        step = mirror.ahead()
        return {"fetch": step, "description": None if step is None else mirror.description(step)}
    if task == "fetch":
        mirror.fetch(int(arguments[2]))
    else:
        mirror.follow(CheckpointConfig.model_validate_json(arguments[2]))
    return {}


def main(parent: int, *arguments: str) -> None:
    """Answer on standard output, as JSON: `problem` is why it was not done, in one line, and `is_usage` whether the config is at fault."""
    die_with_parent(parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # sent to all of a job's processes; the trainer says when to end
    os.nice(10)  # training goes first
    set_up_logging()
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # a broken connection's traceback, beside the error that comes here
    try:
        answer = _answer(*arguments)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        answer = {"problem": line, "is_usage": isinstance(error, UsageError)}
    sys.stdout.buffer.write(orjson.dumps(answer))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
