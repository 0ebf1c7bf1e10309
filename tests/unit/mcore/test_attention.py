import torch

from tpt_megatron.mcore.attention import document_mask


def test_a_token_sees_itself_and_earlier_tokens_of_its_document() -> None:
    mask = document_mask(torch.tensor([[3, 3, 7, 7, 7]]))
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == expected
