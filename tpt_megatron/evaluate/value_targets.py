"""What a thought's value is measured on: the same target after the same context, once with the thought between them and once without.

    with       context  between open thought close between  target
    without    context                                       target

This is the arm `interleave` with the thought at the target's beginning, against the arm `vanilla`; with the whole document as target and no
context it is `prepend`, and with an answer that is a field of the record `append`, the answer after it (after `between`, without the thought
too). Texts are tokenised as the arms' are: the document once, by itself, so that both sides have the very same tokens.

Where all of it is longer than the model reads, the target loses its end, down to a quarter of the model's length, and then the context
its beginning, on both sides alike; the thought is never cut. A target's first token that nothing precedes on the side without counts on neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tpt_megatron.arms import DelimiterIds, arrange, cut_after
from tpt_megatron.config.value import AnswerConfig, ValueConfig
from tpt_megatron.delimiters import delimiter_ids
from tpt_megatron.records import AugmentedDocument, Thought
from tpt_megatron.tokenizer import TokenizerLike

Ids = npt.NDArray[np.int64]
Reason = Literal["nothing_follows", "no_answer", "too_long"]
LEAST_TARGET = 4
"""A target is cut to no less than the model's length over this."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a model is asked about one thought: the log-likelihood of the last `target` tokens of both.

    saw_target   the thought had seen some of what it is valued on, other than by intention (target=document)
    target_cut, context_cut   tokens that were left out, since all of it is longer than the model reads
    """

    with_thought: Ids
    without: Ids
    target: int
    saw_target: bool
    target_cut: int
    context_cut: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the target is: context = tokens[:cut], target = tokens[cut:]; character: of the text at which it begins, where it is in the text."""

    tokens: Ids
    cut: int
    character: int | None
    is_apart: bool = False


class Questions:
    """Makes the questions of documents for one model. longest: tokens that it reads at most."""

    def __init__(self, config: ValueConfig, tokenizer: TokenizerLike, longest: int) -> None:
        self._config, self._tokenizer, self._longest = config, tokenizer, longest
        ids = delimiter_ids(config.delimiters, tokenizer)
        self._delimiters = DelimiterIds(*(part.astype(np.int64) for part in (ids.open, ids.close, ids.between)))
        self._inside = config.delimiters.inside

    def of(self, augmented: AugmentedDocument) -> list[Question | Reason]:
        """Return for each thought what is asked about it, or why nothing can be."""
        if not augmented.thoughts:
            return []
        found, ends = self._tokenizer.ends(augmented.document.text)
        tokens = np.array(found, np.int64)
        # As preprocess has it: what a tokenizer says of a token's end may step back, and the last one ends the text.
        covered = np.minimum(np.maximum.accumulate(np.array([*ends[:-1], len(augmented.document.text)][: len(ends)], np.int64)), len(augmented.document.text))
        return [self._of(thought, place) if isinstance(place, _Place) else place for thought, place in self._places(augmented, tokens, covered)]

    def _places(self, augmented: AugmentedDocument, tokens: Ids, ends: Ids) -> list[tuple[Thought, _Place | Reason]]:
        match self._config.target:
            case "document":
                return [(thought, _Place(tokens, 0, None)) for thought in augmented.thoughts]
            case "continuation":
                seen = [len(augmented.document.text) if thought.seen_end is None else thought.seen_end for thought in augmented.thoughts]
                return [(thought, _Place(tokens, cut_after(ends, end), end)) for thought, end in zip(augmented.thoughts, seen, strict=True)]
            case "answer":
                place = self._answer(augmented, tokens, ends)
                return [(thought, place) for thought in augmented.thoughts]

    def _answer(self, augmented: AugmentedDocument, tokens: Ids, ends: Ids) -> _Place | Reason:
        wanted = self._config.answer
        if wanted.field is not None:
            text = answer_text(augmented.document.extra, wanted.field)
            if text is None:
                return "no_answer"
            return _Place(np.concatenate([tokens, np.array(self._tokenizer.encode(text), np.int64)]), len(tokens), None, is_apart=True)
        begins = answer_begins(augmented.document.text, wanted)
        return "no_answer" if begins is None else _Place(tokens, cut_after(ends, begins), begins)

    def _of(self, thought: Thought, place: _Place) -> Question | Reason:
        target, wanted = len(place.tokens) - place.cut, self._config.target_tokens
        if target <= (place.cut == 0):
            return "no_answer" if self._config.target == "answer" else "nothing_follows"
        inside = np.array(self._tokenizer.encode(f"{self._inside}{thought.text}{self._inside}"), np.int64)
        around = len(self._delimiters.open) + len(inside) + len(self._delimiters.close) + 2 * len(self._delimiters.between)
        kept = min(target, wanted + (place.cut == 0)) if wanted else target
        kept = min(kept, max(self._longest - around - place.cut, self._longest // LEAST_TARGET))
        context = min(place.cut, self._longest - around - kept)
        unpredicted = context <= 0  # the target's first token, on the side without
        if context < 0 or kept <= unpredicted:
            return "too_long"
        tokens = place.tokens[place.cut - context : place.cut + kept]
        segments = arrange("interleave", tokens, [inside], self._delimiters, [context])
        between = self._delimiters.between if place.is_apart and context else self._delimiters.between[:0]
        return Question(
            with_thought=np.concatenate([ids for _, ids in segments]),
            without=np.concatenate([tokens[:context], between, tokens[context:]]),
            target=kept - unpredicted,
            # A thought that does not say what it saw is about the whole document, as in the arms.
            saw_target=place.character is not None and (thought.seen_end is None or thought.seen_end > place.character),
            target_cut=target - kept,
            context_cut=place.cut - context,
        )


def answer_text(extra: Mapping[str, Any], field: str) -> str | None:
    """Return the text of a record's field; None where there is none, or nothing in it."""
    value = extra.get(field)
    text = str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
    return text if isinstance(text, str) and text.strip() else None


def answer_begins(text: str, wanted: AnswerConfig) -> int | None:
    """Return the character of a document at which its answer begins; None where there is no delimiter, or no match."""
    if wanted.delimiter is not None:
        at = text.rfind(wanted.delimiter)
        return None if at < 0 else at + len(wanted.delimiter)
    assert wanted.pattern is not None
    ends = [match.end() for match in re.finditer(wanted.pattern, text)]
    return ends[-1] if ends else None


def distinct(questions: Sequence[Question]) -> tuple[list[tuple[Ids, int]], list[tuple[int, int]]]:
    """Return the sequences to be asked, each once with how many tokens are wanted of its end, and of each question the numbers (with, without) of its two.

    Thoughts of one document share its own sequence, wherever they stand in it.
    """
    numbers: dict[bytes, int] = {}
    asked: list[tuple[Ids, int]] = []

    def number(ids: Ids, target: int) -> int:
        found = numbers.setdefault(ids.tobytes(), len(asked))
        if found == len(asked):
            asked.append((ids, target))
        asked[found] = (ids, max(target, asked[found][1]))
        return found

    pairs = [(number(question.with_thought, question.target), number(question.without, question.target)) for question in questions]
    return asked, pairs
