"""Documents and their thoughts side by side, to be read before a long run is started: one HTML page that needs nothing beside it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.report import fill_template
from tpt_megatron.records import AugmentedDocument, Thought

FOLDED_CHARACTERS = 1800
"""A longer text is shown with its beginning until the reader asks for all of it."""

FOLDED_UNSEEN_CHARACTERS = 400


def render_sample(pairs: Sequence[tuple[AugmentedDocument, Outcome]], *, title: str, settings: Mapping[str, Any]) -> str:
    """Return the page: of each document its text, with what its thoughts have seen, the kept thoughts, and the rejected ones.

    `settings` is what a reader should know of the config, by name. Texts stand on the page as they are, escaped, white space kept.
    Raises MachineError without jinja2.
    """
    documents = [_document(augmented, outcome) for augmented, outcome in pairs]
    return fill_template(
        "sample.html",
        title=title,
        documents=documents,
        thoughts=sum(len(augmented.thoughts) for augmented, _ in pairs),
        rejected=sum(len(outcome.rejections) for _, outcome in pairs),
        settings={name: "–" if value is None else str(value) for name, value in settings.items()},
        folded=FOLDED_CHARACTERS,
        visible=visible,
        signs=any("\r" in text or "\0" in text for augmented, outcome in pairs for text in _texts(augmented, outcome)),
    )


def visible(text: str) -> str:
    """Return `text` with signs for the two characters that do not survive HTML: a carriage return is ↵ and ends a line, a NUL is �."""
    return text.replace("\r\n", "↵\n").replace("\r", "↵\n").replace("\0", "�")


def _texts(augmented: AugmentedDocument, outcome: Outcome) -> list[str]:
    rejected = (rejection.thought for rejection in outcome.rejections)
    return [augmented.document.text, *(thought.text for thought in (*augmented.thoughts, *rejected))]


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a document, and the numbers (from 1) of the thoughts that have seen it."""

    text: str
    seen_by: tuple[int, ...]


def segments(text: str, thoughts: Sequence[Thought]) -> list[Segment]:
    """Cut a document where the view of any thought begins or ends. The pieces joined are the text.

    A thought that does not say what it has seen counts for the whole text; a request that gave no text and does not say it, for nothing.
    """
    views = {number: _view(text, thought) for number, thought in enumerate(thoughts, 1) if _has_view(thought)}
    cuts = sorted({0, len(text), *(end for view in views.values() for end in view)})
    return [
        Segment(text[start:end], tuple(number for number, (first, last) in views.items() if first <= start and end <= last))
        for start, end in itertools.pairwise(cuts)
    ]


def _has_view(thought: Thought) -> bool:
    return bool(thought.text) or thought.seen_end is not None


def _view(text: str, thought: Thought) -> tuple[int, int]:
    """Return the characters that a thought has seen, from and up to, within the text."""
    start = 0 if thought.seen_start is None else min(thought.seen_start, len(text))
    end = len(text) if thought.seen_end is None else min(thought.seen_end, len(text))
    return start, max(start, end)


def _document(augmented: AugmentedDocument, outcome: Outcome) -> dict[str, Any]:
    document = augmented.document
    every = [*augmented.thoughts, *(rejection.thought for rejection in outcome.rejections)]
    views = {_view(document.text, thought) for thought in every if _has_view(thought)}
    return {
        "id": document.id,
        "source": document.source,
        "characters": len(document.text),
        "segments": [_piece(piece, several=len(views) > 1, any_view=bool(views)) for piece in segments(document.text, every)],
        "thoughts": [
            *(_thought(number, thought, document.text, None) for number, thought in enumerate(augmented.thoughts, 1)),
            *(_thought(number, found.thought, document.text, found) for number, found in enumerate(outcome.rejections, len(augmented.thoughts) + 1)),
        ],
    }


def _piece(piece: Segment, *, several: bool, any_view: bool) -> dict[str, Any]:
    """`several` views tell segments apart by a mark; without `any_view` nothing is known to be unseen."""
    numbers = ", ".join(map(str, piece.seen_by))
    seen = bool(piece.seen_by) or not any_view
    return {
        "text": piece.text,
        "seen": seen,
        "mark": f"seen by {numbers}" if several and piece.seen_by else None,
        "folds": not seen and len(piece.text) > FOLDED_UNSEEN_CHARACTERS,
    }


def _thought(number: int, thought: Thought, text: str, rejection: Rejection | None) -> dict[str, Any]:
    start, end = _view(text, thought)
    size = f"{thought.tokens:,} tokens" if thought.tokens is not None else f"{len(thought.text):,} characters"
    about = [
        thought.prompt and f"prompt {thought.prompt}",
        None if thought.sample is None else f"sample {thought.sample}",
        size if thought.text else None,
        thought.finish_reason and f"finish reason {thought.finish_reason}",
        None if (start, end) == (0, len(text)) else f"saw characters {start:,} to {end:,}",
    ]
    return {
        "number": number,
        "generator": thought.generator,
        "about": [part for part in about if part],
        "text": thought.text,
        "reason": rejection.reason if rejection else None,
        "detail": rejection.detail if rejection else None,
    }
