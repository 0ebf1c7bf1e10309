"""Hugging Face folder to checkpoint: tensor by tensor, without a model, megatron or a GPU. Training starts from it by `checkpoint.load: weights`."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol, cast

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from tpt_megatron.checkpoints import DESCRIPTION, IMPORTED, TRACKER, finished_steps, iteration_folder, latest_step, write_checksums
from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.checkpoint_reader import FORMAT
from tpt_megatron.convert.families.rules import EMBEDDING, OUTPUT, Family, Piece, Shape, pieces
from tpt_megatron.convert.hugging_face import CONFIG, HuggingFaceTensors, as_type, kept_files, model_of, read_config
from tpt_megatron.convert.streaming import Budget, StreamedWriter
from tpt_megatron.errors import ConversionError, MachineError, UsageError
from tpt_megatron.files import FileEntry, remove_stale_neighbours, whole_folder, write_json, write_text
from tpt_megatron.log import progress_bar

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EMBEDDING, _OUTPUT = *EMBEDDING.parts, *OUTPUT.parts
_THREADS = 2
"""Files written at a time; each is hashed by the thread that writes it, which takes longer than writing."""
_MARGIN = 1.02
"""Free space that is asked for, over the bytes of the tensors: for headers, configs and the tokenizer."""


class Tensors(Protocol):
    """Where a model's tensors come from, by their Hugging Face names."""

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        ...


def import_model(source: Path, output: Path, dtype: str | None = None, check: Callable[[Path], object] = lambda folder: None) -> Path:
    """Write a Hugging Face model folder as a checkpoint of step 0 under `output`, and return its `iter_*` folder. It appears whole or not at all.

    `dtype` is fp32, bf16 or fp16; None keeps what is there. `check` is given the finished folder before it has its name, and refuses it by raising.
    Memory: twice the largest tensor of the checkpoint, or of a layer of it.

    Raises UsageError for a wrong dtype or an output that is in use, ConversionError for a folder that is damaged, incomplete or has what
    cannot be expressed, MachineError when the disk has no room.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}, or none to keep the model's")
    config = read_config(source)
    family, model = model_of(config, source / CONFIG)
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        raise ConversionError(f"{source / CONFIG}: max_position_embeddings={positions!r}: expected a whole number over 0")
    tensors, kept = HuggingFaceTensors(source), kept_files(source)
    table = list(pieces(family.rules_of(model), model))
    _check_tensors(tensors, family, model, table, source)
    precision = dtype or _common_dtype(tensors, source)
    folder = iteration_folder(output, 0)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output}: is not a folder; name another one")
    if finished_steps(output) or latest_step(output):
        raise UsageError(f"{output}: holds checkpoints already; name another folder")
    remove_stale_neighbours(folder)
    check_room(output, sum(torch.Size(piece.shape).numel() for piece in table) * DTYPES[precision].itemsize)
    description = {
        "format": FORMAT,
        "step": 0,
        "tokens_seen": 0,
        "model": model.model_dump(mode="json"),
        "sequence_length": positions,
        "precision": precision,
        "arm": None,
        "tokenizer": None,
        "data": None,
    }
    is_new = not output.exists()
    try:
        with whole_folder(folder) as temporary:
            widest = max(tensors.dtypes.values(), key=lambda kind: kind.itemsize)
            entries = write_checkpoint(temporary, tensors, model, table, DTYPES[precision], widest)
            for path in kept:
                shutil.copyfile(path, temporary / f"{IMPORTED}{path.name}")
            write_json(temporary / DESCRIPTION, description)
            write_checksums(temporary, entries)
            check(temporary)
            write_text(output / TRACKER, "0\n")  # before the folder has its name: killed in between, the same command begins anew
    except BaseException as error:
        if not folder.exists():  # a signal may have come when it just had its name
            (output / TRACKER).unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):
                    output.rmdir()
        if isinstance(error, OSError):
            raise MachineError(f"{output}: cannot be written: {error.strerror or error}; nothing was left behind") from None
        raise
    return folder


def _check_tensors(tensors: HuggingFaceTensors, family: Family, model: ModelConfig, table: list[Piece], source: Path) -> None:
    """Compare what is there with what the config asks for, before anything is written."""
    expected: dict[str, Shape] = {name: shape for piece in table for name, shape in piece.parts.items()}
    found = dict(tensors.shapes)
    if model.tie_embeddings:  # some folders have it twice
        output = found.pop(_OUTPUT, None)
        # transformers unties them where they differ.
        if output is not None and (output != found.get(_EMBEDDING) or not torch.equal(tensors.read(_OUTPUT), tensors.read(_EMBEDDING))):
            raise ConversionError(f"{source}: {_OUTPUT} is not {_EMBEDDING}, though {CONFIG} ties them; set tie_word_embeddings=false there, or remove it")
    if missing := [name for name in expected if name not in found]:
        raise ConversionError(f"{source}: tensors of a {family.model_type} are missing: {_some(missing)}")
    if unknown := [name for name in found if name not in expected]:
        raise ConversionError(f"{source}: tensors that a {family.model_type} has no place for: {_some(unknown)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ConversionError(f"{source}: {name} has shape {list(found[name])}, {CONFIG} asks for {list(shape)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _common_dtype(tensors: HuggingFaceTensors, source: Path) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = {names[dtype] for dtype in tensors.dtypes.values()}
    if len(found) > 1:
        raise ConversionError(f"{source}: its tensors are of several types, {', '.join(sorted(found))}; give --dtype")
    return found.pop()


def check_room(folder: Path, tensor_bytes: int) -> None:
    """Raise MachineError unless the disk of `folder`, which need not exist, has room for tensors of so many bytes."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free, needed = shutil.disk_usage(there).free, int(tensor_bytes * _MARGIN)
    if free < needed:
        raise MachineError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; nothing was written")


def write_checkpoint(
    folder: Path, tensors: Tensors, model: ModelConfig, table: list[Piece], dtype: torch.dtype, source_dtype: torch.dtype | None = None
) -> list[FileEntry]:
    """Write the tensors in megatron-core's torch_dist format, layers stacked, with what its loader wants beside them.

    source_dtype: what `tensors` are of, where it is not `dtype`. Returns the files of tensors with their checksums: hashed while they
    are written, which saves reading them once more.
    """
    plans, metadata = create_default_global_save_plan(_plans(table, dtype, _THREADS))
    writer = FileSystemWriter(folder, sync_files=False)  # synced as a whole, before the folder gets its name
    writer.prepare_global_plan(plans)
    widest = max((dtype, source_dtype or dtype), key=lambda kind: kind.itemsize).itemsize
    budget = Budget(2 * widest * max(torch.Size(piece.shape).numel() for piece in table))
    by_index = {_index(piece): piece for piece in table}
    is_ending = threading.Event()

    def made(piece: Piece) -> torch.Tensor:
        parts = [as_type(tensors.read(name), dtype, name) for name in piece.parts]
        return piece.fusion.join(parts, model).reshape(*(1 for _ in piece.place), *piece.shape)

    def write(path: Path, plan: SavePlan) -> tuple[list[WriteResult], FileEntry]:
        results = []
        with StreamedWriter(path, with_checksum=True) as file:
            for item in plan.items:
                if is_ending.is_set():
                    raise InterruptedError("stopped")
                piece, begin = by_index[item.index], file.tell()
                with budget.taking(_memory(piece, dtype, source_dtype)), _disk_errors():
                    torch.save(made(piece), cast(IO[bytes], file))
                length = file.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(path.name, begin, length)))
                bar.advance()
        return results, file.entry()

    with _unchecked_archives(), progress_bar("importing", total=len(table)) as bar, ThreadPoolExecutor(_THREADS) as pool:
        try:
            running = [pool.submit(write, folder / f"__{number}_0.distcp", plan) for number, plan in enumerate(plans)]
            done = [future.result() for future in as_completed(running)]
        except BaseException:
            is_ending.set()
            raise
    writer.finish(metadata, [results for results, _ in done])
    torch.save({"content_metadata": {"singleton_local_shards": False}}, folder / "common.pt")
    write_json(
        folder / "metadata.json",
        {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1},
    )
    return [entry for _, entry in done]


def _plans(table: Sequence[Piece], dtype: torch.dtype, count: int) -> list[SavePlan]:
    """Return what is to be written, a chunk for each piece, in so many parts of about the same size."""
    stacked = stacked_shapes(table)
    parts: list[list[WriteItem]] = [[] for _ in range(count)]
    sizes = [0] * count
    for piece in table:
        index = _index(piece)
        assert index.offset is not None
        chunk = ChunkStorageMetadata(index.offset, torch.Size((*(1 for _ in piece.place), *piece.shape)))
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=torch.Size(stacked[piece.key]))
        lightest = sizes.index(min(sizes))
        parts[lightest].append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        sizes[lightest] += chunk.sizes.numel()
    return [SavePlan(part) for part in parts]


def _index(piece: Piece) -> MetadataIndex:
    return MetadataIndex(piece.key, torch.Size((*piece.place, *(0 for _ in piece.shape))))


def _memory(piece: Piece, dtype: torch.dtype, source_dtype: torch.dtype | None) -> int:
    """Return the bytes that making a piece takes: itself, its parts where they are several, and what was read where that is of another type."""
    copies = dtype.itemsize * (1 if len(piece.parts) == 1 else 2) + (source_dtype.itemsize if source_dtype not in (None, dtype) else 0)
    return copies * torch.Size(piece.shape).numel()


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise what went wrong on disk, and not the error of its own with which torch's archive, on being closed, hides it."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def stacked_shapes(table: Sequence[Piece]) -> dict[str, Shape]:
    """Return the whole shape of each checkpoint tensor: as many layers, and experts, as have a piece of it."""
    places: dict[str, tuple[int, ...]] = {}
    for piece in table:
        before = places.get(piece.key, tuple(0 for _ in piece.place))
        places[piece.key] = tuple(max(most, at + 1) for most, at in zip(before, piece.place, strict=True))
    return {piece.key: (*places[piece.key], *piece.shape) for piece in table}


@contextmanager
def _unchecked_archives() -> Iterator[None]:
    """Leave CRC-32 out of torch's archives, which halves their time: checksums.json has a SHA-256 of every file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of a call of its own that it deprecates
            yield
    finally:
        torch.serialization.set_crc32_options(before)
