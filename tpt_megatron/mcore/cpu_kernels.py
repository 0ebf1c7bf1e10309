"""Arithmetic of megatron-core 0.16.1 that costs a CPU more passes over memory than it needs, done with fewer.

What CUDA has fused kernels for, megatron-core writes out in separate operations elsewhere, each a pass over tensors that do
not stay in a CPU's cache. The functions below answer the same calls with the same results within rounding:

    rotate               rotary embedding, without a copy for dimensions that do not turn
    swiglu               gated activation, whose backward pass writes both halves of its gradient in place
    accumulate           a weight's gradient, added to the buffer by the matrix product itself
    scale                gradients clipped in place
    collectives          those of one rank, which would copy a buffer onto itself
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional


def install() -> None:
    """Have megatron-core call this module's functions."""
    from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import mlp

    rope_utils._apply_rotary_pos_emb_bshd = rotary_pos_embedding._apply_rotary_pos_emb_bshd = rotate
    mlp.bias_swiglu_impl = swiglu
    layers._grad_accum_fusion_available = True
    layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    clip_grads.multi_tensor_scale_impl = scale
    _leave_out_collectives_of_one()


def rotate(t: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False, multi_latent_attention: bool = False, mscale: float = 1.0) -> torch.Tensor:
    """Return t [s, b, heads, d] turned by freqs [s, 1, 1, d] radians, whose halves are equal."""
    assert not rotary_interleaved and not multi_latent_attention and mscale == 1.0 and freqs.shape[-1] == t.shape[-1]
    first, second = t.chunk(2, dim=-1)
    cos, sin = _cos_and_sin(freqs, t.dtype)
    return torch.addcmul(t * cos, torch.cat((-second, first), dim=-1), sin)


def _cos_and_sin(freqs: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both, computed once for a tensor: megatron-core hands the same one to every layer."""
    known: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = freqs.__dict__.setdefault("cos_and_sin", {})
    if dtype not in known:
        known[dtype] = freqs.cos().to(dtype), freqs.sin().to(dtype)
    return known[dtype]


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(gradient, activated, out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        return result


def swiglu(gate_up: torch.Tensor, bias: torch.Tensor | None, fp8_input_store: bool = False, cpu_offload_input: bool = False) -> torch.Tensor:
    """Return silu(gate) x up [..., f] of gate_up [..., 2f]."""
    assert bias is None and not fp8_input_store and not cpu_offload_input
    activated: torch.Tensor = _SwiGlu.apply(gate_up)  # type: ignore[no-untyped-call]
    return activated


def accumulate(inputs: torch.Tensor, output_gradient: torch.Tensor, weight_gradient: torch.Tensor) -> None:
    """Add output_gradient^T inputs, [tokens, out] and [tokens, in], to weight_gradient [out, in], fp32."""
    if inputs.dtype == weight_gradient.dtype:
        weight_gradient.addmm_(output_gradient.t(), inputs)
    else:
        weight_gradient += output_gradient.t() @ inputs


def scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], factor: float) -> None:
    """Multiply tensors by a factor, in place: the two lists of apex's interface are one."""
    sources, targets = tensor_lists
    assert all(source is target for source, target in zip(sources, targets, strict=True))
    torch._foreach_mul_(list(targets), factor)


class _Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> None: ...


def _leave_out_collectives_of_one() -> None:
    """Let the distributed optimizer's buffers be, where a data-parallel group is one rank: its shard is the whole buffer already."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    coalescing = buffers._coalescing_manager

    @contextmanager
    def coalescing_manager(group: dist.ProcessGroup, *args: Any, **named: Any) -> Iterator[Any]:
        if group.size() == 1:
            yield _Done()
            return
        with coalescing(group, *args, **named) as handle:
            yield handle

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def called(output: torch.Tensor, whole: torch.Tensor, *, group: dist.ProcessGroup, **named: Any) -> Any:
            if group.size() == 1:
                assert output.data_ptr() == whole.data_ptr()
                return None
            return collective(output, whole, group=group, **named)

        return called

    buffers._coalescing_manager = coalescing_manager
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
