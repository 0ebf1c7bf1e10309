"""Where in a text thoughts are, and where a stop text counts: pure functions of text.

A thought begins with its opening delimiter and ends after its closing one; a prompt may have opened one already. Opening again
inside of a thought, or closing outside of one, means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from tpt_megatron.config.evaluate import ThoughtDelimiters


def ends_in_thought(text: str, delimiters: ThoughtDelimiters, *, starts_inside: bool = False) -> bool:
    """Say whether a thought is open where a text ends."""
    return _thoughts(text, delimiters, starts_inside)[1]


def outside_thoughts(text: str, delimiters: ThoughtDelimiters, *, starts_inside: bool = False) -> str:
    """Return what is left of a text without its thoughts and their delimiters."""
    kept, at = [], 0
    for start, end in _thoughts(text, delimiters, starts_inside)[0]:
        kept.append(text[at:start])
        at = end
    return "".join([*kept, text[at:]])


def find_stop(text: str, stops: Sequence[str], delimiters: ThoughtDelimiters, *, starts_inside: bool = False, is_whole: bool = True) -> int | None:
    """Return where the stop text begins that ends `text`, None where none does: of those that begin outside of thoughts the one that is complete first.

    is_whole: whether no more text comes. While more may come, a stop text that may turn out to be a part of an opening delimiter does not count
    yet. So a text that grows, and is asked at every length, is cut where the whole text would be.
    """
    thoughts, _ = _thoughts(text, delimiters, starts_inside)
    edges = [0, *(edge for thought in thoughts for edge in thought), len(text)]
    found = [
        (at + len(stop), at)
        for start, end in zip(edges[::2], edges[1::2], strict=True)  # of what is outside
        for stop in stops
        if stop and start < end and (at := text.find(stop, start, end + len(stop) - 1)) >= 0
    ]
    if not found:
        return None
    _, at = min(found)
    return at if is_whole or at < _undecided_from(text, delimiters.open, edges[-2]) else None


def _undecided_from(text: str, opening: str, outside_from: int) -> int:
    """Return where an opening delimiter may have begun that is not complete; the text's length where none has."""
    first = max(outside_from, len(text) - len(opening) + 1)
    return next((at for at in range(first, len(text)) if opening.startswith(text[at:])), len(text))


def _thoughts(text: str, delimiters: ThoughtDelimiters, starts_inside: bool) -> tuple[list[tuple[int, int]], bool]:
    """Return [start, end) of every thought, delimiters included, and whether the last one is open."""
    found: list[tuple[int, int]] = []
    start, after = (0, 0) if starts_inside else _find(text, delimiters.open, 0)
    while start >= 0:
        closing, end = _find(text, delimiters.close, after)
        if closing < 0:
            return [*found, (start, len(text))], True
        found.append((start, end))
        start, after = _find(text, delimiters.open, end)
    return found, False


def _find(text: str, what: str, start: int) -> tuple[int, int]:
    """Return where `what` begins and ends, -1 and -1 where it is not."""
    at = text.find(what, start)
    return (at, at + len(what)) if at >= 0 else (-1, -1)
