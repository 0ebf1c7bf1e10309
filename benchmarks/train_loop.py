"""What the trainer does around its steps, and what losses by part cost: seconds a step of three loops, which take turns in processes of their own.

    python benchmarks/train_loop.py
    python benchmarks/train_loop.py --model llama-3.2-1b --sequence 8192 --precision bf16 --micro-batches 4

    bare    Engine.train_step, again and again, over tokens in memory that all count alike
    loop    the trainer's own, over a dataset without sidecars: reading, losses, metrics.jsonl, log
    parts   the same tokens with their sidecar of parts: document tokens weigh 0.3, and the loss of each part is in metrics.jsonl

A loop's time is from the beginning of one step to the beginning of the next, the median over --steps; figures are medians over --rounds, and ratios are
those of one round. The dataset is made by `tpt preprocess` in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

LOOPS = ("bare", "loop", "parts")
DEMO = {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 176, "num_heads": 2, "num_query_groups": 2, "vocab_size": 300}
SETTLING = 5
"""Steps that are not counted."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a preset of tpt_megatron/config/model.py, or demo")
    parser.add_argument("--sequence", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences a forward pass")
    parser.add_argument("--micro-batches", type=int, default=1, help="forward passes a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--fp8", choices=("none", "delayed", "tensorwise", "blockwise", "mxfp8"), default="none")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.measure:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_datasets(Path(folder), args.sequence * args.micro_batch * args.micro_batches * (args.steps + SETTLING + 2))
        rounds = [{name: run(name, folder) for name in LOOPS} for _ in range(args.rounds)]
    print(f"{args.model}, sequence {args.sequence}, {args.micro_batches} x {args.micro_batch} sequences a step, {args.precision}, {args.rounds} rounds")
    for name in LOOPS:
        ratios = [found[name] / found["bare"] for found in rounds]
        seconds = median(found[name] for found in rounds)
        print(f"{name:<6}{seconds * 1e3:>10.2f} ms a step, {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of bare")
    ratios = [found["parts"] / found["loop"] for found in rounds]
    print(f"parts are {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) of loop")


def make_datasets(folder: Path, tokens: int) -> None:
    """Make at least so many tokens of documents with thoughts, as `parts`, and the same without what tells them apart, as `loop`."""
    words = np.random.default_rng(0).integers(0, 1000, (-(-tokens // 400), 110))
    with open(folder / "documents.jsonl", "w") as file:
        for row in words:
            text, thought = (" ".join(map(str, part)) for part in np.split(row, [40]))
            file.write(json.dumps({"text": text, "thoughts": [{"text": thought, "generator": "g"}]}) + "\n")
    config = {"input": str(folder / "documents.jsonl"), "output": str(folder / "datasets"), "tokenizer": "byte", "arms": ["append"]}
    (folder / "preprocess.yaml").write_text(json.dumps(config))
    subprocess.run([sys.executable, "-m", "tpt_megatron.cli", "preprocess", str(folder / "preprocess.yaml")], check=True, capture_output=True)
    for name in ("parts", "loop"):
        (folder / name).mkdir()
        for file in (folder / "datasets/append").glob("train*"):
            if name == "parts" or file.name in ("train.bin", "train.idx"):
                (folder / name / file.name).symlink_to(file)


def run(name: str, folder: str) -> float:
    """Return the seconds of a step of one loop, measured in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, "--folder", folder]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure(args: argparse.Namespace) -> float:
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    from tpt_megatron.config.load import check_config
    from tpt_megatron.config.train import TrainConfig

    name, batch = args.measure, args.micro_batch * args.micro_batches
    with tempfile.TemporaryDirectory() as run_dir:
        data: dict[str, Any] = {"train": str(args.folder / ("loop" if name == "bare" else name) / "train"), "sequence_length": args.sequence}
        values = {
            "run_dir": run_dir,
            "model": DEMO if args.model == "demo" else args.model,
            "data": data | {"attention": "sequence"} | ({"loss_weights": {"document": 0.3}} if name == "parts" else {}),
            "optimizer": {"learning_rate": 1e-5},
            "steps": args.steps + SETTLING,
            "global_batch_sequences": batch,
            "micro_batch_sequences": args.micro_batch,
            "precision": args.precision,
            "fp8": args.fp8,
            "checkpoint": {"every_steps": 0},
        }
        config = check_config(TrainConfig, values, name)
        begins = bare(config, args) if name == "bare" else trainer(config)
    return median(np.diff(begins)[SETTLING:].tolist())


def bare(config: Any, args: argparse.Namespace) -> list[float]:
    """Return when each step began."""
    from tpt_megatron.mcore import groups
    from tpt_megatron.mcore.engine import Engine, MicroBatch

    groups.join(config.parallel)
    engine, draw, shape = Engine(config, kinds=1), np.random.default_rng(0), (args.micro_batch, args.sequence)
    batches = []
    for _ in range(args.micro_batches):
        ids = draw.integers(0, 257, (args.micro_batch, args.sequence + 1))
        batches.append(MicroBatch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones(shape, np.float32), np.zeros(shape, np.int32)))
    begins = []
    for _ in range(config.last_step):
        begins.append(time.perf_counter())
        engine.train_step(batches, 1e-5)
    groups.leave()
    return begins


def trainer(config: Any) -> list[float]:
    """Return when each step of `tpt train`'s loop began."""
    from tpt_megatron.mcore import groups
    from tpt_megatron.train.data import open_run_data
    from tpt_megatron.train.loop import Run

    begins = []

    class Timed(Run):
        def _step(self, step: int) -> dict[str, Any]:
            begins.append(time.perf_counter())
            return super()._step(step)

    layout = groups.join(config.parallel)
    Timed(config, layout, open_run_data(config)).train()
    groups.leave()
    return begins


if __name__ == "__main__":
    main()
