"""The engine `transformers`: a Hugging Face model folder in this process, in batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpt_megatron.augment.engines.base import Messages, Reply, RequestFailed
from tpt_megatron.augment.engines.batching import Batcher
from tpt_megatron.augment.engines.chat_template import TEMPLATE_KEY, refuse_other_keys, render_chat, template_variables
from tpt_megatron.config.augment import Sampling, TransformersGenerator
from tpt_megatron.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from tpt_megatron.augment.engines.transformers_model import ChatModel, Continuation

GATHERING_S = 0.02
"""How long the first request of a batch waits for others: nothing beside the seconds that a batch takes."""


@dataclass(frozen=True, slots=True)
class _Request:
    prompt_ids: list[int]
    seed: int


class TransformersEngine:
    """Requests of equal sampling, gathered into batches that one thread generates with transformers' `generate`.

    Sampling is what the request says, nothing of the folder's generation_config.json but its end tokens; temperature 0 is
    greedy. Every request draws from random numbers of its own, made from its seed alone. So the same request, alone or with
    batch_size=1, gives the same reply on the same machine and versions; in another batch, or on another device, it differs
    only where rounding moves a probability across the number that was drawn.

    Where the chat template opens the thought (`<think>` at the end of the prompt), the reply's content begins with that tag.
    """

    def __init__(self, config: TransformersGenerator) -> None:
        self._config = config
        self._model: ChatModel | None = None
        self._batcher: Batcher[Sampling, _Request, Continuation] | None = None
        self._batches = 0
        self._replies = 0

    async def open(self) -> None:
        """Load the model.

        Raises ConfigError for a folder that is missing or has no chat template, for a key of sampling.extra other than
        chat_template_kwargs, and when max_tokens alone fills the model's context; MachineError without torch and
        transformers or without the device; DataError for damaged weights.
        """
        sampling = self._config.sampling
        _variables(sampling)
        model = await asyncio.to_thread(_load, self._config)
        if model.positions is not None and sampling.max_tokens >= model.positions:
            raise ConfigError(
                f"generator.sampling.max_tokens={sampling.max_tokens} leaves no room for a prompt: "
                f"{self._config.model} has a context of {model.positions} tokens"
            )
        self._model = model
        self._batcher = Batcher(self._run, size=self._config.batch_size, wait_s=GATHERING_S)

    async def complete(self, messages: Messages, sampling: Sampling, seed: int) -> Reply:
        """Return the reply. RequestFailed when prompt and max_tokens exceed the context, or the chat template refuses the messages."""
        assert self._model is not None and self._batcher is not None, "complete() before open()"
        prompt = render_chat(self._model.tokenizer, messages, _variables(sampling))
        prompt_ids = self._model.encode(prompt.text)
        positions = self._model.positions
        if positions is not None and len(prompt_ids) + sampling.max_tokens > positions:
            raise RequestFailed(
                f"a prompt of {len(prompt_ids)} tokens and max_tokens={sampling.max_tokens} exceed the model's context of {positions} tokens; "
                "lower document_tokens or generator.sampling.max_tokens"
            )
        continuation = await self._batcher.submit(sampling, _Request(prompt_ids, seed))
        self._replies += 1
        return Reply(
            content=prompt.complete(continuation.text),
            finish_reason=continuation.finish_reason,
            stop_reason=continuation.stop_reason,
            prompt_tokens=len(prompt_ids),
            generated_tokens=continuation.tokens,
            model=self._config.model,
        )

    async def close(self) -> None:
        """Stop the batch under way, cancel those who wait, and let the model go."""
        if self._batcher is not None:
            await self._batcher.close()
        self._batcher = self._model = None

    @property
    def capacity(self) -> int:
        """Two batches: one under way, one gathering."""
        return 2 * self._config.batch_size

    def notes(self) -> dict[str, Any]:
        """Return device and dtype, and how many batches and replies there were."""
        place = {} if self._model is None else {"device": str(self._model.device), "dtype": self._model.dtype}
        return place | {"batches": self._batches, "replies": self._replies}

    def _run(self, sampling: Sampling, requests: Sequence[_Request], is_abandoned: Callable[[], bool]) -> list[Continuation]:
        assert self._model is not None
        self._batches += 1
        return self._model.continue_batch([request.prompt_ids for request in requests], [request.seed for request in requests], sampling, is_abandoned)


def _variables(sampling: Sampling) -> dict[str, Any]:
    refuse_other_keys(sampling.extra, {TEMPLATE_KEY}, "the engine transformers")
    return template_variables(sampling.extra)


def _load(config: TransformersGenerator) -> ChatModel:
    folder = Path(config.model)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"generator.model={config.model!r} is not a Hugging Face model folder (no config.json in it); nothing is ever downloaded")
    try:
        from tpt_megatron.augment.engines.transformers_model import ChatModel
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise MachineError(f"{error.name} is not installed; generator.kind=transformers needs it: pip install 'tpt-megatron[evaluate]'") from None
    return ChatModel(folder, config.device, config.dtype)
