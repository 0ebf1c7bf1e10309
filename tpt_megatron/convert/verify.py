"""Is what was converted what it was converted from? Every tensor, bit for bit, and the logits of both sides on a text.

Tensors say that nothing was lost; they went through one table in both directions, so that logits, which two libraries compute
without it, say that the table is right.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.config.parallel import ParallelConfig
from tpt_megatron.convert.checkpoint_reader import CheckpointReader, CheckpointRecord, read_record
from tpt_megatron.convert.export import parts_of, plan_shards
from tpt_megatron.convert.families.rules import EMBEDDING, Family, Piece, pieces
from tpt_megatron.convert.hugging_face import CONFIG, HuggingFaceTensors, model_of, read_config, writing
from tpt_megatron.convert.importing import write_checkpoint
from tpt_megatron.errors import ConversionError, MachineError
from tpt_megatron.files import remove_stale_neighbours, temporary_neighbour, write_json
from tpt_megatron.log import progress_bar
from tpt_megatron.tokenizer import TOKENIZER_JSON, read_tokenizer_json

BOUND = 1e-4
"""How far logits may be apart, over the largest of them or 1: fp32 rounding is a hundredth of it, and a wrong norm epsilon fifty times as much."""
SAMPLED_LAYERS = 3
_COPIES = 6
"""Of the weights in fp32: both sides, and gradients and optimizer of megatron-core's."""
_TOKENS = 64
_TEXT = (
    "A thermometer in the shade of a fig tree read 31 degrees at noon. By six o'clock it had fallen to 24, and the old man who kept the book "
    "wrote both numbers down, one under the other, as he had done on every day since the spring of 1961. Why did he keep it?\n\n    def mean(x):\n"
)


@dataclass(frozen=True)
class Verified:
    """What was found: tensors compared, the largest difference of logits and the largest logit, and of which layers they were."""

    tensors: int
    difference: float
    largest: float
    layers: tuple[int, ...]
    all_layers: bool


def verify(checkpoint: Path, folder: Path, target: Literal["checkpoint", "hugging_face"], beside: Path | None = None) -> Verified:
    """Compare an `iter_*` folder and a model folder, of which `target` was made from the other. ConversionError, by name, for the first difference.

    Logits are of the whole model where memory holds it six times in fp32, and else of a model of its first, middle and last layer, which is written
    beside `beside`, by default the target.
    MachineError where not even that fits.
    """
    record, reader, tensors = read_record(checkpoint), CheckpointReader(checkpoint), HuggingFaceTensors(folder)
    family, model = model_of(read_config(folder), folder / CONFIG)
    _compare_configs(model, record.model, folder)
    table = list(pieces(family.rules_of(record.model), record.model))
    _compare_tensors(reader, record, tensors, table, target)
    layers = _layers_that_fit(record.model, table)
    tokens = _tokens(folder, record.model.vocab_size)
    dtype = reader.tensors[EMBEDDING.key].dtype if target == "checkpoint" else next(iter(tensors.dtypes.values()))
    if len(layers) == record.model.num_layers:
        theirs, ours = _transformers_logits(folder, tokens, dtype), _megatron_logits(checkpoint, record.model, tokens, dtype)
    else:
        beside = beside or (checkpoint if target == "checkpoint" else folder)
        with _temporary_folder(beside.with_name(f"{beside.name}.verify")) as temporary:
            theirs, ours = _logits_of_layers(temporary, layers, reader, record, tensors, family, tokens, dtype)
    difference, largest = float((theirs - ours).abs().max()), float(theirs.abs().max())
    if not difference <= BOUND * max(1.0, largest):
        raise ConversionError(f"{folder}: transformers' logits and megatron-core's of {checkpoint} differ by up to {difference:.2g} (largest {largest:.3g})")
    return Verified(sum(len(piece.parts) for piece in table), difference, largest, layers, len(layers) == record.model.num_layers)


def _compare_configs(found: ModelConfig, expected: ModelConfig, folder: Path) -> None:
    theirs, ours = found.model_dump(), expected.model_dump()
    theirs["head_dim"], ours["head_dim"] = found.head_size, expected.head_size
    if expected.experts is not None:  # its MLP's width says nothing then
        theirs["ffn_hidden_size"] = ours["ffn_hidden_size"]
    for key in theirs.keys() - {"init_std", "embedding_init_std", "vocab_divisor", "mtp_loss_weight"}:
        if theirs[key] != ours[key]:
            raise ConversionError(f"{folder / CONFIG}: {key} is {theirs[key]}, the checkpoint's is {ours[key]}")


def _compare_tensors(
    reader: CheckpointReader, record: CheckpointRecord, tensors: HuggingFaceTensors, table: Sequence[Piece], target: Literal["checkpoint", "hugging_face"]
) -> None:
    expected = {name for piece in table for name in piece.parts}
    if target == "hugging_face" and (others := sorted(tensors.shapes.keys() - expected)):
        raise ConversionError(f"{tensors.folder}: tensors that the checkpoint has not: {', '.join(others[:4])}")
    with progress_bar("verifying", total=len(table)) as bar:
        for piece in table:
            for name, ours in parts_of(reader, piece, record):
                if name not in tensors.shapes:
                    raise ConversionError(f"{tensors.folder}: {name} is missing")
                theirs = tensors.read(name)
                dtype = ours.dtype if target == "checkpoint" else theirs.dtype
                if theirs.shape != ours.shape or not torch.equal(_bits(theirs.to(dtype)), _bits(ours.to(dtype))):
                    raise ConversionError(f"{tensors.folder}: {name} is not what {reader.path} has in {piece.key}")
            bar.advance()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _layers_that_fit(model: ModelConfig, table: Sequence[Piece]) -> tuple[int, ...]:
    free = psutil.virtual_memory().available
    counts = (model.num_layers, min(SAMPLED_LAYERS, model.num_layers))
    for count in counts:
        parameters = sum(torch.Size(piece.shape).numel() for piece in table if not piece.place or piece.place[0] < count)
        if _COPIES * 4 * parameters < free:
            return tuple(range(count)) if count == model.num_layers else (0, model.num_layers // 2, model.num_layers - 1)
    raise MachineError(
        f"--verify: every tensor is as it should be; to compare logits of {counts[1]} layers {_COPIES * 4 * parameters / 1e9:.0f} GB of memory are needed, "
        f"{free / 1e9:.0f} GB are free"
    )


def _tokens(folder: Path, vocabulary: int) -> torch.Tensor:
    """Return [1, s] ids: a text in the model's own tokens where it has a tokenizer.json, and random ones besides."""
    ids: list[int] = []
    if (folder / TOKENIZER_JSON).is_file():
        ids = [token for token in read_tokenizer_json(str(folder), "").encode(_TEXT).ids if token < vocabulary][:_TOKENS]
    drawn = torch.randint(0, vocabulary, (2 * _TOKENS - len(ids),), generator=torch.Generator().manual_seed(0))
    return torch.cat((torch.tensor(ids, dtype=torch.int64), drawn))[None]


def _transformers_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    from tpt_megatron.quiet import quiet_transformers

    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))  # a conversion to fewer bits is held against itself, computed in fp32
        return model(tokens).logits  # type: ignore[no-any-return]


def _megatron_logits(checkpoint: Path, model: ModelConfig, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from tpt_megatron.mcore import groups
    from tpt_megatron.mcore.logits import checkpoint_logits

    groups.join(ParallelConfig())
    try:
        logits = checkpoint_logits(checkpoint, model, tokens, ParallelConfig(), dtype)
    finally:
        groups.leave()
    assert logits is not None
    return logits


class _Layers:
    """The tensors of a model of some layers of another, by the names that they have in it."""

    def __init__(self, read: Callable[[str], torch.Tensor], layers: Sequence[int]) -> None:
        self._read, self._layers = read, layers

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor of the smaller model."""
        return self._read(re.sub(r"(?<=^model\.layers\.)\d+", lambda found: str(self._layers[int(found[0])]), name))


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which vanishes; what killed processes left of it goes, too."""
    remove_stale_neighbours(path)
    temporary = temporary_neighbour(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _logits_of_layers(
    temporary: Path,
    layers: Sequence[int],
    reader: CheckpointReader,
    record: CheckpointRecord,
    tensors: HuggingFaceTensors,
    family: Family,
    tokens: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return transformers' logits and megatron-core's of models of these layers alone, which are written to a temporary folder."""
    model = record.model.model_copy(update={"num_layers": len(layers)})
    rules = family.rules_of(model)
    table = list(pieces(rules, model))
    of_checkpoint = {name: piece for piece in pieces(rules, record.model) for name in piece.parts}
    theirs, ours = temporary / "theirs", temporary / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
    (shard,) = plan_shards(table, 4, sys.maxsize)
    source = _Layers(tensors.read, layers)
    with writing(theirs / shard.name, shard.shapes, torch.float32) as take:
        for name in shard.shapes:
            take(name, source.read(name).float())
    write_json(theirs / CONFIG, read_config(tensors.folder) | {"num_hidden_layers": len(layers), "max_window_layers": 0, "layer_types": None})
    whole = _Layers(lambda name: dict(parts_of(reader, of_checkpoint[name], record))[name], layers)
    write_checkpoint(ours, whole, model, table, torch.float32)
    return _transformers_logits(theirs, tokens, dtype), _megatron_logits(ours, model, tokens, dtype)
