"""What megatron-core 0.16.1 takes from apex on CUDA, where apex is missing: it is on no registry, and NVIDIA's images have it."""

from __future__ import annotations

import types

from tpt_megatron.mcore.cpu_kernels import accumulate


def adapt() -> None:
    """Let the output layer add to gradients in place, without which it refuses the setting that has Transformer Engine's layers do so in their products."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers._grad_accum_fusion_available = True
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
