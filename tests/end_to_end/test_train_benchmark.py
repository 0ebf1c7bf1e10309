"""The trainer's benchmark for GPUs, run on a CPU: it takes real steps, and its figures belong together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = ("--device", "cpu", "--model", "small", "--sequence", "32", "--micro-batches", "2", "--warm-up", "1", "--rounds", "3", "--steps", "1", "--matmul", "64")


def benchmark(*arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "benchmarks/train_gpu.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize(("ranks", "precisions"), [(1, ("fp32", "bf16", "tensorwise")), (2, ("fp32",))])
def test_figures_belong_together(ranks: int, precisions: tuple[str, ...]) -> None:
    ended = benchmark(*SMALL, "--precision", *precisions, ranks=ranks)
    assert ended.returncode == 0, ended.stderr[-3000:]
    product, title, _, *lines = ended.stdout.splitlines()
    matmul = float(product.removeprefix("a bf16 product of matrices of 64: ").removesuffix(" TFLOP/s"))
    # 2 layers of hidden 64, 4 heads and 2 groups of 16, feed-forward 192, a vocabulary of 512; 32 tokens, causal. 6 FLOPs a multiplication.
    flops = 6 * (2 * (64 * 16 * (2 * 4 + 2 * 2) + 4 * 16 * 32 + 3 * 64 * 192) + 64 * 512)
    assert title.startswith(f"small: 164,160 parameters, sequence 32, batch {2 * ranks} in 2 micro-batches a rank, {ranks} x cpu, ")
    assert title.endswith(f", {flops} FLOPs a token")
    found = {line.split()[0]: line.split()[1:] for line in lines}
    assert tuple(found) == precisions
    if "tensorwise" in found:
        refused = " ".join(found.pop("tensorwise"))
        assert refused == "not measured: fp8=tensorwise needs a GPU with Transformer Engine, and there is no CUDA here; set fp8=none"
    first = float(found["fp32"][0].replace(",", ""))
    for tokens, tflops, mfu, reached, memory_gb, ratio in found.values():
        tokens_per_second = float(tokens.replace(",", ""))
        assert float(tflops) == pytest.approx(tokens_per_second * flops / ranks / 1e12, rel=1e-3)
        assert float(ratio) == pytest.approx(tokens_per_second / first, abs=1e-3)
        assert float(reached.removesuffix("%")) / 100 == pytest.approx(float(tflops) / matmul, rel=2e-3, abs=1e-4)
        assert mfu == "-"  # nobody promises anything of this chip
        assert 0.1 < float(memory_gb) < 10


def test_variants_peers_and_layers_are_rows_of_their_own() -> None:
    every = ("plain", "parts", "packed", "selective", "full")
    options = ("--precision", "fp32", "--variants", *every, "--layers", "1", "2", "--peers", "--no-compile", "--where")
    ended = benchmark(*SMALL, "--rounds", "1", *options)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [line for line in ended.stdout.splitlines() if line.startswith(("fp32 ", "transformers ", "layers "))]
    whole = [f"fp32 {variant}" for variant in every] + ["transformers fp32"]
    assert [row.partition("  ")[0] for row in rows] == 2 * [*whole, "layers fp32"] + whole  # with one layer, with two, and the lines through them
    assert [row for row in rows if "not measured" in row] == 2 * [
        "layers fp32          not measured: Transformer Engine's layers need a GPU, and there is no CUDA here"
    ]
    assert sum(line.startswith("small") for line in ended.stdout.splitlines()) == 2
    assert "small, 1 of its 2 layers: 114,880 parameters" in ended.stdout
    one, two = (float(next(row for row in part if row.startswith("fp32 plain")).split()[2].replace(",", "")) for part in (rows[:7], rows[7:14]))
    line = next(row for row in rows[14:] if row.startswith("fp32 plain"))
    # 64 tokens; two points are on their line, and the model has two layers.
    assert float(line.partition("layers: ")[2].split()[0].replace(",", "")) == pytest.approx(two, rel=1e-2)
    assert float(line.split("a layer ")[1].split()[0]) == pytest.approx(64 / two - 64 / one, rel=2e-2, abs=1e-4)
    assert ended.stdout.count("matrix products") == 2 * len(whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    ended = benchmark()
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "there is no CUDA device here; --device cpu --model small" in ended.stderr.splitlines()[-1]
    assert ended.stdout == ""


def test_a_layout_that_does_not_fit_is_one_line() -> None:
    ended = benchmark(*SMALL, "--parallel", "tensor_parallel=2")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "benchmarks/train_gpu.py: parallel.tensor_parallel=2 does not divide the 1 rank(s) of this job; "
        "start it with 2 (torchrun --nproc-per-node 2 ...) or change the layout"
    )
