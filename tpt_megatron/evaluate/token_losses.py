"""The loss of every token of documents under a model: each document by itself, its first token left out, which nothing predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import transformers

from tpt_megatron.datasets import PART_DOCUMENT, TokenDataset, open_sources
from tpt_megatron.errors import DataError
from tpt_megatron.evaluate.likelihood import LanguageModel, choose_device
from tpt_megatron.quiet import quiet_transformers

LOGITS_BYTES = 1 << 28
"""Of a batch: its logits in fp32 and what is made of them are the most that a batch needs."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Some documents of a dataset, end to end: [n] each, one entry a token that a model predicts.

    document  its number in the dataset
    position  in the document, from 1
    token     its id
    part      PART_*
    source    number in `sources`
    """

    document: npt.NDArray[np.int64]
    position: npt.NDArray[np.int32]
    token: npt.NDArray[np.int64]
    part: npt.NDArray[np.uint8]
    source: npt.NDArray[np.uint16]
    sources: list[str | None]
    whole: list[npt.NDArray[np.int64]]
    """The documents themselves, each with its first token."""
    cut: int
    """How many were longer than what is read of them."""


def choose_documents(dataset: TokenDataset, count: int, longest: int) -> Documents:
    """Take `count` documents, 0 for all, evenly through a dataset, and at most `longest` tokens of each. DataError where none has two tokens."""
    usable = np.flatnonzero(np.asarray(dataset.lengths) > 1)
    if not len(usable):
        raise DataError(f"{dataset.prefix}: no document has two tokens, so that there is none to predict")
    chosen = usable if not count or count >= len(usable) else usable[np.linspace(0, len(usable) - 1, count).round().astype(np.int64)]
    sources, of_documents = open_sources(dataset)
    lengths = np.minimum(np.asarray(dataset.lengths)[chosen], longest).astype(np.int64)
    places = [slice(dataset.begin(int(document)), dataset.begin(int(document)) + int(length)) for document, length in zip(chosen, lengths, strict=True)]
    parts = [np.full(length, PART_DOCUMENT, np.uint8) if dataset.parts is None else dataset.parts[place] for place, length in zip(places, lengths, strict=True)]
    whole = [np.asarray(dataset.tokens[place]).astype(np.int64) for place in places]
    return Documents(
        document=np.repeat(chosen, lengths - 1),
        position=np.concatenate([np.arange(1, length, dtype=np.int32) for length in lengths]),
        token=np.concatenate([tokens[1:] for tokens in whole]),
        part=np.concatenate([of_tokens[1:] for of_tokens in parts]),
        source=np.repeat(np.zeros(len(chosen), np.uint16) if of_documents is None else np.asarray(of_documents[chosen]), lengths - 1),
        sources=sources,
        whole=whole,
        cut=int((np.asarray(dataset.lengths)[chosen] > longest).sum()),
    )


def positions_of(folder: Path) -> int:
    """Return how many tokens a model can read; DataError where its config.json cannot be read, or does not say."""
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  transformers raises bare exceptions of many kinds
        raise DataError(f"{folder}: its config.json cannot be read ({(str(error).strip().splitlines() or [type(error).__name__])[0]})") from None
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise DataError(f"{folder}: its config.json does not say how many tokens it reads; put it there as max_position_embeddings")
    return positions


def token_losses(folder: Path, documents: Documents, dtype: str, advance: Callable[[int], object] = lambda documents: None) -> npt.NDArray[np.float32]:
    """Return the loss [n] of each token of `documents`, in nats, under the model of a folder. `advance` is told how many documents each batch had.

    DataError when the model cannot be loaded, or has fewer ids than the documents.
    """
    model = LanguageModel(folder, dtype, choose_device("auto"))
    asked = [(tokens, len(tokens) - 1) for tokens in documents.whole]
    return -np.concatenate(model.log_likelihoods(asked, LOGITS_BYTES // (3 * 4 * model.vocabulary_size), advance))
