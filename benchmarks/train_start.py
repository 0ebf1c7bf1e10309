"""Seconds from the command to the first optimizer step, and the part of a step that is waiting for data, with the demo's model.

    python benchmarks/train_start.py [--rounds 5] [--steps 60]

Each round starts `tpt train` anew on a dataset of 2,000 generated documents and watches metrics.jsonl: its first line is the end of the
first step. Data time is what the trainer itself measures, over all steps but the first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TPT = (sys.executable, "-m", "tpt_megatron.cli")


def make_data(folder: Path) -> None:
    """Write documents and preprocess them."""
    with open(folder / "documents.jsonl", "w") as file:
        for number in range(2000):
            thought = {"text": f"{number} and {number + 7} make {2 * number + 7}.", "generator": "benchmark"}
            file.write(json.dumps({"text": f"Add {number} to {number + 7}. " * 4, "thoughts": [thought]}) + "\n")
    command = [*TPT, "preprocess", "demo-preprocess", f"input={folder}/documents.jsonl", f"output={folder}/data", "tokenizer=byte", "arms=[append]"]
    subprocess.run(command, check=True, capture_output=True)


def train(folder: Path, steps: int) -> tuple[float, float]:
    """Run once; return the seconds to the first step, and the part of the later steps that data took."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    settings = [f"run_dir={run_dir}", f"data.train={folder}/data/append/train", "data.validation=null", f"steps={steps}"]
    settings += ["validate_every_steps=0", "checkpoint.every_steps=0", "optimizer.warmup_steps=1"]
    began = time.perf_counter()
    with subprocess.Popen([*TPT, "train", "demo-train", *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        first = None
        while process.poll() is None and first is None:
            time.sleep(0.01)
            metrics = run_dir / "metrics.jsonl"
            if metrics.is_file() and metrics.stat().st_size:
                first = time.perf_counter() - began
        said, _ = process.communicate()
    if process.returncode or first is None:
        sys.exit(said)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    return first, sum(line["data_time_s"] for line in lines) / sum(line["step_time_s"] for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        make_data(Path(temporary))
        rounds = [train(Path(temporary), args.steps) for _ in range(args.rounds)]
    for name, values, unit, factor in (
        ("command to first step", [first for first, _ in rounds], "s", 1),
        ("data time of a step", [part for _, part in rounds], "%", 100),
    ):
        scaled = [factor * value for value in values]
        print(f"{name:22s} {statistics.median(scaled):6.2f} {unit}  (from {min(scaled):.2f} to {max(scaled):.2f})")


if __name__ == "__main__":
    main()
