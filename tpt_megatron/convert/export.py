"""Checkpoint to Hugging Face folder: tensors by the family's table, and all that transformers needs around them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpt_megatron import __version__
from tpt_megatron.checkpoints import IMPORTED, damages, read_checksums
from tpt_megatron.convert.checkpoint_reader import ChatRecord, CheckpointReader, CheckpointRecord, TokenizerRecord, find_checkpoint, read_record
from tpt_megatron.convert.families import family_of
from tpt_megatron.convert.families.rules import EMBEDDING, Family, Piece, Shape, pieces
from tpt_megatron.convert.hugging_face import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    KEPT_FILES,
    OLDER_CHAT_TEMPLATE,
    SINGLE,
    model_of,
    writing,
    written_config,
)
from tpt_megatron.convert.importing import DTYPES, check_room, stacked_shapes
from tpt_megatron.convert.streaming import Budget, sha256_of
from tpt_megatron.errors import CheckpointError, ConfigError, ConversionError, DataError, MachineError, UsageError
from tpt_megatron.files import read_json, remove_stale_neighbours, whole_folder, write_json, write_text
from tpt_megatron.log import progress_bar
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON, load_tokenizer

SHARD_BYTES = 5_000_000_000
NOT_THE_MODEL = ("optimizer.", "chained_", "rng_state", "opt_param_scheduler", "rerun_state_machine")
"""How keys begin that a checkpoint holds beside the model's."""
_THREADS = 2


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    check: Callable[[Path, Path], object] = lambda folder, model: None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint as a Hugging Face folder that transformers 4.57 and 5.x load. It appears whole or not at all. Returns the `iter_*` folder.

    `checkpoint` is an `iter_*` folder, or a checkpoints or run folder, whose latest checkpoint is taken. `dtype` is fp32, bf16
    or fp16; None keeps the precision of training. `check` is given the `iter_*` folder and the finished model folder
    before that has its name, and refuses it by raising. Tensors are sharded when they exceed `shard_bytes`. Memory: twice the largest stored
    tensor, or slice of stacked ones.

    Raises UsageError for a wrong dtype or an output that is in use, CheckpointError for a checkpoint that is missing,
    incomplete or damaged, ConversionError when its tensors are not those of the model it says it is, or no family has such a model.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}, or none to keep the checkpoint's")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output}: exists and is not empty; remove it or name another folder")
    output = output.resolve()  # a link stays, and what it leads to is made
    if os.path.ismount(output) or output == Path.cwd():
        raise UsageError(f"{output}: is a mount point, or the folder that you are in, whose place a finished folder cannot take; name a folder in it")
    folder = find_checkpoint(checkpoint)
    record, reader = read_record(folder), CheckpointReader(folder)
    kept = dtype or record.precision
    if kept not in DTYPES:
        raise CheckpointError(f"{folder / 'tpt.json'}: precision {kept!r} is not known; give dtype as one of {', '.join(DTYPES)}")
    source = read_json(folder / f"{IMPORTED}{CONFIG}") if (folder / f"{IMPORTED}{CONFIG}").is_file() else None
    family = family_of(record.model, None if source is None else source.get("model_type"))
    table = list(pieces(family.rules_of(record.model), record.model))
    check_keys(reader, family, record, table)
    shards = plan_shards(table, DTYPES[kept].itemsize, shard_bytes)
    remove_stale_neighbours(output)
    check_room(output, sum(shard.bytes for shard in shards))
    try:
        with whole_folder(output) as temporary:
            with files_checked(folder):
                _write_tensors(temporary, reader, record, shards, DTYPES[kept])
            _write_configs(temporary, folder, family, record, DTYPES[kept], source)
            write_text(temporary / "README.md", model_card(record, folder.resolve().name, table, is_imported=source is not None))
            check(folder, temporary)
    except OSError as error:
        raise MachineError(f"{output}: cannot be written: {error.strerror or error}; nothing was left behind") from None
    return folder


@contextmanager
def files_checked(folder: Path) -> Iterator[None]:
    """Compare a checkpoint's files with their checksums, where it has any, while the block runs: torch reads a flipped bit as another number.

    Raises CheckpointError after the block, or in place of the one that the block raised on a damaged file.
    """
    entries = read_checksums(folder) or []
    is_ending = threading.Event()

    def sha256(path: Path) -> str:
        try:
            return sha256_of(path, go_on)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None

    def go_on(count: int) -> None:
        if is_ending.is_set():
            raise CancelledError

    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(damages, folder, entries, sha256=sha256)
        try:
            yield
        except CheckpointError:
            if not (problems := checked.result()):
                raise
        except BaseException:
            is_ending.set()
            raise
        else:
            with progress_bar("checking", total=None):
                problems = checked.result()
    if problems:
        raise CheckpointError(f"{problems[0]}; export another one")


def check_keys(reader: CheckpointReader, family: Family, record: CheckpointRecord, table: Sequence[Piece]) -> None:
    """Check that a checkpoint's model keys and their shapes are exactly those of its model (ConversionError)."""
    found = {key: stored.shape for key, stored in reader.tensors.items() if not key.startswith(NOT_THE_MODEL) and "_extra_state" not in key}
    vocabulary = record.model.vocab_size
    rows = found.get(EMBEDDING.key, (vocabulary,))[0]
    if rows < vocabulary:
        raise ConversionError(f"{reader.path}: {EMBEDDING.key} has {rows} rows, fewer than the vocabulary's {vocabulary}")
    expected = stacked_shapes(table)
    for rule in family.rules:
        if rule.key in expected and next(iter(rule.parts.values())).startswith("V"):
            expected[rule.key] = (rows, *expected[rule.key][1:])  # padded
    if missing := sorted(expected.keys() - found.keys()):
        raise ConversionError(f"{reader.path}: tensors of the model are missing: {', '.join(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        raise ConversionError(f"{reader.path}: tensors that a {family.model_type} has no place for: {', '.join(unknown)}")
    for key, shape in expected.items():
        if found[key] != shape:
            raise ConversionError(f"{reader.path}: {key} has shape {list(found[key])}, the model's config asks for {list(shape)}")


@dataclass(frozen=True)
class Shard:
    """One file of tensors: what it is called, and the pieces that it is made of."""

    name: str
    pieces: tuple[Piece, ...]
    bytes: int

    @property
    def shapes(self) -> dict[str, Shape]:
        """The Hugging Face tensors in it, in order."""
        return {name: shape for piece in self.pieces for name, shape in piece.parts.items()}


def plan_shards(table: Sequence[Piece], item_bytes: int, shard_bytes: int) -> list[Shard]:
    """Cut a model into files of at most `shard_bytes` of tensors; a larger piece gets a file of its own."""
    groups: list[list[Piece]] = [[]]
    sizes: list[int] = []
    filled = 0
    for piece in table:
        size = torch.Size(piece.shape).numel() * item_bytes
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            sizes.append(filled)
            filled = 0
        groups[-1].append(piece)
        filled += size
    sizes.append(filled)
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [Shard(name, tuple(group), size) for name, group, size in zip(names, groups, sizes, strict=True)]


def _write_tensors(folder: Path, reader: CheckpointReader, record: CheckpointRecord, shards: Sequence[Shard], dtype: torch.dtype) -> None:
    is_ending = threading.Event()
    budget = Budget(2 * max(_memory(reader, piece) for shard in shards for piece in shard.pieces))

    def write(shard: Shard) -> None:
        with writing(folder / shard.name, shard.shapes, dtype) as take:
            for piece in shard.pieces:
                if is_ending.is_set():
                    raise InterruptedError("stopped")
                with budget.taking(_memory(reader, piece) * (1 if len(piece.parts) == 1 else 2)):
                    for name, tensor in parts_of(reader, piece, record):
                        take(name, tensor)
                bar.advance()

    with progress_bar("exporting", total=sum(len(shard.pieces) for shard in shards)) as bar, ThreadPoolExecutor(_THREADS) as pool:
        try:
            for done in as_completed([pool.submit(write, shard) for shard in shards]):
                done.result()
        except BaseException:
            is_ending.set()
            raise
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.bytes for shard in shards)},
            "weight_map": {name: shard.name for shard in shards for name in shard.shapes},
        }
        write_json(folder / INDEX, index)


def _memory(reader: CheckpointReader, piece: Piece) -> int:
    """Return the bytes of a piece as it is stored."""
    stored = reader.tensors[piece.key]
    return stored.dtype.itemsize * torch.Size(stored.shape[len(piece.place) :]).numel()


def parts_of(reader: CheckpointReader, piece: Piece, record: CheckpointRecord) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the Hugging Face tensors of one piece, in the checkpoint's type; ConversionError when one comes out in another shape than transformers expects."""
    parts = piece.fusion.split(reader.read(piece.key, piece.place), record.model)
    for (name, shape), part in zip(piece.parts.items(), parts, strict=True):
        if tuple(part.shape) != shape:
            raise ConversionError(f"{reader.path}: {name} came out as {list(part.shape)} of {piece.key}, transformers expects {list(shape)}")
        yield name, part


def _write_configs(folder: Path, checkpoint: Path, family: Family, record: CheckpointRecord, dtype: torch.dtype, source: dict[str, Any] | None) -> None:
    """Write config.json, generation_config.json and the tokenizer: the source's, while its tokenizer is the one that the model was trained with."""
    imported = {path.name.removeprefix(IMPORTED): path for path in checkpoint.glob(f"{IMPORTED}*")}
    is_sources = source is not None and (record.tokenizer is None or _is_tokenizer(imported, record.tokenizer))
    eod_id = record.tokenizer.eod_id if record.tokenizer and not is_sources else None
    positions = _positions(record, source)
    config = written_config(family, record.model, positions=positions, dtype=dtype, eod_id=eod_id, source=source)
    write_json(folder / CONFIG, config)
    if is_sources:
        for name in imported.keys() & {*KEPT_FILES} - {CONFIG}:
            shutil.copyfile(imported[name], folder / name)
    elif record.tokenizer is not None:
        _write_tokenizer(folder, checkpoint, record.tokenizer, record.sequence_length)
    if not (folder / GENERATION_CONFIG).is_file():
        write_json(folder / GENERATION_CONFIG, {"bos_token_id": config.get("bos_token_id"), "eos_token_id": config.get("eos_token_id"), "do_sample": False})
    if record.tokenizer is not None and record.tokenizer.chat is not None:
        _write_chat(folder, record.tokenizer.chat)


def _write_chat(folder: Path, chat: ChatRecord) -> None:
    """Have the model be asked as it was tuned, and end where a turn ends: a source's template is of another tuning, a base model's end that of a document."""
    write_text(folder / CHAT_TEMPLATE, chat.template)
    (folder / OLDER_CHAT_TEMPLATE).unlink(missing_ok=True)
    if chat.end_of_turn_id is not None:
        generation = read_json(folder / GENERATION_CONFIG)
        ends = generation.get("eos_token_id")
        others = ends if isinstance(ends, list) else [] if ends is None else [ends]
        write_json(folder / GENERATION_CONFIG, generation | {"eos_token_id": list(dict.fromkeys([chat.end_of_turn_id, *others]))})


def _positions(record: CheckpointRecord, source: dict[str, Any] | None) -> int:
    """Return the longest sequence: the source's while RoPE is as it was there, and at least what the model was trained on."""
    if source is None:
        return record.sequence_length
    _, before = model_of(source, Path(CONFIG))
    has_same_rope = (before.rope_theta, before.rope_scaling) == (record.model.rope_theta, record.model.rope_scaling)
    return max(record.sequence_length, source.get("max_position_embeddings", 0) if has_same_rope else 0)


def _write_tokenizer(folder: Path, checkpoint: Path, tokenizer: TokenizerRecord, longest: int) -> None:
    """Give the model the tokenizer of the run's data."""
    if (checkpoint / SENTENCEPIECE_MODEL).is_file():
        # The class would put a BOS first, and add one to a vocabulary without. Legacy is what puts a space before a text, as SentencePiece does.
        name, kind = SENTENCEPIECE_MODEL, {"tokenizer_class": "LlamaTokenizer", "bos_token": tokenizer.end_of_document, "add_bos_token": False, "legacy": True}
    else:
        name, kind = TOKENIZER_JSON, {"tokenizer_class": "PreTrainedTokenizerFast"}
    if not (checkpoint / name).is_file():
        raise CheckpointError(f"{checkpoint / name}: no such file, but tpt.json names a tokenizer; the checkpoint is incomplete")
    shutil.copyfile(checkpoint / name, folder / name)
    write_json(  # without it transformers 4.57 would put a BOS first
        folder / "tokenizer_config.json",
        {**kind, "eos_token": tokenizer.end_of_document, "model_max_length": longest, "clean_up_tokenization_spaces": False},
    )


def _is_tokenizer(files: Mapping[str, Path], trained_with: TokenizerRecord) -> bool:
    """Say whether one of a source's files is the tokenizer that the data were made with; some have it in both forms."""
    return any(
        _fingerprint(files[name], trained_with.end_of_document) == trained_with.fingerprint for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL) if name in files
    )


def _fingerprint(tokenizer: Path, end_of_document: str) -> str | None:
    try:
        return load_tokenizer(str(tokenizer), end_of_document).fingerprint
    except (ConfigError, DataError):  # it has no such token, or cannot be read
        return None


def _purpose(record: CheckpointRecord, is_imported: bool) -> str:
    """Return what the card's reader can expect of the model: no more than the checkpoint says. An imported one may have been tuned for anything."""
    if is_imported and record.step == 0:
        return "Converted by tpt_megatron and not trained by it: it is what the card of the model it was imported from says."
    if "chat" in (record.arm or "").split("+"):
        return "Tuned on chats: give prompts in the template that these were written in."
    origin = (
        "Trained from an imported model, whose card says what that was made for."
        if is_imported
        else "A base model: it continues text and was not tuned to follow instructions."
    )
    return f"{origin} Documents were tokenised without a beginning-of-sequence token; give prompts the same way."


def model_card(record: CheckpointRecord, checkpoint_name: str, table: Sequence[Piece], *, is_imported: bool) -> str:
    """Return the model card: what the model is and how it was trained, as far as the checkpoint says."""
    model = record.model
    parameters = sum(torch.Size(piece.shape).numel() for piece in table)
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
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    data = f"\n## Data\n\n```json\n{json.dumps(record.data, indent=2, sort_keys=True)}\n```\n" if record.data else ""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [tpt-megatron]\n---\n\n"
        f"# A language model of tpt_megatron\n\n{_purpose(record, is_imported)}\n\n"
        f"## Training\n\n| | |\n|---|---|\n{rows}\n{data}\n"
        f"Exported by tpt_megatron {__version__}.\n"
    )
