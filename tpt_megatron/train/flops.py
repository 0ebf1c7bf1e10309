"""Model FLOPs: what the model's matrix products take by themselves, whatever the machine computes besides (recomputation, padding).

Convention: a multiplication and an addition are 2 FLOPs; attention is causal, so a token has half of its sequence to look at, also where
documents make it less; of a mixture only the experts that a token goes to count; the vocabulary is not padded; the backward
pass takes twice the forward pass. Norms, embeddings and the optimizer are left out.
"""

from __future__ import annotations

from tpt_megatron.config.model import ModelConfig

PEAK_TFLOPS = {  # dense, by precision: NVIDIA's data sheets
    "H100 PCIe": {"bf16": 756.0, "fp8": 1513.0},
    "H100 NVL": {"bf16": 835.5, "fp8": 1670.5},
    "H200 NVL": {"bf16": 835.5, "fp8": 1670.5},
    "H100": {"bf16": 989.4, "fp8": 1978.9},
    "H200": {"bf16": 989.4, "fp8": 1978.9},
    "A100": {"bf16": 312.0},
}
"""Of one GPU. Names are parts of what CUDA calls the device, the more special ones first."""


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Return the FLOPs of training on one token."""
    heads, groups, experts = model.num_heads, model.num_query_groups, model.experts
    projections = model.hidden_size * model.head_size * (2 * heads + 2 * groups)
    attention = 2 * heads * model.head_size * sequence_length / 2  # scores, and their sum of values
    if experts is None:
        mlp = 3 * model.hidden_size * model.ffn_hidden_size
    else:
        mlp = model.hidden_size * (3 * experts.top_k * experts.ffn_hidden_size + experts.num_experts)
    layer = projections + attention + mlp
    output = model.hidden_size * model.vocab_size
    # A layer for multi-token prediction has besides a product of two hidden states, and an output of its own.
    further = model.mtp_layers * (layer + 2 * model.hidden_size**2 + output)
    return 3 * 2 * (model.num_layers * layer + output + further)


def peak_tflops(device: str, precision: str) -> float | None:
    """Return what the chip's data sheet states for this precision (bf16 or fp8), in TFLOP/s; None where it is not known."""
    for name, by_precision in PEAK_TFLOPS.items():
        if name in device:
            return by_precision.get(precision)
    return None
