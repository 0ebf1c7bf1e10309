"""What `tpt plan` says a rank holds is what a rank of a real run holds. Real processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tpt_megatron.mcore  # noqa: F401 - before megatron
from tests.support.ranks import WarmRanks
from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.convert.checkpoint_reader import CheckpointReader
from tpt_megatron.launch.activations import activations
from tpt_megatron.launch.plan import checkpoint_bytes
from tpt_megatron.mcore.simulation import simulate

SHAPE = {
    "num_layers": 4,
    "hidden_size": 96,
    "ffn_hidden_size": 176,
    "num_heads": 4,
    "num_query_groups": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "vocab_divisor": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": SHAPE,
    "tied, with norms and biases": SHAPE | {"tie_embeddings": True, "qk_norm": True, "qkv_bias": True},
    "experts": SHAPE | {"experts": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 80}},
    "mtp": SHAPE | {"mtp_layers": 1},
}
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning")]  # of megatron-core

CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "one": (1, "dense", {}, {}),
    "one, attention over the sequence": (1, "dense", {}, {"data.attention": "sequence"}),
    "one, nothing but layers' inputs kept": (1, "dense", {}, {"recompute": "full", "model.vocab_size": 3000}),
    "one, attention computed anew": (1, "dense", {}, {"recompute": "selective"}),
    "one, norms and biases": (1, "tied, with norms and biases", {}, {}),
    "one, experts": (1, "experts", {}, {}),
    "one, multi-token prediction": (1, "mtp", {}, {}),
    "DP2": (2, "dense", {}, {}),
    "DP2, plain optimizer": (2, "dense", {"distributed_optimizer": False}, {}),
    "DP2, plain optimizer, bf16": (2, "dense", {"distributed_optimizer": False}, {"precision": "bf16"}),
    "DP2, bf16": (2, "dense", {}, {"precision": "bf16"}),
    "TP2": (2, "tied, with norms and biases", {"tensor_parallel": 2}, {}),
    "TP2+SP": (2, "dense", {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "CP2": (2, "dense", {"context_parallel": 2}, {}),
    "PP2": (2, "dense", {"pipeline_parallel": 2}, {}),
    "PP2, tied": (2, "tied, with norms and biases", {"pipeline_parallel": 2}, {}),
    "interleaved PP2": (2, "dense", {"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
    "EP2": (2, "experts", {"expert_parallel": 2}, {}),
    "TP2+SP, experts": (2, "experts", {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "TP2+SP, PP2": (4, "dense", {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2}, {}),
    "DP4, overlapped": (4, "dense", {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
    "EP2, PP2": (4, "experts", {"expert_parallel": 2, "pipeline_parallel": 2}, {}),
}
SAVED = {
    "one",
    "one, norms and biases",
    "one, experts",
    "one, multi-token prediction",
    "DP2, plain optimizer",
    "DP2, plain optimizer, bf16",
    "DP2, bf16",
    "TP2+SP, PP2",
}
"""Their checkpoints are as large as was planned, too."""
WITHOUT_FORMULA = {"DP2, plain optimizer, bf16", "DP2, bf16", "DP4, overlapped"}
"""Norms of bf16 go by fp32 on a CPU alone; and what autograd keeps cannot be watched where gradients are reduced early."""


def config_of(model: str, parallel: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_dir": "unused",
        "data": {"train": "unused", "sequence_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "parallel": parallel,
        "steps": 1,
        "global_batch_sequences": 16,
        "micro_batch_sequences": 2,
    }
    values["model"] = dict(MODELS[model])
    for key, value in others.items():
        group, _, name = key.rpartition(".")
        (values[group] if group else values)[name] = value
    return values


@pytest.mark.parametrize("case", CASES)
def test_a_simulated_rank_holds_what_a_real_one_holds(case: str, warm_ranks: WarmRanks, tmp_path: Path) -> None:
    """Every rank, byte by byte; and autograd keeps what the formula says."""
    ranks, model, parallel, others = CASES[case]
    values = config_of(model, parallel, others)
    job = tmp_path / "job.json"
    saved = tmp_path / "checkpoints" if case in SAVED else None
    job.write_text(json.dumps({"config": values, "output": str(tmp_path / "rank"), "save": saved and str(saved)}))
    done = warm_ranks.run(str(job), module="tests.distributed.held_worker", ranks=ranks)
    assert done.returncode == 0, done.stderr
    config = check_config(TrainConfig, values, "job")
    micro_batches = 8 * config.parallel.model_ranks // ranks
    kept: dict[int, list[int]] = {}
    for planned in simulate(config, ranks, range(ranks)):
        real = json.loads((tmp_path / f"rank.{planned.rank}.json").read_text())
        kept.setdefault(planned.pipeline_stage, []).append(real.pop("kept"))
        del real["allocated"]  # of a GPU
        assert {name: getattr(planned, name) for name in real} == real
    if saved is not None:
        tensors = CheckpointReader(saved / "iter_0000001").tensors.values()
        assert checkpoint_bytes(config) == sum(stored.dtype.itemsize * torch.Size(stored.shape).numel() for stored in tensors)
    if case in WITHOUT_FORMULA:
        return
    for stage, found in kept.items():
        formula = activations(config, stage, micro_batches, on_cuda=False)
        # The mean: ranks with experts have as many tokens as these were sent.
        assert sum(found) / len(found) == pytest.approx(formula.kept + formula.logits, rel=0.005)
