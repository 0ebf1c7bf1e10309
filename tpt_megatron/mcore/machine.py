"""Whether this machine can do what a config asks for; what it cannot is refused with the reason, before any weights are made."""

from __future__ import annotations

from typing import Any

import psutil
import torch

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import ConfigError, MachineError

FP8_FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Number formats by recipe. With one scale a tensor gradients need E5M2's range; with one a block they do not."""


def check_machine(config: TrainConfig) -> None:
    """Raise MachineError for what this machine cannot do, ConfigError for what is not supported on its kind of device."""
    if not torch.cuda.is_available():
        if config.fp8 != "none":
            raise MachineError(f"fp8={config.fp8} needs a GPU with Transformer Engine, and there is no CUDA here; set fp8=none")
        return
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise MachineError(f"training on CUDA needs Transformer Engine, which does not import here: {error}; see docs/architecture.md") from None
    check_supported_on_cuda(config)
    if config.fp8 != "none":
        can, why = _fp8_support(config.fp8)
        if not can:
            raise MachineError(f"fp8={config.fp8} cannot be done here: {why}; choose another recipe, or fp8=none")


def check_supported_on_cuda(config: TrainConfig) -> None:
    """Raise ConfigError for what no GPU is supported to do, wherever this runs."""
    if config.data.attention == "document" and config.parallel.context_parallel > 1:
        # Transformer Engine cuts every document among the ranks, so that each would have to be padded to a multiple of twice their number.
        raise ConfigError(
            f"data.attention=document with parallel.context_parallel={config.parallel.context_parallel} is not supported on CUDA; "
            "set data.attention=sequence, or context_parallel=1"
        )


def _fp8_support(recipe: str) -> tuple[bool, str]:
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as State

    ask: dict[str, Any] = {"blockwise": State.is_fp8_block_scaling_available, "mxfp8": State.is_mxfp8_available}
    can, why = ask.get(recipe, State.is_fp8_available)()
    return bool(can), str(why)


def device_name() -> str:
    """Return what this rank computes on: CUDA's name for the chip, or cpu."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def memory_bytes() -> int:
    """Return the most memory that this rank had in use: on the GPU so far, or of this process now."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
