"""Checkpoint to Hugging Face folder: tensors by the family's table, and all that transformers needs around them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tpt_megatron import __version__
from tpt_megatron.convert.checkpoint_reader import CheckpointReader, CheckpointRecord, find_checkpoint, read_record
from tpt_megatron.convert.families import llama
from tpt_megatron.errors import CheckpointError, ConversionError, MachineError, UsageError
from tpt_megatron.files import whole_folder, write_json, write_text
from tpt_megatron.log import progress_bar
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5_000_000_000
NOT_THE_MODEL = ("optimizer.", "chained_", "rng_state", "opt_param_scheduler", "rerun_state_machine")
"""How keys begin that a checkpoint holds beside the model's."""


def export_checkpoint(checkpoint: Path, output: Path, dtype: str | None = None, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint as a Hugging Face Llama folder that transformers 4.57 and 5.x load. It appears whole or not at all.

    `checkpoint` is an `iter_*` folder, or a checkpoints or run folder, whose latest checkpoint is taken. `dtype` is fp32, bf16
    or fp16; None keeps the precision of training. Tensors are sharded when they exceed `shard_bytes`.

    Raises UsageError for a wrong dtype or an output that is in use, CheckpointError for a checkpoint that is missing,
    incomplete or damaged, ConversionError when its tensors are not those of the model it says it is.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}, or none to keep the checkpoint's")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output}: exists and is not empty; remove it or name another folder")
    folder = find_checkpoint(checkpoint)
    record, reader = read_record(folder), CheckpointReader(folder)
    kept = dtype or record.precision
    if kept not in DTYPES:
        raise CheckpointError(f"{folder / 'tpt.json'}: precision {kept!r} is not known; give dtype as one of {', '.join(DTYPES)}")
    check_keys(reader, record)
    try:
        with whole_folder(output) as temporary:
            _write_tensors(temporary, reader, record, DTYPES[kept], shard_bytes)
            _write_configs(temporary, record, DTYPES[kept])
            _write_tokenizer(temporary, folder, record)
            write_text(temporary / "README.md", model_card(record, folder.name))
    except OSError as error:
        raise MachineError(f"{output}: cannot be written: {error.strerror or error}; nothing was left behind") from None


def check_keys(reader: CheckpointReader, record: CheckpointRecord) -> None:
    """Check that a checkpoint's model keys and their shapes are exactly those of its model (ConversionError)."""
    found = {key: stored.shape for key, stored in reader.tensors.items() if not key.startswith(NOT_THE_MODEL) and "_extra_state" not in key}
    embedding = found.get(llama.EMBEDDING.key, (0,))
    if embedding[0] < record.model.vocab_size:
        raise ConversionError(f"{reader.path}: {llama.EMBEDDING.key} has {embedding[0]} rows, fewer than the vocabulary's {record.model.vocab_size}")
    expected = llama.checkpoint_shapes(record.model, embedding[0])
    if missing := sorted(expected.keys() - found.keys()):
        raise ConversionError(f"{reader.path}: tensors of the model are missing: {', '.join(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ConversionError(f"{reader.path}: tensors that a Llama has no place for: {', '.join(unknown)}")
    for key, shape in expected.items():
        if found[key] != shape:
            raise ConversionError(f"{reader.path}: {key} has shape {list(found[key])}, the model's config asks for {list(shape)}")


def tensors(reader: CheckpointReader, record: CheckpointRecord, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every Hugging Face tensor of the model once, in its right shape, one checkpoint slice in memory at a time."""
    expected = llama.hugging_face_shapes(record.model)
    for step in llama.steps(record.model):
        parts = step.split(reader.read(step.key, step.layer), record.model)
        for name, part in zip(step.names, parts, strict=True):
            shape = expected.pop(name, None)
            if tuple(part.shape) != shape:
                raise ConversionError(f"{reader.path}: {name} came out as {list(part.shape)} of {step.key}, transformers expects {shape}")
            yield name, part.to(dtype).clone(memory_format=torch.contiguous_format)
    if expected:
        raise ConversionError(f"{reader.path}: nothing in the checkpoint becomes {', '.join(expected)}")


@dataclass(frozen=True)
class ShardPlan:
    """How many bytes there are, and after how many tensors each file ends."""

    total_bytes: int
    counts: tuple[int, ...]


def plan_shards(sizes: list[int], shard_bytes: int) -> ShardPlan:
    """Cut a run of tensor sizes into files of at most `shard_bytes`; a larger tensor gets a file of its own."""
    counts, filled = [0], 0
    for size in sizes:
        if counts[-1] and filled + size > shard_bytes:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return ShardPlan(sum(sizes), tuple(counts))


def _write_tensors(folder: Path, reader: CheckpointReader, record: CheckpointRecord, dtype: torch.dtype, shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shapes = llama.hugging_face_shapes(record.model)
    order = [name for step in llama.steps(record.model) for name in step.names]
    plan = plan_shards([torch.Size(shapes[name]).numel() * dtype.itemsize for name in order], shard_bytes)
    weight_map: dict[str, str] = {}
    source = tensors(reader, record, dtype)
    with progress_bar("exporting", total=len(order)) as bar:
        for number, count in enumerate(plan.counts, start=1):
            name = "model.safetensors" if len(plan.counts) == 1 else f"model-{number:05d}-of-{len(plan.counts):05d}.safetensors"
            shard: dict[str, torch.Tensor] = {}
            for _ in range(count):
                key, tensor = next(source)
                shard[key] = tensor
                bar.advance()
            save_file(shard, folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
    assert next(source, None) is None, "more tensors than planned"  # also runs the generator's last check
    if len(plan.counts) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map})


def _write_configs(folder: Path, record: CheckpointRecord, dtype: torch.dtype) -> None:
    eod_id = record.tokenizer.eod_id if record.tokenizer else None
    config = llama.hugging_face_config(record.model, sequence_length=record.sequence_length, dtype=str(dtype).removeprefix("torch."), eod_id=eod_id)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": eod_id, "eos_token_id": eod_id, "do_sample": False})


def _write_tokenizer(folder: Path, checkpoint: Path, record: CheckpointRecord) -> None:
    """Take the tokenizer over, when the run's data had one. Without tokenizer_config.json transformers 4.57 would put a BOS first."""
    if record.tokenizer is None:
        return
    if (checkpoint / SENTENCEPIECE_MODEL).is_file():
        shutil.copyfile(checkpoint / SENTENCEPIECE_MODEL, folder / SENTENCEPIECE_MODEL)
        return
    source = checkpoint / TOKENIZER_JSON
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file, but tpt.json names a tokenizer; the checkpoint is incomplete")
    shutil.copyfile(source, folder / TOKENIZER_JSON)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": record.tokenizer.end_of_document,
            "model_max_length": record.sequence_length,
            "clean_up_tokenization_spaces": False,
        },
    )


def model_card(record: CheckpointRecord, checkpoint_name: str) -> str:
    """Return the model card: what the model is and how it was trained, as far as the checkpoint says."""
    model = record.model
    parameters = sum(torch.Size(shape).numel() for shape in llama.hugging_face_shapes(model).values())
    facts = {
        "Parameters": f"{parameters:,}" + (" (input and output embeddings tied)" if model.tie_embeddings else ""),
        "Layers, hidden size, feed-forward size": f"{model.num_layers}, {model.hidden_size:,}, {model.ffn_hidden_size:,}",
        "Heads, key-value heads, head size": f"{model.num_heads}, {model.num_query_groups}, {model.head_size}",
        "Vocabulary": f"{model.vocab_size:,}",
        "Sequence length": f"{record.sequence_length:,}",
        "Arm": record.arm or "not recorded",
        "Optimizer steps": f"{record.step:,} (checkpoint `{checkpoint_name}`)",
        "Tokens seen": f"{record.tokens_seen:,}",
        "Precision of training": record.precision,
        "End of document": f"`{record.tokenizer.end_of_document}`, id {record.tokenizer.eod_id}" if record.tokenizer else "no tokenizer recorded",
        "Tokenizer fingerprint": f"`{record.tokenizer.fingerprint}`" if record.tokenizer else "no tokenizer recorded",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    data = f"\n## Data\n\n```json\n{json.dumps(record.data, indent=2, sort_keys=True)}\n```\n" if record.data else ""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [tpt-megatron]\n---\n\n"
        "# A language model pretrained with tpt_megatron\n\n"
        "A Llama-style base model: it continues text and was not tuned to follow instructions. Documents were tokenised without a "
        "beginning-of-sequence token; give prompts the same way.\n\n"
        f"## Training\n\n| | |\n|---|---|\n{table}\n{data}\n"
        f"Exported by tpt_megatron {__version__}.\n"
    )
