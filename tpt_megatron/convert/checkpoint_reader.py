"""Reading megatron-core's torch_dist checkpoints with torch alone: no megatron, no process group, no model, no GPU.

Tensors are read one at a time, stacked ones layer by layer, so that memory holds little more than what is asked for.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import IO, Any, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tpt_megatron.checkpoints import DESCRIPTION, TRACKER, iteration_folder
from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.streaming import StreamedView
from tpt_megatron.errors import CheckpointError

FORMAT = 1


class ChatRecord(BaseModel):
    """How the chats of the run's data were written."""

    model_config = ConfigDict(frozen=True)

    template: str
    end_of_turn_id: int | None


class TokenizerRecord(BaseModel):
    """The tokenizer that made the run's data, as `tpt.json` names it."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    end_of_document: str
    eod_id: int
    vocabulary_size: int
    chat: ChatRecord | None = None


class CheckpointRecord(BaseModel):
    """`tpt.json`: what a checkpoint is, and of which model."""

    model_config = ConfigDict(frozen=True)

    format: int
    step: int
    tokens_seen: int
    model: ModelConfig
    sequence_length: int
    precision: str
    tokenizer: TokenizerRecord | None = None
    arm: str | None = None
    data: Any = None


def iteration_folders(checkpoints: Path) -> list[Path]:
    """Return the `iter_*` folders of a checkpoints folder that carry a finished checkpoint's record, in the order of their steps."""
    return sorted(path for path in checkpoints.glob("iter_*") if path.is_dir() and (path / DESCRIPTION).is_file())


def find_checkpoint(path: Path) -> Path:
    """Return the `iter_*` folder that `path` stands for: itself, or the latest one of a checkpoints or run folder.

    Raises CheckpointError when there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder; give RUN_DIR/checkpoints/iter_0000100, its parent, or the run folder")
    if (path / ".metadata").exists() or path.name.startswith("iter_"):
        return path
    checkpoints = path if (path / TRACKER).is_file() else path / "checkpoints"
    latest = checkpoints / TRACKER
    if not latest.is_file():
        raise CheckpointError(f"{path}: holds no checkpoint ({TRACKER} is neither there nor in checkpoints/); was the run stopped before it saved one?")
    text = latest.read_text(errors="replace").strip()
    if not text.isdecimal():
        raise CheckpointError(f"{latest}: expected a step number, found {text[:40]!r}; name an iter_* folder instead")
    folder = iteration_folder(checkpoints, int(text))
    if not folder.is_dir():
        raise CheckpointError(f"{latest}: names {folder.name}, which is not there; name another iter_* folder of {checkpoints}")
    return folder


def read_record(checkpoint: Path) -> CheckpointRecord:
    """Read `tpt.json` of an `iter_*` folder; CheckpointError when it is missing, damaged or of another format."""
    path = checkpoint / DESCRIPTION
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is incomplete, or another program wrote it") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); the checkpoint is damaged") from None
    found = value.get("format") if isinstance(value, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format {found!r} is not supported (this release reads {FORMAT})")
    try:
        record = CheckpointRecord.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}; the checkpoint is damaged") from None
    if record.model.vocab_size == 0:
        raise CheckpointError(f"{path}: model.vocab_size is 0; the checkpoint does not say its vocabulary's size")
    return record


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of one tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The tensors of one `iter_*` folder, by key. Every damage is a CheckpointError that names the file."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self._metadata = _read_metadata(checkpoint)
        self.tensors: dict[str, StoredTensor] = {
            key: StoredTensor(tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, key: str, place: tuple[int, ...] = ()) -> torch.Tensor:
        """Return the whole tensor, or the slice at `place` of its first axes. `key` must be one of `tensors`.

        Memory holds what is asked for, and beside it a part of it at a time where it was written in parts.
        """
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata), key
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        offsets[: len(place)], sizes[: len(place)] = place, [1] * len(place)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        if sum(item.lengths.numel() for item in items) != chunk.sizes.numel():
            raise CheckpointError(f"{self.path}: parts of {key} are missing; the checkpoint is incomplete, use another one")
        with _damage_is_an_error(self.path, key):
            if len(items) == 1:
                target = self._stored(items[0], entry.properties.dtype)
            else:
                target = torch.empty(sizes, dtype=entry.properties.dtype)
                for item in items:
                    narrow_tensor_by_index(target, item.dest_offsets, item.lengths).copy_(self._stored(item, target.dtype))
        return target[(0,) * len(place)]

    def _stored(self, item: ReadItem, dtype: torch.dtype) -> torch.Tensor:
        """Return one part as it was written. torch's own reader copies it once more."""
        assert self._metadata.storage_data is not None
        at = self._metadata.storage_data[item.storage_index]
        with StreamedView(self.path / at.relative_path, at.offset, at.length) as file:
            tensor: torch.Tensor = torch.load(cast(IO[bytes], file), map_location="cpu", weights_only=True)
        if tensor.dtype != dtype:
            raise ValueError(f"a part is {tensor.dtype}")
        return narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)


@contextmanager
def _damage_is_an_error(checkpoint: Path, what: str) -> Iterator[None]:
    """Turn what torch and pickle raise on missing or damaged files into one CheckpointError."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint}: {Path(str(error.filename)).name} is missing; the checkpoint is incomplete, use another one") from None
    except (OSError, RuntimeError, EOFError, ValueError, AssertionError, LookupError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{checkpoint}: {what} cannot be read, the checkpoint is damaged ({reason})") from None


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` with the classes that it consists of and no others: a pickle could otherwise run any code."""

    _ALLOWED = frozenset({("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set")})
    _MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "planner", "filesystem"))

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name == "PosixPath":
            return PosixPath
        found = super().find_class(module, name) if (module, name) in self._ALLOWED or module in (*self._MODULES, "torch") else None
        if (module, name) in self._ALLOWED or isinstance(found, torch.dtype) or (module in self._MODULES and isinstance(found, type)):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint holds")


def _read_metadata(checkpoint: Path) -> Metadata:
    with _damage_is_an_error(checkpoint, ".metadata"), open(checkpoint / ".metadata", "rb") as file:
        metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not all(isinstance(index, MetadataIndex) for index in metadata.storage_data or ()):
            raise ValueError("it does not describe tensors")
        return metadata
