"""`tpt convert` both ways on a large random model: memory, and speed beside a plain copy of the same files.

    python benchmarks/convert.py [--gigabytes 8] [--rounds 3] [--folder DIR]

A Llama-like model in bf16 whose embedding is a ninth of it is written file by file, imported by `tpt convert import` in a process of its own,
and the checkpoint exported by `tpt convert export` in another. Two copies of the model's files, synced to disk as the conversions are, take turns
with them: a plain one by shutil, and a streamed one that gives page cache back as the conversions do, without which they would have that advantage
over it. Before each of the four everything is written out and what it reads dropped from the page cache. At the end the exported model is compared
with the first one, bit by bit.

    GB/s       the model's bytes over the seconds of the whole command, start-up included; medians of the rounds
    of a copy  a copy's seconds over the command's, within a round: median, and the range; of the plain one, then of the streamed one
    anonymous  the largest RssAnon, sampled every few milliseconds: memory that the process asked for
    all        the largest VmHWM: with pages of mapped files, which the kernel takes back whenever it needs them, and of libraries

Room for three times the model is needed; it is freed at the end.
"""

from __future__ import annotations

import argparse
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
from tpt_megatron.convert.hugging_face import CONFIG, INDEX, HuggingFaceTensors, writing, written_config
from tpt_megatron.convert.streaming import StreamedView, StreamedWriter
from tpt_megatron.files import sync_tree, write_json

GB = 1e9
TO_SPARE = 0.5 * GB
"""What a conversion may take beside twice the largest tensor."""
SHARD_BYTES = 2_000_000_000
AT_ONCE = 1 << 23
SAMPLED_EVERY_S = 0.005
INFINITY = 0x7F80
"""The first bf16, as an integer, that is not finite."""


def make_model(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write a random model; return its bytes and those of its largest tensor."""
    hidden = 4096 if gigabytes >= 4 else 1024
    shape = {"hidden_size": hidden, "ffn_hidden_size": int(3.5 * hidden), "num_heads": hidden // 128, "num_query_groups": hidden // 512}
    vocabulary = int(gigabytes * GB / 9 / 2 / hidden)
    one_layer = hidden * (2 * hidden + 2 * shape["num_query_groups"] * 128) + 3 * hidden * shape["ffn_hidden_size"]
    layers = max(1, round((gigabytes * GB / 2 - 2 * vocabulary * hidden) / one_layer))
    model = ModelConfig.model_validate({**shape, "num_layers": layers, "vocab_size": vocabulary})
    family = FAMILIES["llama"]
    shards = plan_shards(list(pieces(family.rules_of(model), model)), 2, SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for shard in shards:
        with writing(folder / shard.name, shard.shapes, torch.bfloat16) as take:
            for name, of_tensor in shard.shapes.items():
                take(name, torch.randint(0, INFINITY, of_tensor, dtype=torch.int16, generator=generator).view(torch.bfloat16))
    write_json(folder / INDEX, {"metadata": {}, "weight_map": {name: shard.name for shard in shards for name in shard.shapes}})
    write_json(folder / CONFIG, written_config(family, model, positions=8192, dtype=torch.bfloat16, eod_id=None))
    sizes = [2 * torch.Size(of_tensor).numel() for shard in shards for of_tensor in shard.shapes.values()]
    return sum(sizes), max(sizes)


def forget(folder: Path) -> None:
    """Write everything out, and drop a folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> float:
    """Copy a folder and sync it; return the seconds."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    sync_tree(target)
    return time.perf_counter() - began


def streamed_copy(source: Path, target: Path) -> float:
    """Copy a folder as conversions read and write, and sync it; return the seconds."""
    began = time.perf_counter()
    target.mkdir()
    buffer = bytearray(AT_ONCE)
    for path in source.iterdir():
        with StreamedView(path, 0, path.stat().st_size) as file, StreamedWriter(target / path.name, with_checksum=False) as copied:
            while count := file.readinto(buffer):
                copied.write(memoryview(buffer)[:count])
    sync_tree(target)
    return time.perf_counter() - began


def convert(direction: str, source: Path, target: Path, peaks: dict[str, float]) -> float:
    """Run `tpt convert`; return its seconds, and raise `peaks` (anonymous, all; in bytes) to its memory."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "tpt_megatron.cli", "convert", direction, str(source), str(target)], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon", "VmHWM")))
            for name, line in found.items():  # none, once it is a zombie
                peaks[name] = max(peaks.get(name, 0), 1024 * float(line.split()[0]))
            time.sleep(SAMPLED_EVERY_S)
    if process.returncode:
        sys.exit(f"tpt convert {direction} failed")
    return time.perf_counter() - began


def check(first: Path, second: Path) -> None:
    """Exit unless both folders have the same tensors."""
    theirs, ours = HuggingFaceTensors(first), HuggingFaceTensors(second)
    if theirs.shapes != ours.shapes or not all(torch.equal(theirs.read(name), ours.read(name)) for name in theirs.shapes):
        sys.exit("the exported model is not the imported one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        model, copied, checkpoint, exported = (root / name for name in ("model", "copied", "checkpoint", "exported"))
        model.mkdir()
        total, largest = make_model(model, args.gigabytes)
        bound = 2 * largest + TO_SPARE
        print(f"{total / GB:.2f} GB, largest tensor {largest / GB:.2f} GB, memory's bound {bound / GB:.2f} GB", flush=True)
        times: dict[str, list[float]] = {"copy": [], "streamed": [], "import": [], "export": []}
        peaks: dict[str, dict[str, float]] = {"import": {}, "export": {}}
        for _ in range(args.rounds):
            for made in (checkpoint, exported):
                shutil.rmtree(made, ignore_errors=True)
            for name, kind in (("copy", copy), ("streamed", streamed_copy)):
                forget(model)
                times[name].append(kind(model, copied))
                shutil.rmtree(copied)
            forget(model)
            times["import"].append(convert("import", model, checkpoint, peaks["import"]))
            forget(checkpoint / "iter_0000000")
            times["export"].append(convert("export", checkpoint, exported, peaks["export"]))
            print("  ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in times.items()), flush=True)
        for name, seconds in times.items():
            ratios = [[whole / mine for whole, mine in zip(times[kind], seconds, strict=True)] for kind in ("copy", "streamed")]
            of_copy = ", ".join(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})" for found in ratios)
            memory = f"  anonymous {peaks[name]['RssAnon'] / GB:.2f} GB, all {peaks[name]['VmHWM'] / GB:.2f} GB" if name in peaks else ""
            print(f"{name:8}  {total / GB / statistics.median(seconds):5.2f} GB/s  of a copy {of_copy}{memory}")
        check(model, exported)


if __name__ == "__main__":
    main()
