"""What thinking about one document gave: thoughts, what was rejected and why, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpt_megatron.records import Thought


@dataclass(frozen=True, slots=True)
class Rejection:
    """A thought that a check refused, or a request that gave none (its text is then empty). `detail` is for a person."""

    reason: str
    detail: str
    thought: Thought


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that came of one document. Tokens count every request, those of rejected thoughts too, as far as engines tell."""

    thoughts: tuple[Thought, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @classmethod
    def joined(cls, parts: Sequence[Outcome]) -> Outcome:
        """Return the outcomes of several generators as one, in their order."""
        return cls(
            thoughts=tuple(thought for part in parts for thought in part.thoughts),
            rejections=tuple(rejection for part in parts for rejection in part.rejections),
            requests=sum(part.requests for part in parts),
            prompt_tokens=sum(part.prompt_tokens for part in parts),
            generated_tokens=sum(part.generated_tokens for part in parts),
        )
