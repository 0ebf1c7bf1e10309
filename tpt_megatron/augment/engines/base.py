"""What every engine offers: one chat request in, one reply out, many under way at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from tpt_megatron.config.augment import Sampling

Messages = tuple[dict[str, str], ...]
"""A chat: `role` and `content` of each message."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request, before anything is read out of it.

    `reasoning` is what the server kept apart as reasoning (whatever it calls the field), `content` the rest; either may be
    None. `stop_reason` is the stop text that ended the reply, where the engine tells. Tokens are None where it does not.
    """

    content: str | None
    reasoning: str | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    model: str | None = None
    attempts: int = 1
    details: dict[str, Any] = field(default_factory=dict)


class RequestFailed(Exception):  # noqa: N818 - no bug and no end of the run: one request that gave nothing
    """One request cannot be had, whatever is tried, while the engine is alive. The message says why; the run goes on."""


class Engine(Protocol):
    """Asks a model. Opened once in a worker's event loop, closed at its end."""

    async def open(self) -> None:
        """Connect or load. MachineError when the engine cannot be had, ConfigError when it refuses the settings."""
        ...

    async def complete(self, messages: Messages, sampling: Sampling, seed: int) -> Reply:
        """Return the reply to one request. RequestFailed when it cannot be had; MachineError when the engine is gone for good."""
        ...

    async def close(self) -> None:
        """Release connections, memory, and processes that were started."""
        ...

    @property
    def capacity(self) -> int:
        """How many requests it makes sense to have under way now; may change."""
        ...

    def notes(self) -> dict[str, Any]:
        """Return what a person may want to see while it runs: servers, limits, retries so far."""
        ...
