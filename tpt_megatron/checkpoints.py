"""Checkpoint folders as files: names, the tracker, which are complete, checksums, and which are kept.

    DIR/iter_0000100/                        a complete checkpoint: nothing else carries such a name
    DIR/iter_0000100/checksums.json          size and SHA-256 of every other file in it
    DIR/latest_checkpointed_iteration.txt    the one that a run continues from
    DIR/.iter_0000100.1f2e3d4c.tmp           half written, or half deleted; the middle part is of one start of a run alone

What is in the files is mcore's business (mcore/checkpoint.py) and convert's. A second copy elsewhere is mirror.py's.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
from pydantic import TypeAdapter, ValidationError

from tpt_megatron.config.checkpoint import CheckpointConfig
from tpt_megatron.errors import CheckpointError
from tpt_megatron.files import FileEntry, Place, describe_file, sha256_of, write_json
from tpt_megatron.storage import locate, sync_folder

TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
DESCRIPTION = "tpt.json"
IMPORTED = "hugging_face."
"""How names begin of the files that a model was imported with, config.json and tokenizer: an export of what was trained from it has them again."""
HASHED_AT_ONCE = 2
"""Files that one rank reads at a time: one core hashes about as fast as a disk reads."""


def iteration_folder(root: Path, step: int) -> Path:
    """Return the folder of one step's checkpoint."""
    return root / f"iter_{step:07d}"


def latest_step(root: Place) -> int | None:
    """Return the step that a run continues from, or None; CheckpointError for a damaged tracker."""
    tracker = locate(root) / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_bytes().decode(errors="replace").strip()
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker}: expected a step number, found {text[:40]!r}; write the step of a complete checkpoint into it, or remove it to start anew"
        )
    return int(text)


def finished_steps(root: Path) -> list[int]:
    """Return the steps of all folders that carry a finished checkpoint's name, in order."""
    return steps_of(path.name for path in root.glob("iter_*") if path.is_dir())


def steps_of(names: Iterable[str]) -> list[int]:
    """Return the steps of those names that are a finished checkpoint's, in order."""
    steps = (name.removeprefix("iter_") for name in names if name.startswith("iter_"))
    return sorted(int(step) for step in steps if step.isdecimal())


def way_out(folder: Path, *, resuming: bool) -> str:
    """Say what to do instead of loading `folder`, which is damaged: the last words of an error's line."""
    root, tracker = folder.parent, folder.parent / TRACKER
    name = folder.name.removeprefix("iter_")
    earlier = [step for step in finished_steps(root) if name.isdecimal() and step < int(name)]
    step = next((step for step in reversed(earlier) if _seems_complete(iteration_folder(root, step))), None)
    if not resuming:
        return "load another one" if step is None else f"the complete one before it is {iteration_folder(root, step)}: give that as checkpoint.load_from"
    if step is None:
        return f"no complete one is left before it; remove {tracker} to start anew"
    return f"the complete one before it is of step {step}: write {step} into {tracker} to continue from there"


def _seems_complete(folder: Path) -> bool:
    """Say whether every file is there with its size; nothing is read."""
    if not all((folder / name).is_file() for name in (DESCRIPTION, "metadata.json")):
        return False
    try:
        entries = read_checksums(folder) or []
    except CheckpointError:
        return False
    return all((folder / entry.name).is_file() and (folder / entry.name).stat().st_size == entry.bytes for entry in entries)


def write_checksums(folder: Path, known: Iterable[FileEntry]) -> None:
    """Write checksums.json of a folder's files; those that are not `known` already are read."""
    entries = {entry.name: entry for entry in known}
    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        described = pool.map(lambda name: entries.get(name) or describe_file(folder / name), names)
        write_json(folder / CHECKSUMS, [entry.model_dump() for entry in described])


def read_checksums(folder: Place) -> list[FileEntry] | None:
    """Return what checksums.json names, or None where there is none, as in the oldest checkpoints. CheckpointError when it is damaged."""
    path = locate(folder) / CHECKSUMS
    if not path.is_file():
        return None
    try:
        return TypeAdapter(list[FileEntry]).validate_python(orjson.loads(path.read_bytes()))
    except (orjson.JSONDecodeError, ValidationError):
        raise CheckpointError(f"{path}: not a list of files and their checksums, the file is damaged") from None


def damages(folder: Path, entries: Sequence[FileEntry], rank: int = 0, ranks: int = 1, *, sha256: Callable[[Path], str] = sha256_of) -> list[str]:
    """Read one rank's share of a checkpoint's files, the large ones dealt out first, and say what is wrong with them. `sha256` is how."""
    share = sorted(entries, key=lambda entry: (-entry.bytes, entry.name))[rank::ranks]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        return [said for said in pool.map(lambda entry: _damage(folder / entry.name, entry, sha256), share) if said is not None]


def _damage(path: Path, entry: FileEntry, sha256: Callable[[Path], str]) -> str | None:
    if not path.is_file():
        return f"{path}: the file is missing"
    if (size := path.stat().st_size) != entry.bytes:
        return f"{path}: the file is damaged: it has {size} bytes, {CHECKSUMS} says {entry.bytes}"
    if sha256(path) != entry.sha256:
        return f"{path}: the file is damaged: its SHA-256 is not the one in {CHECKSUMS}"
    return None


def temporary_folder(folder: Path, token: str) -> Path:
    """Return the name of `folder` while it is being written; `token` is of one start of a run."""
    return folder.with_name(f".{folder.name}.{token}.tmp")


def discard(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that a deletion that is cut short leaves nothing that looks finished."""
    nameless = temporary_folder(folder, uuid.uuid4().hex)
    os.rename(folder, nameless)
    sync_folder(folder.parent)
    shutil.rmtree(nameless, ignore_errors=True)  # what a reader holds open on a network disk goes at the next start


def remove_leftovers(root: Path) -> None:
    """Delete what killed runs left half written or half deleted."""
    for leftover in root.glob(".iter_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def to_discard(steps: Sequence[int], losses: Mapping[int, float], rules: CheckpointConfig) -> list[int]:
    """Return which of the complete checkpoints `steps` need not be kept; their last is the one that was just made the latest.

    losses: validation loss by step, of those that have one. The one before the latest always stays: another process may have
    read the tracker a moment ago and be half way through loading it.
    """
    if not rules.keep_last:
        return []
    steps = sorted(steps)
    kept = set(steps[-max(rules.keep_last, 2) :])
    if rules.keep_every_steps:
        kept.update(step for step in steps if step % rules.keep_every_steps == 0)
    kept.update(sorted((step for step in steps if step in losses), key=lambda step: (losses[step], step))[: rules.keep_best])
    return [step for step in steps if step not in kept]
