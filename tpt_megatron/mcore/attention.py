"""Attention within documents, and attention on CPU: torch's scaled-dot-product attention in place of megatron-core's unfused local path.

Equal to the local path within rounding; faster, and without the [b, heads, s, s] scores in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.nn import functional


class SdpaCoreAttention(DotProductAttention):  # type: ignore[misc]
    """Core attention through `torch.nn.functional.scaled_dot_product_attention`; causal where no mask is given.

    Under context parallelism a rank has the queries of its own part of the sequence (see `on_this_context_rank`), and gathers all
    keys and values. That costs memory for them, and is exact; rings of ranks are for CUDA, where Transformer Engine has them.
    """

    def __init__(self, config: TransformerConfig, *others: Any, **named: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # megatron-core's own knows no other
        super().__init__(alone, *others, **named)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        query [s/cp, b, heads/tp, d], key and value [s/cp, b, groups/tp, d]; attention_mask [b or 1, 1, s/cp, s] bool, True where
        attention is allowed (torch's convention, since our model builds it), or None for causal, without context parallelism
        only. Returns [s/cp, b, heads/tp x d].
        """
        assert attention_bias is None and packed_seq_params is None
        cp = parallel_state.get_context_parallel_world_size()
        if cp > 1:
            assert attention_mask is not None
            group = parallel_state.get_context_parallel_group()
            key, value = (in_order(gather_from_sequence_parallel_region(t.contiguous(), group=group), cp) for t in (key, value))
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        context = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.size(1) != query.size(1),
        )  # [b, heads/tp, s/cp, d]
        return context.permute(2, 0, 1, 3).flatten(2)


def on_this_context_rank(tensor_bs: torch.Tensor) -> torch.Tensor:
    """Return this context-parallel rank's part of [b, s, ...]: of 2 x cp chunks the one at its number and the one as far from the end.

    So all ranks have the same work under a causal mask. It is megatron-core's order, which its rotary embedding follows.
    """
    cp = parallel_state.get_context_parallel_world_size()
    if cp < 2:  # 0 without process groups
        return tensor_bs
    rank = parallel_state.get_context_parallel_rank()
    chunks = tensor_bs.chunk(2 * cp, dim=1)
    return torch.cat((chunks[rank], chunks[2 * cp - 1 - rank]), dim=1)


def in_order(gathered_sb: torch.Tensor, cp: int) -> torch.Tensor:
    """Return [s, b, ...] in the sequence's order, from all ranks' parts laid end to end."""
    chunks = gathered_sb.chunk(2 * cp)
    return torch.cat([chunks[2 * rank] for rank in range(cp)] + [chunks[2 * rank + 1] for rank in reversed(range(cp))])


def attention_mask(document_bs: torch.Tensor | None, sequence_length: int) -> torch.Tensor | None:
    """Return [b or 1, 1, s/cp, s] bool, True where this rank's tokens may look: themselves and earlier tokens of the same document.

    document_bs [b, s] numbers the documents of each sequence; None is one document, for which None is returned where that will do.
    """
    cp = parallel_state.get_context_parallel_world_size()
    if document_bs is None and cp < 2:
        return None
    positions = torch.arange(sequence_length)[None]  # [1, s]
    mine = on_this_context_rank(positions)
    allowed = mine[:, :, None] >= positions[:, None, :]
    if document_bs is not None:
        allowed = allowed.to(document_bs.device) & (on_this_context_rank(document_bs)[:, :, None] == document_bs[:, None, :])
    return allowed[:, None]


def packed_documents(document_bs: npt.NDArray[np.int32], put: Callable[[npt.NDArray[np.int32]], torch.Tensor]) -> PackedSeqParams:
    """Return where documents begin in the rows of [b, s] laid end to end, for Transformer Engine's attention over sequences of varying length.

    A document does not reach from one row into the next. Positions begin anew with each. The bounds are found on
    the CPU, without waiting for the GPU; `put` returns them where attention is computed.
    """
    first = np.ones(document_bs.shape, np.bool_)
    first[:, 1:] = document_bs[:, 1:] != document_bs[:, :-1]
    found = np.append(np.flatnonzero(first), document_bs.size).astype(np.int32)
    longest, bounds = int(np.diff(found).max()), put(found)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
