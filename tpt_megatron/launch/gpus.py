"""GPUs by name: memory as the driver reports it, and what a plan takes for granted about their machines."""

from __future__ import annotations

from dataclasses import dataclass

from tpt_megatron.errors import ConfigError, UsageError
from tpt_megatron.train.flops import peak_tflops

MEBIBYTE = 1 << 20
MEMORY_MIB = {"H100": 81_559, "H100 NVL": 95_830, "H200": 143_771, "A100": 81_920, "A100 40GB": 40_960}
"""Of one GPU, as `nvidia-smi` reports it. H100 and H200 are those on SXM boards."""
RESERVED_BYTES, RESERVED_SHARE = 2_500_000_000, 0.05
"""What training cannot have: CUDA's context, buffers of NCCL and cuBLAS; and what the allocator loses between blocks. Assumed, not measured."""

HOPPER_FP8 = ("none", "delayed", "tensorwise", "blockwise")
"""What H100 and H200 can do; mxfp8 needs the chips after them, and those before have no FP8."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. memory: bytes, all; usable: bytes that a plan may fill."""

    name: str
    memory: int

    def check_fp8(self, recipe: str) -> None:
        """Raise ConfigError for a recipe that the chip has no matrix products for; the trainer would refuse it there."""
        possible = ("none",) if self.name.startswith("A100") else HOPPER_FP8
        if recipe not in possible:
            others = f"fp8={', '.join(possible[1:])} or none" if possible[1:] else "fp8=none"
            raise ConfigError(f"fp8={recipe} cannot be done on an {self.name}; set {others}")

    @property
    def usable(self) -> int:
        """What is left for training."""
        return int(self.memory * (1 - RESERVED_SHARE)) - RESERVED_BYTES

    def peak_flops(self, fp8: bool) -> float | None:
        """Return the data sheet's dense FLOP/s; None where it states none."""
        tflops = peak_tflops(self.name, "fp8" if fp8 else "bf16")
        return None if tflops is None else tflops * 1e12


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name, whatever its case; UsageError for one that is not known."""
    for known, mebibytes in MEMORY_MIB.items():
        if known.lower().replace(" ", "-") == name.lower().replace(" ", "-"):
            return Gpu(known, mebibytes * MEBIBYTE)
    raise UsageError(f"--gpu {name}: not known; known are {', '.join(known.lower().replace(' ', '-') for known in MEMORY_MIB)}")
