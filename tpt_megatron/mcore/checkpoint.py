"""Checkpoints in megatron-core's torch_dist format: whole-tensor, so that any layout loads what any other wrote.

    DIR/iter_0000100/                        model, optimizer, and `tpt.json`, which says what they are
    DIR/latest_checkpointed_iteration.txt    the last complete one, as Megatron users expect

A folder gets its final name only when every rank has written and everything is on disk. The format pickles its metadata
(torch.distributed.checkpoint): load checkpoints that you trust only.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from tpt_megatron.errors import CheckpointError
from tpt_megatron.files import read_json, sync_tree, write_json, write_text
from tpt_megatron.mcore.engine import Engine
from tpt_megatron.storage import sync_folder

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT = 1


def iteration_folder(root: Path, step: int) -> Path:
    """Return the folder of one step's checkpoint."""
    return root / f"iter_{step:07d}"


def latest_step(root: Path) -> int | None:
    """Return the step of the last complete checkpoint under `root`, or None; CheckpointError for a damaged tracker."""
    tracker = root / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker}: expected a step number, found {text!r}; write the step of a complete checkpoint into it, or remove it to start anew")
    return int(text)


def save_checkpoint(engine: Engine, root: Path, step: int, description: Mapping[str, Any], attachments: Mapping[str, Path]) -> Path:
    """Save model and optimizer as `root`/iter_STEP and make it the latest. Every rank calls it; returns the folder.

    description: what goes into tpt.json beside format and step. attachments: files copied beside it, by name.
    """
    final = iteration_folder(root, step)
    temporary = root / f".{final.name}.tmp"  # one name for all ranks, who write into it together
    if dist.get_rank() == 0:
        for leftover in root.glob(".iter_*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    dist.barrier()
    metadata = _metadata()
    state = _sharded_state(engine, metadata, is_loading=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notes on its own deprecated calls, made by megatron-core
        dist_checkpointing.save(state, str(temporary), content_metadata={key: value for key, value in metadata.items() if key != "dp_cp_group"})
    dist.barrier()
    if dist.get_rank() == 0:
        for name, source in attachments.items():
            shutil.copyfile(source, temporary / name)
        write_json(temporary / "tpt.json", {"format": FORMAT, "step": step, **description})
        sync_tree(temporary)
        if final.exists():  # left by a run that died between the rename and the tracker
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync_folder(root)
        write_text(root / TRACKER, f"{step}\n")
    dist.barrier()
    return final


def read_description(folder: Path) -> dict[str, Any]:
    """Return tpt.json of a checkpoint; CheckpointError when the folder is no complete checkpoint of ours."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint")
    if not (folder / "tpt.json").is_file() or not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise CheckpointError(f"{folder}: not a complete checkpoint (tpt.json or metadata.json is missing); use another iter_ folder")
    description = read_json(folder / "tpt.json")
    if not isinstance(description, dict) or not {"format", "step", "model", "precision", "data"} <= description.keys():
        raise CheckpointError(f"{folder / 'tpt.json'}: not a checkpoint's description; it was damaged, use another iter_ folder")
    if description["format"] != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {description['format']!r}; this release reads format {FORMAT}")
    return dict(description)


def load_checkpoint(engine: Engine, folder: Path) -> None:
    """Load model and optimizer from a checkpoint written at any layout. CheckpointError when it does not fit or is damaged."""
    state = _sharded_state(engine, _metadata(), is_loading=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        # torch gathers the ranks' failures into one that is no Exception; its first line names the rank, the last the cause.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(f"{folder}: cannot be loaded ({lines[-1]}): it is damaged; write the step of an earlier iter_ folder into {TRACKER}") from error
    for name, chunk in _chunks(engine).items():
        chunk.load_state_dict(loaded[name])
    with torch.no_grad():
        engine.optimizer.load_state_dict(loaded["optimizer"])


def _sharded_state(engine: Engine, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _chunks(engine).items()}
    state["optimizer"] = engine.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _chunks(engine: Engine) -> dict[str, Any]:
    """Return this rank's parts of the model by the names that the distributed optimizer, too, looks for."""
    chunks = unwrap_model(engine.model)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _metadata() -> dict[str, Any]:
    """Say how tensors are laid out: layers stacked, optimizer state whole-tensor, so that every layout can be changed."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
