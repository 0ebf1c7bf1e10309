from pathlib import Path

import numpy as np
import pytest

from tpt_megatron.datasets import TokenDataset
from tpt_megatron.errors import DataError
from tpt_megatron.train.data import SequenceOrder, step_batches

LENGTHS = (7, 3, 12, 5, 9)


def dataset() -> TokenDataset:
    """Five documents; every token's id is unique, so that a sequence says where it came from."""
    lengths = np.array(LENGTHS, np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    return TokenDataset(Path("d"), np.arange(total, dtype=np.uint16), (np.arange(total) % 2).astype(np.uint8), lengths, offsets, None)


def order(seed: int = 0, *, document_attention: bool = True) -> SequenceOrder:
    return SequenceOrder(dataset(), 4, seed, document_attention=document_attention)


def test_an_epoch_shows_every_token_once_but_for_its_rest() -> None:
    stream = order()
    assert stream.sequences_per_epoch == (sum(LENGTHS) - 1) // 4
    seen = np.concatenate([stream.micro_batch(range(n, n + 1)).tokens[0] for n in range(stream.sequences_per_epoch)])
    assert len(seen) == len(set(seen.tolist())) == stream.sequences_per_epoch * 4


def test_labels_follow_tokens_and_parts_follow_labels() -> None:
    batch = order().micro_batch(range(8))
    inside = batch.labels[:, :-1]
    np.testing.assert_array_equal(inside, batch.tokens[:, 1:])
    np.testing.assert_array_equal(batch.kinds, batch.labels % 2)


def test_documents_are_numbered_by_where_their_tokens_come_from() -> None:
    batch = order().micro_batch(range(8))
    assert batch.documents is not None
    ends = np.cumsum(LENGTHS)
    for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
        source = np.searchsorted(ends, tokens, side="right")
        np.testing.assert_array_equal(source[1:] == source[:-1], documents[1:] == documents[:-1])
    assert order(document_attention=False).micro_batch(range(2)).documents is None


def test_epochs_differ_in_order_and_seeds_too() -> None:
    stream = order()
    epoch = stream.sequences_per_epoch
    first, second = (stream.micro_batch(range(e * epoch, (e + 1) * epoch)).tokens.tolist() for e in (0, 1))
    assert first != second
    assert first != order(seed=1).micro_batch(range(epoch)).tokens.tolist()
    # Going back gives the same again: a sequence is a function of its number.
    assert stream.micro_batch(range(epoch)).tokens.tolist() == first


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_sees_the_same_sequences_on_any_number_of_ranks(ranks: int) -> None:
    stream = order()
    seen = [batch.tokens for rank in range(ranks) for batch in step_batches(stream, 8, global_batch=8, micro_batch=2, rank=rank, ranks=ranks)]
    np.testing.assert_array_equal(np.concatenate(seen), stream.micro_batch(range(8, 16)).tokens)


def test_a_dataset_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(DataError, match="36 tokens do not fill one sequence of 36"):
        SequenceOrder(dataset(), 36, 0, document_attention=True)
