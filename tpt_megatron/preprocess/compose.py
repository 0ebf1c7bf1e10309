"""Arms: the orders in which the tokens of a document and of its thoughts become training sequences.

Every text is tokenised once, by itself, and arms arrange tokens. So no token straddles two parts, delimiters are the same tokens
wherever they stand, and what an arm holds without its thinking is the document as `vanilla` holds it, token by token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

from tpt_megatron.config.preprocess import DocumentArm, PlainArm
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


@dataclass(frozen=True, slots=True)
class TrainingSequence(Generic[Ids]):
    """One training sequence, as (part, ids) segments without the end-of-document token; `thoughts` says which of the document's are in it."""

    segments: list[tuple[int, Ids]]
    sample: int
    thoughts: tuple[int, ...]


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


def sequences(
    arm: PlainArm, document: Ids, thoughts: Sequence[Ids], delimiters: DelimiterIds[Ids], cuts: Sequence[int], *, as_samples: bool
) -> list[TrainingSequence[Ids]]:
    """Return the sequences that a document makes: one with all its thoughts, or (`as_samples`) one for each thought.

    vanilla makes one in either case: it has no thoughts that could tell samples apart.
    """
    if arm == "vanilla":
        return [TrainingSequence(arrange(arm, document, (), delimiters, ()), 0, ())]
    if not as_samples or not thoughts:
        return [TrainingSequence(arrange(arm, document, thoughts, delimiters, cuts), 0, tuple(range(len(thoughts))))]
    return [TrainingSequence(arrange(arm, document, [ids], delimiters, cuts[i : i + 1]), i, (i,)) for i, ids in enumerate(thoughts)]


def in_validation(sha256: bytes, fraction: float) -> bool:
    """Say whether the document whose text has this SHA-256 belongs to the validation split: the hash decides, in every arm alike."""
    return int.from_bytes(sha256[:8], "big") < fraction * 2**64


def plain_arm(arm: DocumentArm, sha256: bytes, weights: Mapping[PlainArm, float]) -> PlainArm:
    """Return the arm by which the document whose text has this SHA-256 is arranged in `arm`; `mixed` draws it by weight.

    The draw is of other bits than the split's, so that both splits are mixed alike.
    """
    if arm != "mixed":
        return arm
    draw = int.from_bytes(hashlib.sha256(b"mixed" + sha256).digest()[:8], "big") / 2**64 * sum(weights.values())
    chosen: PlainArm = "vanilla"
    for name, weight in sorted(weights.items()):  # as equal settings may give them in any order
        if weight > 0:
            chosen = name
        draw -= weight
        if draw < 0:
            break
    return chosen
