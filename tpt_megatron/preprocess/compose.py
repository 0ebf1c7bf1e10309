"""Which sequences a document makes in an arm, and of which split it is; `tpt_megatron.arms` has the order of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from tpt_megatron.arms import DelimiterIds, Ids, arrange
from tpt_megatron.config.preprocess import DocumentArm, PlainArm


@dataclass(frozen=True, slots=True)
class TrainingSequence(Generic[Ids]):
    """One training sequence, as (part, ids) segments without the end-of-document token; `thoughts` says which of the document's are in it."""

    segments: list[tuple[int, Ids]]
    sample: int
    thoughts: tuple[int, ...]


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
