"""Checkpoints in megatron-core's torch_dist format: whole-tensor, so that any layout loads what any other wrote.

Writing is the same whether training waits for it or not: each rank forks a writer from what it holds, and a fork sees memory
as it was. When the writers of all ranks are done, one rank completes the folder and gives it its name (checkpoints.py says
which files there are). The format pickles its metadata (torch.distributed.checkpoint): load checkpoints that you trust only.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy, get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper, FullyParallelSaveStrategyWrapper
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from tpt_megatron.checkpoints import (
    CHECKSUMS,
    DESCRIPTION,
    TRACKER,
    damages,
    discard,
    iteration_folder,
    read_checksums,
    remove_leftovers,
    temporary_folder,
    write_checksums,
)
from tpt_megatron.errors import CheckpointError, TptError
from tpt_megatron.files import FileEntry, describe_file, read_json, sync_tree, write_json, write_text
from tpt_megatron.mcore.engine import Engine
from tpt_megatron.mcore.groups import ask_rank_0
from tpt_megatron.processes import die_with_parent
from tpt_megatron.storage import sync_folder

log = logging.getLogger(__name__)

FORMAT = 1


class CheckpointWriter:
    """Saves one engine's model and optimizer under `root`. Every rank has one, and calls the same methods at the same points.

    Methods raise CheckpointError, on every rank, when a checkpoint could not be written; those before it are untouched.
    """

    def __init__(self, engine: Engine, root: Path, completed: Callable[[int], None] = lambda step: None) -> None:
        """Remove what killed runs left in `root`. `completed` is called on rank 0 with the step of a checkpoint that became the latest."""
        self._engine, self._root, self._completed = engine, root, completed
        # Replicas are dealt out, so that data-parallel ranks write different tensors at the same time.
        self._strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _replicas(), do_cache_distribution=True)
        # Not the persistent one: on a CPU it shares memory with the trainer, and writes weights that have changed since.
        self._calls = AsyncCallsQueue(persistent=False)
        self._is_first = True
        token = [uuid.uuid4().hex[:8]]
        dist.broadcast_object_list(token, src=0)
        self._token = token[0]  # so that nothing of an earlier start of this run can write into our folders
        _on_rank_0(f"{root}: cannot be cleaned up", lambda: remove_leftovers(root))

    def save(self, step: int, description: Mapping[str, Any], attachments: Mapping[str, Path]) -> None:
        """Begin to write what the engine holds as `root`/iter_STEP. Waits for the one under way; the engine may go on when this returns.

        description: what goes into tpt.json beside format and step. attachments: files copied beside it, by name.
        """
        self.wait()
        began = time.monotonic()
        final = iteration_folder(self._root, step)
        temporary = temporary_folder(final, self._token)

        def describe() -> None:
            for name, source in attachments.items():
                shutil.copyfile(source, temporary / name)
            write_json(temporary / DESCRIPTION, {"format": FORMAT, "step": step, **description})

        failed = f"{temporary}: cannot be written"
        _on_rank_0(failed, lambda: temporary.mkdir(parents=True))
        metadata = _metadata()
        self._engine.gather_parameters()
        state = _sharded_state(self._engine, metadata, is_loading=False)
        results = filesystem_async._results_queue = _WriterResults(temporary)
        with _reported(failed, self._root):
            request = dist_checkpointing.save(
                state,
                str(temporary),
                self._strategy,
                validate_access_integrity=self._is_first,
                async_sharded_save=True,
                content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"},
            )
            assert request is not None
            self._is_first = False
            _on_rank_0(failed, describe)
            request.add_finalize_fn(partial(self._complete, temporary, final, step, results, began))
            if request.async_fn is not None:  # else other ranks write all that this one holds
                request = request._replace(async_fn=partial(_write_unless_orphaned, os.getpid(), request.async_fn))
            self._calls.schedule_async_request(request)

    def poll(self) -> None:
        """Complete the checkpoint under way if its writers are done. Costs nothing when there is none."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Complete the checkpoint under way, if any."""
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._calls.get_num_unfinalized_calls():
            with _reported(f"{self._root}: a checkpoint could not be written, those before it are untouched", self._root):
                self._calls.maybe_finalize_async_calls(blocking=blocking)

    def _complete(self, temporary: Path, final: Path, step: int, results: _WriterResults, began: float) -> None:
        """Give the folder its name and make it the latest, now that every rank has written."""
        written: list[list[FileEntry]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(written, results.files)

        def complete() -> None:
            write_checksums(temporary, [entry for entries in written for entry in entries])
            sync_tree(temporary)
            if final.exists():  # of a run that was taken back to an earlier step, or died before the tracker was written
                discard(final)
            os.rename(temporary, final)
            sync_folder(self._root)
            write_text(self._root / TRACKER, f"{step}\n")
            log.info("%s: complete, %.1f s after it was begun", final, time.monotonic() - began)
            self._completed(step)

        _on_rank_0(f"{final}: cannot be completed", complete)


class _WriterResults:
    """How the writer of one rank tells its trainer what it wrote: in memory that they share, of any length, even where the disk is full.

    In the place of megatron-core's queue (filesystem_async.py), which is a process for every rank that imports the main module anew and
    outlives a killed trainer; a pipe would be full before the trainer reads it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # macOS has no memory files.
        self._file: IO[bytes] = open(os.memfd_create("results"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115
        self.files: list[FileEntry] = []
        """What was written, once `get_nowait` was called. The writer has just written it: reading it anew costs no disk."""

    def put(self, results: dict[int, list[Any]] | Exception) -> None:
        """Tell what was written, or why it was not. Called by the writer, once."""
        names = set() if isinstance(results, Exception) else {result.storage_data.relative_path for part in results.values() for result in part}
        pickle.dump((results, [describe_file(self._folder / name) for name in sorted(names)]), self._file)
        self._file.flush()

    def get_nowait(self) -> dict[int, list[Any]] | Exception:
        """Return what the writer told; queue.Empty when it died before."""
        with self._file as file:
            file.seek(0)
            try:
                results, self.files = pickle.load(file)
            except (EOFError, pickle.UnpicklingError):
                raise queue.Empty from None
        return results  # type: ignore[no-any-return]


def _write_unless_orphaned(trainer: int, write: Callable[..., None], *args: Any) -> None:
    """Write, in a process forked for it, and end with the trainer: nobody would complete the folder."""
    die_with_parent(trainer)
    write(*args)


def read_description(folder: Path, way_out: str) -> dict[str, Any]:
    """Return tpt.json of a checkpoint; CheckpointError when the folder is no complete checkpoint of ours. way_out: what its line ends with."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint; {way_out}")
    if not (folder / DESCRIPTION).is_file() or not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise CheckpointError(f"{folder}: not a complete checkpoint ({DESCRIPTION} or metadata.json is missing); {way_out}")
    entries = _checksums(folder, way_out) or []
    for problem in damages(folder, [entry for entry in entries if entry.name == DESCRIPTION]):
        raise CheckpointError(f"{problem}; {way_out}")
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or not {"format", "step", "model", "precision", "data"} <= description.keys():
        raise CheckpointError(f"{folder / DESCRIPTION}: not a checkpoint's description, it was damaged; {way_out}")
    if description["format"] != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {description['format']!r}; this release reads format {FORMAT}")
    return dict(description)


def load_checkpoint(engine: Engine, folder: Path, way_out: str, *, weights_only: bool = False) -> None:
    """Load model and optimizer, or the model alone, from a checkpoint written at any layout. Every rank calls it.

    CheckpointError when it does not fit or is damaged, before anything of it is unpickled. way_out: what the error's line ends with.
    """
    _verify(folder, way_out)
    state = _model_state(engine, _metadata()) if weights_only else _sharded_state(engine, _metadata(), is_loading=True)
    # Each replica reads a part and gets the rest from the others: a file is read once, not once a rank.
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _replicas())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left_out = {name: _leave_out_scaling(state[name], folder, everything=weights_only) for name in _chunks(engine)}
            loaded = dist_checkpointing.load(state, str(folder), strategy)
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        # torch gathers the ranks' failures into one that is no Exception; its first line names the rank, the last the cause.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(f"{folder}: cannot be loaded ({lines[-1]}); {way_out}") from error
    for name, chunk in _chunks(engine).items():
        chunk.load_state_dict(dict.fromkeys(left_out[name]) | loaded[name])
    if weights_only:
        engine.load_parameters(loaded, weights_only=True)
        return
    try:
        with torch.no_grad():
            engine.optimizer.load_state_dict(loaded["optimizer"])
            engine.load_parameters(loaded, weights_only=False)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its optimizer's state does not fit this layout's ({error}); set parallel.distributed_optimizer and parallel.expert_parallel "
            "as they were, or begin another run with checkpoint.load_from and checkpoint.load=weights"
        ) from error


def _leave_out_scaling(chunk_state: dict[str, Any], folder: Path, *, everything: bool) -> list[str]:
    """Remove Transformer Engine's scaling from a chunk's state, all of it or what the checkpoint does not have; return the keys.

    It belongs to a precision and not to the weights: a module begins anew without. A checkpoint that was written on a CPU has none of norms.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    scaling = {key: value for key, value in chunk_state.items() if isinstance(value, ShardedObject) and key.endswith("_extra_state")}
    keys = [key for key, value in scaling.items() if everything or value.unique_key not in saved]
    for key in keys:
        del chunk_state[key]
    return keys


def _verify(folder: Path, way_out: str) -> None:
    """Compare every file with its checksum, each rank a share of them."""
    entries = _checksums(folder, way_out)
    if entries is None:
        log.info("%s: it has no %s, as the oldest checkpoints have none; loaded without verifying it", folder, CHECKSUMS)
        return
    began = time.monotonic()
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, damages(folder, entries, dist.get_rank(), dist.get_world_size()))
    problems = [problem for of_rank in found for problem in of_rank]
    if problems:
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{problems[0]}{others}; {way_out}")
    log.info("%s: %.3f GB verified in %.1f s", folder, sum(entry.bytes for entry in entries) / 1e9, time.monotonic() - began)


def _checksums(folder: Path, way_out: str) -> list[FileEntry] | None:
    try:
        return read_checksums(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {way_out}") from None


def _on_rank_0(failed: str, call: Callable[[], None]) -> None:
    """Have rank 0 do something, and every rank know when it did not work: `failed` begins the error's line."""

    def ask() -> None:
        try:
            call()
        except (OSError, TptError) as error:
            said = f"{failed} ({error.strerror or error})" if isinstance(error, OSError) else str(error)
            raise CheckpointError(f"{said}; make room or mend it, then run the same command again to continue from the last complete checkpoint") from error

    ask_rank_0(ask)


@contextmanager
def _reported(failed: str, disk: Path) -> Iterator[None]:
    """Turn torch's gathered failures of ranks into one line, and keep its notes on its own deprecated calls to itself. disk: where it writes to."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        causes = [str(failure[0]) for failure in error.failures.values()] or ["see the first rank's error"]
        # Of a full disk torch's own writer says no more than that it is at another byte than it thought.
        free = f"{shutil.disk_usage(disk).free / 1e6:,.1f} MB are free there"
        raise CheckpointError(f"{failed} ({causes[0]}; {free}); run the same command again to continue from the last complete checkpoint") from error


def _sharded_state(engine: Engine, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    state = _model_state(engine, metadata)
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _model_state(engine: Engine, metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _chunks(engine).items()}


def _chunks(engine: Engine) -> dict[str, Any]:
    """Return this rank's parts of the model by the names that the distributed optimizer, too, looks for."""
    chunks = unwrap_model(engine.model)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _replicas() -> dist.ProcessGroup:
    """Return the group of the ranks that hold the same weights as this one."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)  # type: ignore[no-any-return]


def _metadata() -> dict[str, Any]:
    """Say how tensors are laid out: layers stacked, optimizer state whole-tensor, so that every layout can be changed."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _replicas(),
    }
