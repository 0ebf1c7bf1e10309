"""Memory and speed of converting a large model both ways, against copying the same bytes.

    python benchmarks/convert.py [--gigabytes 8] [--rounds 3] [--folder DIR]

A random Llama-style model in bf16, with an embedding of a ninth of it, is written file by file, imported by `tpt convert import`, and the
checkpoint exported by `tpt convert export`; a plain copy of the model's files, synced to disk as the conversions are, takes turns with
them. What was read before is dropped from the page cache. Printed are medians of GB/s, ratios within the rounds, and the peak memory of
each process: all of it (VmHWM, mapped pages of files included), over the bound that the project states.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.export import plan_shards
from tpt_megatron.convert.families import FAMILIES
from tpt_megatron.convert.families.rules import pieces
from tpt_megatron.convert.hugging_face import CONFIG, INDEX, writing, written_config
from tpt_megatron.files import sync_tree

TO_SPARE = 500e6
"""Bytes over twice the largest tensor that a conversion may take."""


def make_model(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write a random model; return its bytes and those of its largest tensor."""
    hidden = 4096 if gigabytes >= 4 else 1024
    shape = {"num_heads": hidden // 128, "num_query_groups": 8, "hidden_size": hidden, "ffn_hidden_size": int(3.5 * hidden)}
    vocabulary = int(gigabytes * 1e9 / 9 / 2 / hidden)
    one_layer = hidden * (hidden * 2 + 2 * 8 * 128) + 3 * hidden * shape["ffn_hidden_size"]
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / one_layer))
    model = ModelConfig.model_validate({**shape, "num_layers": layers, "vocab_size": vocabulary})
    family = FAMILIES["llama"]
    table = list(pieces(family.rules_of(model), model))
    shards = plan_shards(table, 2, 2_000_000_000)
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    for shard in shards:
        with writing(folder / shard.name, shard.shapes, torch.bfloat16) as take:
            for name, tensor_shape in shard.shapes.items():
                take(name, torch.randint(0, 2**15, tensor_shape, dtype=torch.int16, generator=random).view(torch.bfloat16))
    places = {name: shard.name for shard in shards for name in shard.shapes}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / CONFIG).write_text(json.dumps(written_config(family, model, positions=8192, dtype=torch.bfloat16, eod_id=None)))
    sizes = [2 * torch.Size(tensor_shape).numel() for shard in shards for tensor_shape in shard.shapes.values()]
    return sum(sizes), max(sizes)


def forget(folder: Path) -> None:
    """Sync a folder's files and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def convert(*arguments: str) -> tuple[float, float]:
    """Run `tpt convert ...`; return its seconds and its peak memory in bytes."""
    code = (
        "import sys; from tpt_megatron.cli import main\n"
        "try: main()\n"
        "finally: print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0], file=sys.stderr)\n"
    )
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", code, "convert", *arguments], check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if ended.returncode:
        sys.exit(ended.stderr)
    return seconds, 1024 * float(ended.stderr.split("VmHWM:")[1].split()[0])


def copy(source: Path, target: Path) -> float:
    """Copy a folder and sync it; return the seconds."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    sync_tree(target)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where there is room for three times the model; default: the system's temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        model, checkpoint, exported, copied = (root / name for name in ("model", "checkpoint", "exported", "copied"))
        total, largest = make_model(model, args.gigabytes)
        bound = 2 * largest + TO_SPARE
        print(f"{total / 1e9:.2f} GB in bf16, largest tensor {largest / 1e9:.2f} GB: bound {bound / 1e9:.2f} GB", flush=True)
        times: dict[str, list[float]] = {"import": [], "export": [], "copy": []}
        peaks: dict[str, float] = {"import": 0.0, "export": 0.0}
        for _ in range(args.rounds):
            for folder in (checkpoint, exported, copied):
                shutil.rmtree(folder, ignore_errors=True)
            forget(model)
            times["copy"].append(copy(model, copied))
            shutil.rmtree(copied)
            for name, source, target in (("import", model, checkpoint), ("export", checkpoint, exported)):
                forget(source)
                seconds, peak = convert(name, str(source), str(target))
                times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
        for name in ("copy", "import", "export"):
            ratios = [whole / mine for whole, mine in zip(times["copy"], times[name], strict=True)]
            memory = f"peak {peaks[name] / 1e9:.2f} GB, {peaks[name] / bound:.2f} of the bound" if name in peaks else ""
            speed = total / 1e9 / statistics.median(times[name])
            print(f"{name:8s} {speed:6.2f} GB/s   {statistics.median(ratios):5.2f} of copying ({min(ratios):.2f} to {max(ratios):.2f})   {memory}")


if __name__ == "__main__":
    main()
