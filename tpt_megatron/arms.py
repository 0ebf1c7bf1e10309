"""Arms: the orders in which the tokens of a document and of its thoughts follow one another; for those that make them, and those that ask models in them.

Every text is tokenised once, by itself, and arms arrange tokens. So no token straddles two parts, delimiters are the same tokens
wherever they stand, and what an arm holds without its thinking is the document as `vanilla` holds it, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from tpt_megatron.config.preprocess import PlainArm
from tpt_megatron.datasets import PART_DOCUMENT, PART_THINKING


class Tokens(Protocol):
    """Token ids that can be counted and cut: an array, or a file of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, span: slice) -> Self: ...


Ids = TypeVar("Ids", bound=Tokens)


@dataclass(frozen=True, slots=True)
class DelimiterIds(Generic[Ids]):
    """The delimiters' tokens."""

    open: Ids
    close: Ids
    between: Ids


def arrange(arm: PlainArm, document: Ids, thoughts: Sequence[Ids], delimiters: DelimiterIds[Ids], cuts: Sequence[int]) -> list[tuple[int, Ids]]:
    """Return the segments of one sequence.

    vanilla: d; append: d, then each thought as between open t close, as in arXiv 2509.20186; prepend: each thought as open t
    close between, then d. interleave: thought i as open t close after the first `cuts[i]` tokens of the document, so that it
    follows what it is about, with between on either side of it. Delimiters count as thinking. A document without thoughts is
    the same in every arm.
    """
    blocks = [(delimiters.open, ids, delimiters.close) for ids in thoughts]
    match arm:
        case "vanilla":
            return [(PART_DOCUMENT, document)]
        case "append":
            return [(PART_DOCUMENT, document), *((PART_THINKING, ids) for block in blocks for ids in (delimiters.between, *block))]
        case "prepend":
            return [*((PART_THINKING, ids) for block in blocks for ids in (*block, delimiters.between)), (PART_DOCUMENT, document)]
        case "interleave":
            segments: list[tuple[int, Ids]] = []
            at = 0
            for i in sorted(range(len(blocks)), key=lambda i: cuts[i]):
                if cuts[i] > at:
                    segments += _between(segments, delimiters)
                    segments.append((PART_DOCUMENT, document[at : cuts[i]]))
                    at = cuts[i]
                segments += _between(segments, delimiters)
                segments += ((PART_THINKING, ids) for ids in blocks[i])
            if at < len(document):
                segments += _between(segments, delimiters)
                segments.append((PART_DOCUMENT, document[at:]))
            return segments


def _between(before: list[tuple[int, Ids]], delimiters: DelimiterIds[Ids]) -> list[tuple[int, Ids]]:
    return [(PART_THINKING, delimiters.between)] if before else []


def cut_after(ends: npt.NDArray[np.integer[Any]], characters: int) -> int:
    """Return how many of a text's tokens hold its first `characters` characters: the token that holds the last of these stays whole.

    ends  [tokens], how many whole characters each token and those before it cover; it never falls
    """
    return int(np.searchsorted(ends, characters)) + 1 if characters else 0
