"""What a model's folder holds: a checkpoint, a run's checkpoints, or a Hugging Face folder. From headers and records: no tensor is read, and no torch."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from tpt_megatron.checkpoints import CHECKSUMS, DESCRIPTION, TRACKER, damages, finished_steps, iteration_folder, latest_step, read_checksums
from tpt_megatron.errors import CheckpointError, DataError
from tpt_megatron.inspection.printing import counts_table, one_line, print_facts, print_line, print_table

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
SHAPE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_query_groups", "head_dim", "vocab_size")


def holds_model(path: Path) -> bool:
    """Say whether a folder is a checkpoint, has checkpoints, or is a Hugging Face model's."""
    return (path / DESCRIPTION).is_file() or _checkpoints_in(path) is not None or ((path / CONFIG).is_file() and any(path.glob("*.safetensors")))


def print_model(path: Path, console: Console, *, check: bool) -> None:
    """Print what such a folder holds; or, with `check`, whether its files are whole: DataError after all findings are printed.

    Raises CheckpointError and DataError for records and headers that cannot be read.
    """
    if (path / DESCRIPTION).is_file():
        folders = [path]
    elif (checkpoints := _checkpoints_in(path)) is not None:
        folders = [iteration_folder(checkpoints, step) for step in finished_steps(checkpoints)]
    else:
        _hugging_face(path, console, check)
        return
    if check:
        _verify(folders, console)
        return
    if (path / DESCRIPTION).is_file():
        _checkpoint(path, console)
        return
    assert checkpoints is not None
    latest = latest_step(checkpoints)
    table = counts_table("checkpoint", ("step", "tokens seen", "GB", ""))
    for folder in folders:
        about, step = _description(folder), int(folder.name.removeprefix("iter_"))
        table.add_row(folder.name, f"{step:,}", _number(about.get("tokens_seen")), f"{_size(folder) / 1e9:.3f}", "latest" if step == latest else "")
    print_table(console, table)
    if latest is not None and iteration_folder(checkpoints, latest) in folders:
        _checkpoint(iteration_folder(checkpoints, latest), console)


def _checkpoints_in(path: Path) -> Path | None:
    """Return the folder of `iter_*` folders that a path is, or, as a run, has; None where there is none."""
    return next((folder for folder in (path, path / "checkpoints") if (folder / TRACKER).is_file()), None)


def _description(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        assert isinstance(value, dict) and isinstance(value["model"], dict)
    except (OSError, ValueError, KeyError, AssertionError):
        raise CheckpointError(f"{folder / DESCRIPTION}: missing or damaged: the checkpoint is incomplete, or another program wrote it") from None
    return value


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _checkpoint(folder: Path, console: Console) -> None:
    about = _description(folder)
    model, tokenizer = about["model"], about.get("tokenizer") or {}
    others = {key: value for key, value in model.items() if key not in SHAPE and value not in (None, False, 0)}
    print_facts(
        console,
        [
            ("checkpoint", str(folder)),
            ("step", _number(about.get("step"))),
            ("tokens seen", _number(about.get("tokens_seen"))),
            ("arm", str(about.get("arm") or "not recorded")),
            ("model", ", ".join(f"{key} {model[key]:,}" for key in SHAPE if model.get(key))),
            ("", ", ".join(f"{key} {value}" for key, value in others.items())),
            ("precision", str(about.get("precision"))),
            ("sequence length", _number(about.get("sequence_length"))),
            ("tokenizer", f"{tokenizer['vocabulary_size']:,} tokens, fingerprint {tokenizer['fingerprint']}" if tokenizer else "not recorded"),
            ("files", f"{sum(file.is_file() for file in folder.iterdir())}, {_size(folder) / 1e9:.3f} GB"),
            ("checksums", "recorded: --verify compares them" if (folder / CHECKSUMS).is_file() else "none recorded"),
        ],
    )


def _verify(folders: list[Path], console: Console) -> None:
    wrong = 0
    for folder in folders:
        entries = read_checksums(folder)
        findings = [] if entries is None else damages(folder, entries)
        unchecked = " (no checksums recorded: nothing to compare with)" if entries is None else ""
        print_line(console, f"{folder.name}: {'ok' if not findings else f'{len(findings)} finding(s)'}{unchecked}")
        for finding in findings:
            print_line(console, f"  {one_line(finding)}")
        wrong += len(findings)
    if wrong:
        raise DataError(f"{wrong} finding(s), see above; continue from a checkpoint that is whole")


def _header(path: Path) -> dict[str, Any]:
    """Return what a safetensors file says of its tensors; DataError where it is cut short or damaged."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        begin = file.read(8)
        length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else size
        try:
            header = json.loads(file.read(length)) if length < size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise DataError(f"{path}: no safetensors header: the file is damaged or was cut off")
    header.pop("__metadata__", None)
    ends = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + ends != size:
        raise DataError(f"{path}: {size} bytes, its header says {8 + length + ends}; the file was cut off or has grown")
    return header


def _hugging_face(folder: Path, console: Console, check: bool) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"] if (folder / INDEX).is_file() else None
        assert isinstance(config, dict)
    except (ValueError, KeyError, AssertionError):
        raise DataError(f"{folder}: {CONFIG} or {INDEX} is not what Hugging Face writes") from None
    shards = sorted(set(index.values())) if index is not None else sorted(path.name for path in folder.glob("*.safetensors"))
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise DataError(f"{folder}: {INDEX} names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not there")
    tensors = {name: entry for shard in shards for name, entry in _header(folder / shard).items()}
    if index is not None and (odd := sorted(index.keys() ^ tensors.keys())):
        raise DataError(f"{folder}: {INDEX} and the files do not name the same tensors: {', '.join(odd[:3])}{' and more' if len(odd) > 3 else ''}")
    if check:
        print_line(console, f"{len(shards)} file(s), {len(tensors)} tensors: ok (headers and sizes; Hugging Face folders have no checksums)")
        return
    types = Counter[str]()
    for entry in tensors.values():
        types[entry["dtype"]] += math.prod(entry["shape"])
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    tokenizers = [name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja") if (folder / name).is_file()]
    print_facts(
        console,
        [
            ("Hugging Face", f"{config.get('model_type')}, {', '.join(config.get('architectures') or ['no architecture named'])}"),
            ("parameters", f"{sum(types.values()):,} in {len(tensors)} tensors: " + ", ".join(f"{count:,} {kind}" for kind, count in types.items())),
            ("files", f"{len(shards)}, {sum((folder / name).stat().st_size for name in shards) / 1e9:.3f} GB"),
            ("layers", f"{config.get('num_hidden_layers')}, hidden size {config.get('hidden_size')}, vocabulary {config.get('vocab_size')}"),
            ("embeddings", "tied" if config.get("tie_word_embeddings") else "apart"),
            ("positions", str(config.get("max_position_embeddings"))),
            ("RoPE", str(rope) if is_scaled else "not scaled"),
            ("tokenizer", ", ".join(tokenizers) or "none"),
        ],
    )
