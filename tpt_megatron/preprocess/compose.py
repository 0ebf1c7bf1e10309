"""Composing: a document and its thoughts become the segments that one arm trains on."""

from __future__ import annotations

from tpt_megatron.config.preprocess import Arm, Delimiters
from tpt_megatron.datasets import PART_DOCUMENT, PART_THINKING
from tpt_megatron.records import AugmentedDocument

Segment = tuple[int, str]
"""(part, text). Each segment is tokenised by itself, so that no token straddles two parts."""


def compose(augmented: AugmentedDocument, arm: Arm, delimiters: Delimiters) -> list[Segment]:
    """Return the segments of one training document, without the end-of-document token, which the writer adds.

    vanilla: [d]; append: [d; t] as in arXiv 2509.20186, each thought as between+open+inside+thought+inside+close; prepend:
    the thoughts, each as open+inside+thought+inside+close+between, then d. Delimiters count as thinking, so what is left
    without the thinking is the document, byte for byte. A document without thoughts is the same in every arm.
    """
    document: Segment = (PART_DOCUMENT, augmented.document.text)
    thoughts = [f"{delimiters.open}{delimiters.inside}{thought.text}{delimiters.inside}{delimiters.close}" for thought in augmented.thoughts]
    match arm:
        case "vanilla":
            return [document]
        case "append":
            return [document, *((PART_THINKING, f"{delimiters.between}{text}") for text in thoughts)]
        case "prepend":
            return [*((PART_THINKING, f"{text}{delimiters.between}") for text in thoughts), document]
