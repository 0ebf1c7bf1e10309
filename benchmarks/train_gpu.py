"""Throughput of the trainer on CUDA: tokens/s, model TFLOP/s and MFU in bf16 and with each FP8 recipe, as ratios to the first precision that ran.

    python benchmarks/train_gpu.py --model qwen3-0.6b llama-3.2-1b
    torchrun --nproc-per-node 8 benchmarks/train_gpu.py --model llama-3-8b --parallel tensor_parallel=2 sequence_parallel=true

A step is the trainer's: `Engine.train_step` over random tokens of its micro-batches, then the figures of `Speed`, which writes metrics.jsonl.
All that the trainer does besides (reading data, saving) is left out. Each precision is built, warmed up and measured by itself, since two
models of this size may not fit one GPU; a figure is the median over --rounds of --steps steps. A recipe that the chip does not have is named with
Transformer Engine's reason. --device cpu runs the same on a CPU, where no chip's promise is known and so no MFU, to test this script.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import yaml

PRECISIONS = ("bf16", "delayed", "tensorwise", "blockwise", "mxfp8", "fp32")
SHAPES = {"small": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_heads": 4, "num_query_groups": 2, "vocab_size": 512}}
"""Models that are no preset."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One precision's medians; peak memory of rank 0, which the whole of its model, optimizer and activations took."""

    tokens_per_second: float
    tflops: float
    mfu: float | None
    memory_gb: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen3-0.6b"], help=f"presets of tpt_megatron/config/model.py, or {', '.join(SHAPES)}")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS[:-1]), help="bf16 (the default's first), FP8 recipes, fp32")
    parser.add_argument("--fp8-parameters", action="store_true", help="keep parameters in FP8 too, where there is a recipe")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens a sequence")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences a forward pass")
    parser.add_argument("--micro-batches", type=int, default=4, help="forward passes a step on each data-parallel rank")
    parser.add_argument("--documents", type=int, default=0, help="documents a sequence, each attending to itself; 0: attention over the whole sequence")
    parser.add_argument("--parallel", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the config's group `parallel`")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps a round")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before the first round")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/train_gpu.py: there is no CUDA device here; --device cpu --model small --precision fp32 runs the same steps on a CPU")
    from tpt_megatron.config.load import check_config
    from tpt_megatron.config.parallel import ParallelConfig
    from tpt_megatron.errors import ConfigError
    from tpt_megatron.mcore import groups

    try:
        parallel = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.parallel)}
        layout = groups.join(check_config(ParallelConfig, parallel, "--parallel"))
        for model in args.model:
            report(args, model, parallel, layout)
        groups.leave()
    except ConfigError as error:
        sys.exit(f"benchmarks/train_gpu.py: {error}")


def report(args: argparse.Namespace, model: str, parallel: dict[str, Any], layout: Any) -> None:
    """Measure every precision of one model, and print a line for each as it is done, from one rank."""
    from tpt_megatron.config.load import check_config
    from tpt_megatron.config.train import TrainConfig
    from tpt_megatron.errors import ConfigError, MachineError
    from tpt_megatron.mcore.machine import device_name
    from tpt_megatron.mcore.model import count_parameters
    from tpt_megatron.train.flops import flops_per_token

    def say(line: str) -> None:
        if layout.rank == 0:
            print(line, flush=True)

    batch = args.micro_batch * args.micro_batches * layout.data_parallel_size
    base: Measured | None = None
    for precision in args.precision:
        recipe = precision if precision not in ("bf16", "fp32") else "none"
        config = check_config(
            TrainConfig,
            {
                "run_dir": "unused",
                "model": SHAPES.get(model, model),
                "data": {"train": "unused", "sequence_length": args.sequence, "attention": "document" if args.documents else "sequence"},
                "optimizer": {"learning_rate": 1e-5},
                "parallel": parallel,
                "steps": 1,
                "global_batch_sequences": batch,
                "micro_batch_sequences": args.micro_batch,
                "precision": precision if recipe == "none" else "bf16",
                "fp8": recipe,
                "fp8_parameters": args.fp8_parameters and recipe != "none",
                "recompute": args.recompute,
            },
            model,
        )
        if base is None and precision == args.precision[0]:
            shape = f"{count_parameters(config.model):,} parameters, sequence {args.sequence}, batch {batch} in {args.micro_batches} micro-batches a rank"
            say(f"{model}: {shape}, {layout.world_size} x {device_name()}, {flops_per_token(config.model, args.sequence):.6g} FLOPs a token")
            say(f"{'precision':<12}{'tokens/s':>16}{'TFLOP/s a GPU':>16}{'MFU':>9}{'memory, GB':>13}{'ratio':>9}")
        try:
            found = measure(args, config, layout)
        except (MachineError, ConfigError) as error:
            say(f"{precision:<12} not measured: {error}")
            continue
        finally:
            release()
        base = base or found
        mfu = "-" if found.mfu is None else f"{found.mfu:.2%}"
        ratio = found.tokens_per_second / base.tokens_per_second
        say(f"{precision:<12}{found.tokens_per_second:>16,.1f}{found.tflops:>16.6g}{mfu:>9}{found.memory_gb:>13.3f}{ratio:>9.3f}")


def measure(args: argparse.Namespace, config: Any, layout: Any) -> Measured:
    """Return the medians of one precision. Raises MachineError or ConfigError for what the machine does not have."""
    import torch
    import torch.distributed as dist

    from tpt_megatron.mcore.engine import Engine
    from tpt_megatron.train.metrics import Speed

    engine, speed = Engine(config, kinds=1), Speed(config, layout.world_size)
    batches = micro_batches(args, config.model.vocab_size, layout.data_parallel_rank)
    places = config.global_batch_sequences * args.sequence

    def seconds(steps: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            engine.train_step(batches, 1e-5)  # which reads losses from the GPU, so that nothing is under way when it returns but the update
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    seconds(args.warm_up)
    rounds = [speed.metrics(places, places, seconds(args.steps)) for _ in range(args.rounds)]
    return Measured(
        median(line["tokens_per_second"] for line in rounds),
        median(line["model_tflops_per_gpu"] for line in rounds),
        median(line["mfu"] for line in rounds) if "mfu" in rounds[0] else None,
        max(line["memory_gb"] for line in rounds),
    )


def release() -> None:
    """Free what the last model took."""
    import gc

    import torch

    gc.collect()  # model and optimizer refer to each other
    if torch.cuda.is_available():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()  # else it goes on scaling for the last model's layers
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def micro_batches(args: argparse.Namespace, vocabulary: int, rank: int) -> list[Any]:
    """Return one step's random micro-batches of this data-parallel rank, every label counted; the same in every precision."""
    from tpt_megatron.mcore.engine import MicroBatch

    generator = np.random.default_rng(rank)
    shape = (args.micro_batch, args.sequence)
    documents = None
    if args.documents:
        documents = np.broadcast_to((np.arange(args.sequence) * args.documents // args.sequence).astype(np.int32), shape).copy()
    batches = []
    for _ in range(args.micro_batches):
        ids = generator.integers(0, vocabulary, (args.micro_batch, args.sequence + 1))
        batches.append(MicroBatch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones(shape, np.float32), np.zeros(shape, np.int32), documents))
    return batches


if __name__ == "__main__":
    main()
