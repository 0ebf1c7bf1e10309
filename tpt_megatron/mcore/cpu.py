"""Lets unmodified megatron-core 0.16.1 train on CPU and gloo. Nothing here runs where there is CUDA.

megatron-core assumes CUDA in a few dozen places, of six kinds; each function below answers one of them:

    torch.cuda functions    answer for the CPU; streams and events do nothing
    device="cuda" literals  the modules that write them see a `torch` whose factories put tensors on the CPU
    Tensor.type(), .cuda()  answer megatron-core's comparisons with "torch.cuda.FloatTensor"; other callers see no change
    experts                 routed without Transformer Engine
    random-number tracker   works on the CPU's generator, so that dropout and recomputation behave
    Adam                    the fused interface that the distributed optimizer needs, on torch's fused CPU kernel

The modules are named, not searched for: megatron-core is pinned to one minor version, and a new one is read anew.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from tpt_megatron.mcore import cpu_kernels

_CPU = torch.device("cpu")

_MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.tensor_parallel.data",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.mapping",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.transformer.utils",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.utils",
    "megatron.core.distributed.param_and_grad_buffer",
)

_FACTORIES = (
    *("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint"),
    *("as_tensor", "zeros_like", "ones_like", "empty_like", "full_like"),
)


def adapt() -> None:
    """Adapt this process's torch and megatron-core to a machine without CUDA."""
    assert not torch.cuda.is_available(), "the CPU adaptation would break CUDA runs"
    _answer_for_torch_cuda()
    _answer_tensor_methods()
    _track_cpu_randomness()
    _provide_fused_adam()
    _translate_device_literals()
    _route_to_experts()
    cpu_kernels.install()


class _Nothing:
    """Stands in for a CUDA stream or event: every method does nothing, every context is empty."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...

    def record_event(self, *_: Any) -> _Nothing:
        return _Nothing()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _answer_for_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in ("set_device", "synchronize", "empty_cache", "set_stream"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, _Nothing)
    for name in ("manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda seed: torch.default_generator.manual_seed(int(seed)))
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.Stream = cuda.Event = _Nothing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None


def _answer_tensor_methods() -> None:
    tensor: Any = torch.Tensor
    real_type = tensor.type

    @functools.wraps(real_type)
    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real_type(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and asked_by.startswith("megatron.core."):
            return answer.replace("torch.meta.", "torch.").replace("torch.", "torch.cuda.", 1)  # meta: of simulated ranks
        return answer

    tensor.type = type_of
    tensor.cuda = lambda self, *_, **__: self


def _track_cpu_randomness() -> None:
    from megatron.core.tensor_parallel import random as tracker

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        assert not graph_safe
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        assert not graph_safe
        torch.set_rng_state(state)

    tracker._get_cuda_rng_state, tracker._set_cuda_rng_state = get_state, set_state
    # A fork of the tracker warns when the CPU's state has changed in it; here that is the point.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


class FusedAdam(torch.optim.Optimizer):
    """Adam with the interface of Transformer Engine's FusedAdam, on torch's fused CPU kernel.

    The step count lives in the param group: the distributed optimizer cannot load one that lives beside each parameter
    (megatron-core 0.16.1, distrib_optimizer.py, `_init_optimizer_states_with_dummy_values`).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        assert bias_correction and adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, in place."""
        assert closure is None
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            if not params:
                continue
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"]))] * len(params),
                amsgrad=False,
                lr=float(group["lr"]),
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _provide_fused_adam() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


class _TorchOnCpu(types.ModuleType):
    """`torch` as one megatron-core module sees it: factories translate device="cuda" and drop pin_memory."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


def _translate_device_literals() -> None:
    torch_on_cpu = _TorchOnCpu()
    for name in _MODULES_WITH_CUDA_LITERALS:
        module: Any = importlib.import_module(name)
        assert module.torch is torch, name
        module.torch = torch_on_cpu


def _route_to_experts() -> None:
    """Let the router and the dispatcher of experts do without Transformer Engine, and count tokens in numpy.

    moe_utils asks whether `te_general_gemm` is None, but does not define it where Transformer Engine is missing; and its way of
    bringing a tensor to the CPU gives torch's split sizes no list when it is there already.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def counts_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.te_general_gemm = None
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = counts_on_cpu
