"""What a model thought, read out of a reply: from the reasoning that the server kept apart, or from `<think>` tags in its text.

Shapes of replies, as servers give them, and where the thought is:

    reasoning apart     vLLM `reasoning`, SGLang, llama.cpp and transformers serve `reasoning_content`: that field
    <think>T</think>A   a server without a reasoning parser: T
    T</think>A          the same, with a chat template that opens the thought in the prompt (DeepSeek-R1-Distill, QwQ): T
    <think>T            cut off, or ended by the stop text `</think>`: T
    T                   where the engine tells that `</think>` ended it: T; otherwise an answer without a thought

The first block is the thought. A model that thinks several times is read up to its first `</think>`, as servers' reasoning
parsers do, and as the stop text `</think>` has it: the thought then does not depend on who split the reply. A tag that is left
inside it, as with nested blocks, stays there, where the check on delimiters sees it. An opening tag counts as one only
at the beginning: further on it is text about tags, since half of the models open their thought in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpt_megatron.augment.engines.base import Reply

OPENING = "<think>"
CLOSING = "</think>"

# Names under which servers and hosts say that something cut the reply: the limit, a caller, the server, a filter.
_CUT = frozenset({"length", "abort", "error", "content_filter", "insufficient_system_resource"})


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a reply holds of thinking.

    text     the thought without outer white space, otherwise as the model wrote it; empty where the reply has none
    closed   it ended by itself, rather than at a limit; without a thought: the reply did
    refused  the server's content filter took it
    """

    text: str
    closed: bool
    refused: bool = False


def read_trajectory(reply: Reply, thought_from: Literal["reasoning", "content"], stop: tuple[str, ...]) -> Trajectory:
    """Return the thought in a reply to a request with the stop texts `stop`. Any reply can be read; none raises.

    With thought_from="content" the answer is what is read: what follows the thought, or all where there is no thought.
    """
    thought, answer, closed = _split(reply, stop)
    refused = reply.finish_reason == "content_filter"
    if thought_from == "content":
        return Trajectory(answer.strip(), reply.finish_reason not in _CUT, refused)
    return Trajectory(thought.strip(), closed, refused)


def _split(reply: Reply, stop: tuple[str, ...]) -> tuple[str, str, bool]:
    """Return thought, answer, and whether the thought ended."""
    content = reply.content or ""
    cut = reply.finish_reason in _CUT
    if reply.reasoning and reply.reasoning.strip():
        # Blank content proves nothing: servers leave line breaks around a thought that is still under way.
        ended_elsewhere = reply.stop_reason is not None and CLOSING not in reply.stop_reason
        return reply.reasoning, content, bool(content.strip()) or not (cut or ended_elsewhere)
    before, closing, answer = content.partition(CLOSING)
    opened = before.lstrip().startswith(OPENING)
    thought = before.lstrip().removeprefix(OPENING)
    if closing:
        return thought, answer, True
    if opened:
        return thought, "", _ended_by_closing_tag(reply, stop)
    if _told_closing_tag(reply):
        return content, "", True
    return "", content, not cut


def _told_closing_tag(reply: Reply) -> bool:
    return reply.stop_reason is not None and CLOSING in reply.stop_reason


def _ended_by_closing_tag(reply: Reply, stop: tuple[str, ...]) -> bool:
    """Tell whether a stop text that holds the closing tag ended the reply: by what the engine says, or else since it may."""
    if reply.stop_reason is not None:
        return _told_closing_tag(reply)
    return reply.finish_reason == "stop" and any(CLOSING in text for text in stop)
