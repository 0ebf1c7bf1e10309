"""Throughput of the trainer on CUDA: tokens/s, model TFLOP/s and MFU by precision and by what a step has to do, beside two peers in the same run.

    python benchmarks/train_gpu.py --model llama-3-8b --layers 4 8 --sequence 8192 --precision bf16 tensorwise blockwise --peers --where
    python benchmarks/train_gpu.py --model llama-3.2-1b llama-3.2-3b --sequence 8192 --variants plain parts packed full
    torchrun --nproc-per-node 8 benchmarks/train_gpu.py --model llama-3-8b --parallel tensor_parallel=2 sequence_parallel=true

A step is the trainer's: `Engine.train_step` over random tokens of its micro-batches, then the figures of `Speed`, which writes metrics.jsonl.
What the trainer does besides (reading, metrics, sidecars) is measured by train_loop.py. Each row is built, warmed up and measured by itself, since two
models of this size may not fit one GPU; a figure is the median over --rounds of --steps steps. A recipe that the chip does not have is named with
Transformer Engine's reason. --device cpu runs the same on a CPU, where no chip's promise is known and so no MFU, to test this script.

variants: plain (every label counts alike, attention over the whole sequence); parts (document and thinking tokens, weighed differently, losses by
part); packed (--documents a sequence, each attending to itself); selective, full (recomputation).
layers: with --layers the models have so many, which one GPU holds. Of two and more the seconds of a step are a line over the number of layers, from
which the whole model's throughput is EXTRAPOLATED, and said to be.
peers (train_peers.py): transformers' own model, compiled, with torch's FSDP and fused AdamW; and Transformer Engine's layers alone, without
embedding, loss or optimizer, which is about the most that can be reached with them.
matmul: the TFLOP/s of a large bf16 matrix product, measured first: what the chip gives under its power limit, beside what its data sheet promises.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import yaml

PRECISIONS = ("bf16", "delayed", "tensorwise", "blockwise", "mxfp8", "fp32")
SHAPES = {"small": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_heads": 4, "num_query_groups": 2, "vocab_size": 512}}
"""Models that are no preset."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"data": {"loss_weights": {"document": 0.3}}},
    "packed": {"data": {"attention": "document"}},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
}
"""What each sets in the config."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One row's medians; peak memory of rank 0, which the whole of its model, optimizer and activations took."""

    seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float | None
    memory_gb: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen3-0.6b"], help=f"presets of tpt_megatron/config/model.py, or {', '.join(SHAPES)}")
    parser.add_argument("--layers", nargs="+", type=int, help="have so many layers in place of the model's own; several are measured one after another")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS[:-1]), help="bf16 (the default's first), FP8 recipes, fp32")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain"], help="what steps are measured, in each precision")
    parser.add_argument("--fp8-parameters", action="store_true", help="keep parameters in FP8 too, where there is a recipe")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens a sequence")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences a forward pass")
    parser.add_argument("--micro-batches", type=int, default=4, help="forward passes a step on each data-parallel rank")
    parser.add_argument("--documents", type=int, default=8, help="documents a sequence, of variant packed")
    parser.add_argument("--parallel", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the config's group `parallel`")
    parser.add_argument("--peers", action="store_true", help="measure transformers and bare Transformer Engine layers, too")
    parser.add_argument("--no-compile", action="store_true", help="leave transformers' model as it is")
    parser.add_argument("--where", action="store_true", help="say where the time of one step goes, by torch's profiler, after each row")
    parser.add_argument("--matmul", type=int, default=8192, help="rows and columns of the matrices whose product is measured; 0: none")
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
        report = Report(args, parallel, layout)
        for model in args.model:
            report.model(model)
        groups.leave()
    except ConfigError as error:
        sys.exit(f"benchmarks/train_gpu.py: {error}")


class Report:
    """Measures every row of every model, and prints each as it is done, from one rank."""

    def __init__(self, args: argparse.Namespace, parallel: dict[str, Any], layout: Any) -> None:
        self._args, self._parallel, self._layout = args, parallel, layout
        self._batch = args.micro_batch * args.micro_batches * layout.data_parallel_size
        self._matmul_tflops = matmul_tflops(args.matmul) if args.matmul else None
        self._base: Measured | None = None
        if self._matmul_tflops is not None:
            self._say(f"a bf16 product of matrices of {args.matmul}: {self._matmul_tflops:.4g} TFLOP/s")

    def model(self, model: str) -> None:
        """Measure one model, with each number of layers."""
        from tpt_megatron.config.model import ModelConfig

        whole = ModelConfig.model_validate(SHAPES.get(model, model))
        rows: dict[str, dict[int, Measured]] = {}
        for layers in self._args.layers or [whole.num_layers]:
            self._title(model, whole.num_layers, layers, whole)
            self._base = None
            shape = whole.model_dump() | {"num_layers": layers}
            for name, measure in self._rows(shape):
                found = self._row(name, measure)
                if found is not None:
                    rows.setdefault(name, {})[layers] = found
        if len(self._args.layers or []) > 1:
            self._extrapolate(whole, rows)

    def _rows(self, shape: dict[str, Any]) -> list[tuple[str, Callable[[], Measured]]]:
        args, found = self._args, []
        for precision in args.precision:
            for variant in args.variants:
                name = precision if args.variants == ["plain"] else f"{precision} {variant}"
                found.append((name, lambda p=precision, v=variant: self._ours(shape, p, v)))
        if args.peers:
            import train_peers

            first = "fp32" if args.precision[0] == "fp32" else "bf16"
            found.append((f"transformers {first}", lambda: self._peer(self._config(shape, first, "plain"), train_peers.transformers_step)))
            found += [
                (f"layers {precision}", lambda p=precision: self._peer(self._config(shape, p, "plain"), train_peers.layers_step, layers_only=True))
                for precision in args.precision
            ]
        return found

    def _row(self, name: str, measure: Callable[[], Measured]) -> Measured | None:
        import torch

        from tpt_megatron.errors import ConfigError, MachineError

        try:
            found = measure()
        except (MachineError, ConfigError) as error:
            self._say(f"{name:<20} not measured: {error}")
            return None
        except torch.OutOfMemoryError as error:
            if self._layout.world_size > 1:  # other ranks wait for this one
                raise
            self._say(f"{name:<20} not measured: {str(error).splitlines()[0]}")
            return None
        finally:
            release()
        self._base = base = self._base or found  # of these layers
        mfu = "-" if found.mfu is None else f"{found.mfu:.2%}"
        reached = "-" if self._matmul_tflops is None else f"{found.tflops / self._matmul_tflops:.2%}"
        ratio = found.tokens_per_second / base.tokens_per_second
        self._say(f"{name:<20}{found.tokens_per_second:>16,.1f}{found.tflops:>16.6g}{mfu:>9}{reached:>11}{found.memory_gb:>13.3f}{ratio:>9.3f}")
        return found

    def _config(self, shape: dict[str, Any], precision: str, variant: str) -> Any:
        from tpt_megatron.config.load import check_config
        from tpt_megatron.config.train import TrainConfig

        args, recipe = self._args, precision if precision not in ("bf16", "fp32") else "none"
        changes = VARIANTS[variant]
        values = {
            "run_dir": "unused",
            "model": shape,
            "data": {"train": "unused", "sequence_length": args.sequence, "attention": "sequence"} | changes.get("data", {}),
            "optimizer": {"learning_rate": 1e-5},
            "parallel": self._parallel,
            "steps": 1,
            "global_batch_sequences": self._batch,
            "micro_batch_sequences": args.micro_batch,
            "precision": precision if recipe == "none" else "bf16",
            "fp8": recipe,
            "fp8_parameters": args.fp8_parameters and recipe != "none",
            "recompute": changes.get("recompute", "none"),
        }
        return check_config(TrainConfig, values, f"{precision} {variant}")

    def _ours(self, shape: dict[str, Any], precision: str, variant: str) -> Measured:
        from tpt_megatron.mcore.engine import Engine

        config = self._config(shape, precision, variant)
        engine = Engine(config, kinds=2 if variant == "parts" else 1)
        batches = micro_batches(self._args, config.model.vocab_size, self._layout.data_parallel_rank, variant)
        # It reads losses from the GPU, so that nothing is under way when it returns but the update.
        return self._measure(config, lambda: engine.train_step(batches, 1e-5))

    def _peer(self, config: Any, build: Callable[[Any, argparse.Namespace], Callable[[], object]], *, layers_only: bool = False) -> Measured:
        """Measure a peer, of which each rank has its own sequences, whatever the trainer's layout."""
        from tpt_megatron.mcore.machine import check_machine

        check_machine(config)
        args = self._args
        sequences = args.micro_batch * args.micro_batches * self._layout.world_size
        return self._measure(config, build(config, args), sequences, layers_only=layers_only)

    def _measure(self, config: Any, step: Callable[[], object], sequences: int | None = None, *, layers_only: bool = False) -> Measured:
        """Return the medians of one row. Raises MachineError or ConfigError for what the machine does not have.

        sequences: of all ranks in a step, where it is not the config's; layers_only: the step has no output layer.
        """
        import torch
        import torch.distributed as dist

        from tpt_megatron.train.metrics import Speed

        args, speed = self._args, Speed(config, self._layout.world_size)
        places = (sequences or config.global_batch_sequences) * args.sequence
        part = of_layers(config.model, args.sequence) if layers_only else 1.0

        def seconds(steps: int) -> float:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return (time.perf_counter() - began) / steps

        if args.warm_up:
            seconds(args.warm_up)
        times = [seconds(args.steps) for _ in range(args.rounds)]
        lines = [speed.metrics(places, places, taken) for taken in times]
        if args.where:
            for line in where_time_goes(step):
                self._say(f"    {line}")
        return Measured(
            median(times),
            median(line["tokens_per_second"] for line in lines),
            part * median(line["model_tflops_per_gpu"] for line in lines),
            part * median(line["mfu"] for line in lines) if "mfu" in lines[0] else None,
            max(line["memory_gb"] for line in lines),
        )

    def _title(self, name: str, whole: int, layers: int, model: Any) -> None:
        from tpt_megatron.mcore.machine import device_name
        from tpt_megatron.mcore.model import count_parameters
        from tpt_megatron.train.flops import flops_per_token

        args, built = self._args, model.model_copy(update={"num_layers": layers})
        part = "" if layers == whole else f", {layers} of its {whole} layers"
        shape = f"{count_parameters(built):,} parameters, sequence {args.sequence}, batch {self._batch} in {args.micro_batches} micro-batches a rank"
        flops = f"{flops_per_token(built, args.sequence):.6g} FLOPs a token"
        self._say(f"{name}{part}: {shape}, {self._layout.world_size} x {device_name()}, {flops}")
        self._say(f"{'row':<20}{'tokens/s':>16}{'TFLOP/s a GPU':>16}{'MFU':>9}{'of matmul':>11}{'memory, GB':>13}{'ratio':>9}")

    def _extrapolate(self, whole: Any, rows: dict[str, dict[int, Measured]]) -> None:
        from tpt_megatron.train.flops import flops_per_token

        for name, by_layers in rows.items():
            if len(by_layers) < 2 or name.startswith("layers "):  # which are no whole model
                continue
            found = next(iter(by_layers.values()))
            places = found.seconds * found.tokens_per_second
            a_layer, rest = np.polyfit(list(by_layers), [measured.seconds for measured in by_layers.values()], 1)
            seconds = rest + a_layer * whole.num_layers
            tflops = places * flops_per_token(whole, self._args.sequence) / seconds / self._layout.world_size / 1e12
            line = f"a layer {a_layer:.4g} s, the rest {rest:.4g} s; EXTRAPOLATED to {whole.num_layers} layers: {places / seconds:,.1f} tokens/s, {tflops:.4g}"
            self._say(f"{name:<20} {line} TFLOP/s a GPU")

    def _say(self, line: str) -> None:
        if self._layout.rank == 0:
            print(line, flush=True)


def of_layers(model: Any, sequence: int) -> float:
    """Return the layers' part of the model's FLOPs: all but the output layer's."""
    from tpt_megatron.train.flops import flops_per_token

    return 1 - 6 * model.hidden_size * model.vocab_size / flops_per_token(model, sequence)


def matmul_tflops(size: int) -> float:
    """Return the TFLOP/s of a bf16 product of square matrices: the best of ten rounds of ten."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu") for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * size**3 / best / 1e12


KINDS = {
    "communication": ("nccl", "c10d::", "gloo"),
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "xmma", "nvjet", "::mm", "addmm", "::bmm", "matmul"),
    "loss": ("cross_entropy", "online_softmax", "element_mul", "softmax"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "copies": ("memcpy", "memset", "copy_", "cast", "transpose"),
}
"""Kernels by parts of their names, the first that fits."""


def where_time_goes(step: Callable[[], object]) -> list[str]:
    """Return lines of what one step's time goes to: kernels on the GPU, where there is one, or else operations on the CPU, by kind, and the longest."""
    import torch
    from torch.autograd import DeviceType

    on_cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_cuda
    with torch.profiler.profile(activities=activities) as profile:
        began = time.perf_counter()
        step()
        if on_cuda:
            torch.cuda.synchronize()
        whole = (time.perf_counter() - began) * 1e6
    by_name: dict[str, float] = {}
    for event in profile.key_averages():
        if on_cuda == (event.device_type == DeviceType.CUDA) and not event.is_user_annotation:  # which lie over kernels
            by_name[event.key] = by_name.get(event.key, 0) + (event.self_device_time_total if on_cuda else event.self_cpu_time_total)
    by_kind: dict[str, float] = {}
    for name, taken in by_name.items():
        kind = next((kind for kind, parts in KINDS.items() if any(part in name.lower() for part in parts)), "others")
        by_kind[kind] = by_kind.get(kind, 0) + taken
    busy = sum(by_kind.values())
    lines = [f"{'busy':<18}{busy / whole:>8.1%} of {whole / 1e6:.4g} s, profiled"]
    lines += [f"{kind:<18}{taken / busy:>8.1%}" for kind, taken in sorted(by_kind.items(), key=lambda item: -item[1])]
    return lines + [f"{taken / busy:>26.1%}  {name[:100]}" for name, taken in sorted(by_name.items(), key=lambda item: -item[1])[:5]]


def release() -> None:
    """Free what the last model took."""
    import gc

    import torch

    gc.collect()  # model and optimizer refer to each other
    if torch.cuda.is_available():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
        from transformer_engine.pytorch.module import base

        FP8GlobalStateManager.reset()  # else it goes on scaling for the last model's layers
        getattr(base, "_dummy_wgrads", {}).clear()  # one of each shape of weight
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def micro_batches(args: argparse.Namespace, vocabulary: int, rank: int, variant: str) -> list[Any]:
    """Return one step's random micro-batches of this data-parallel rank; the same tokens in every row."""
    from tpt_megatron.mcore.engine import MicroBatch

    generator = np.random.default_rng(rank)
    shape = (args.micro_batch, args.sequence)
    documents = None
    kinds, weights = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    if variant == "packed":
        documents = np.broadcast_to((np.arange(args.sequence) * args.documents // args.sequence).astype(np.int32), shape).copy()
    if variant == "parts":
        kinds[:, args.sequence // 3 :] = 1  # a document, and its thought
        weights[kinds == 0] = VARIANTS["parts"]["data"]["loss_weights"]["document"]
    batches = []
    for _ in range(args.micro_batches):
        ids = generator.integers(0, vocabulary, (args.micro_batch, args.sequence + 1))
        batches.append(MicroBatch(ids[:, :-1].copy(), ids[:, 1:].copy(), weights, kinds, documents))
    return batches


if __name__ == "__main__":
    main()
