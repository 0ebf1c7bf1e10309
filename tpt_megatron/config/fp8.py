"""Sizes that Transformer Engine's FP8 matrix products can have; it says so itself only once all weights are made.

From reading Transformer Engine 2.11 (`assert_dim_for_fp8_exec`, `is_quantizable`) and megatron-core 0.16.1 (`get_fp8_align_size`).
"""

from __future__ import annotations

from tpt_megatron.config.model import ModelConfig
from tpt_megatron.config.parallel import ParallelConfig

MULTIPLES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""What rows and columns of both operands are multiples of, on each rank, by recipe."""
GATHERED = {"delayed": 8, "tensorwise": 8, "blockwise": 128, "mxfp8": 32}
"""What each rank's tokens and channels are multiples of before they are gathered from tensor-parallel ranks: whole blocks of one scale, for the last two."""


def check_fp8_sizes(recipe: str, model: ModelConfig, parallel: ParallelConfig, micro_batch_sequences: int, sequence_length: int) -> None:
    """Raise ValueError for the first size that the recipe has no matrix products for. Heads, channels and tokens must divide among the ranks."""
    tp, cp, experts = parallel.tensor_parallel, parallel.context_parallel, model.experts
    by_tp = f" / parallel.tensor_parallel={tp}" if tp > 1 else ""
    heads, head = f"model.num_heads={model.num_heads}", f"model.head_dim={model.head_size}"
    ffn = f"model.ffn_hidden_size={model.ffn_hidden_size}" if experts is None else f"model.experts.ffn_hidden_size={experts.ffn_hidden_size}"
    tokens = micro_batch_sequences * sequence_length // cp
    by_cp = f" / parallel.context_parallel={cp}" if cp > 1 else ""
    of_tokens = f"micro_batch_sequences={micro_batch_sequences} x data.sequence_length={sequence_length}{by_cp}"
    hidden = f"model.hidden_size={model.hidden_size}"
    both = f"({heads} + 2 x model.num_query_groups={model.num_query_groups}) x {head}{by_tp}"
    sizes = {
        hidden: model.hidden_size,
        f"{heads} x {head}{by_tp}": model.num_heads * model.head_size // tp,
        both: (model.num_heads + 2 * model.num_query_groups) * model.head_size // tp,
        f"{ffn}{by_tp}": (model.ffn_hidden_size if experts is None else experts.ffn_hidden_size) // tp,
        of_tokens: tokens,
    }
    if model.mtp_layers:
        sizes[f"{hidden}{by_tp}"] = model.hidden_size // tp  # of two hidden states, made one
    _check(recipe, sizes, MULTIPLES[recipe], "multiplies matrices")
    if parallel.sequence_parallel:
        _check(recipe, {hidden: model.hidden_size, f"{of_tokens}{by_tp}": tokens // tp}, GATHERED[recipe], "with parallel.sequence_parallel gathers tensors")


def _check(recipe: str, sizes: dict[str, int], unit: int, does: str) -> None:
    for what, size in sizes.items():
        if size % unit:
            is_size = "" if what.endswith(f"={size}") else f" = {size}"
            below = size // unit * unit
            nearest = f"{below} or {below + unit}" if below else str(unit)
            raise ValueError(f"fp8={recipe} {does} whose sizes are multiples of {unit}, which {what}{is_size} is not; the nearest: {nearest}")
