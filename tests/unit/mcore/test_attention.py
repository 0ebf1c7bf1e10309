import numpy as np
import pytest
import torch

from tpt_megatron.mcore import attention
from tpt_megatron.mcore.attention import attention_mask, in_order, on_this_context_rank, packed_documents


def test_a_token_sees_itself_and_earlier_tokens_of_its_document() -> None:
    mask = attention_mask(torch.tensor([[3, 3, 7, 7, 7]]), 5)
    assert mask is not None
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == expected


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("documents", [None, [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]]])
def test_context_ranks_hold_each_token_once_and_see_what_one_rank_sees(monkeypatch: pytest.MonkeyPatch, cp: int, documents: list[list[int]] | None) -> None:
    rows = torch.arange(12)[None]
    numbered = None if documents is None else torch.tensor(documents)
    whole = attention_mask(torch.zeros_like(rows) if numbered is None else numbered, 12)
    assert whole is not None
    parts, masks = [], []
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_world_size", lambda: cp)
    for rank in range(cp):
        monkeypatch.setattr(attention.parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        parts.append(on_this_context_rank(rows)[0])
        masks.append(attention_mask(numbered, 12))
    assert in_order(torch.cat(parts), cp).tolist() == list(range(12))
    for part, mask in zip(parts, masks, strict=True):
        assert mask is not None
        assert mask[0, 0].tolist() == whole[0, 0, part].tolist()
    # The last tokens have the most to look at, so each rank has as many near the end as near the beginning.
    assert len({int(part.sum()) for part in parts}) == 1


def test_packed_documents_begin_where_the_number_changes_and_with_each_row() -> None:
    packed = packed_documents(np.array([[3, 3, 7, 7], [7, 7, 7, 2]], np.int32), torch.from_numpy)
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 2, 4, 7, 8]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 3
