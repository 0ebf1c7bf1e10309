"""Continuation of prompts by a Hugging Face model, in batches padded on the left: greedy, unless a request says otherwise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from tpt_megatron.config.evaluate import ThoughtDelimiters
from tpt_megatron.errors import DataError
from tpt_megatron.evaluate.models import ids_of, load_model, load_tokenizer
from tpt_megatron.evaluate.thoughts import find_stop
from tpt_megatron.quiet import quiet_transformers

log = logging.getLogger(__name__)

NO_THOUGHTS = ThoughtDelimiters(open="\0<", close="\0>")
"""Delimiters that no text has, for requests that know of no thoughts."""


@dataclass(frozen=True)
class Request:
    """What to continue, and how far.

    ids            the prompt's tokens, one at least
    stops          texts that end the continuation, and are no part of it; they count outside of thoughts only
    starts_inside  whether the prompt has opened a thought
    sampling       of transformers' generation config: empty is greedy
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    stops: tuple[str, ...] = ()
    thoughts: ThoughtDelimiters = NO_THOUGHTS
    starts_inside: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt; `new_tokens` leaves the end token out. ended: by the end of the document, a stop text, or the limit."""

    text: str
    new_tokens: int
    ended: Literal["end", "stop", "length"] = "end"


class Generator:
    """A model and its tokenizer. Prompts are tokenised as documents are in preprocessing: no special token is put before them."""

    def __init__(self, folder: Path, dtype: str, device: str | None = None) -> None:
        """Load a model folder; DataError when it is missing, incomplete or damaged, MachineError without the device. Nothing is ever downloaded."""
        self.tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, dtype, device)
        self.model, self.positions, self._device = loaded.model, loaded.positions, loaded.device
        self._eos_ids = loaded.eos_ids or ids_of(self.tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, without any that mark its beginning or end."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def continue_all(
        self, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int, advance: Callable[[int], None] = lambda _: None
    ) -> list[Continuation]:
        """Return one greedy continuation for each prompt, in their order. `advance` is told how many each batch finished.

        Raises DataError for a prompt without tokens.
        """
        ids = [tuple(self.encode(prompt)) for prompt in prompts]
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            if not prompt_ids:
                raise DataError(f"prompt {prompt!r} has no tokens; there is nothing to continue")
        longest = max(len(prompt_ids) for prompt_ids in ids) + max_new_tokens
        if self.positions is not None and longest > self.positions:
            log.warning("prompt and max_new_tokens reach %d positions, the model was trained on %d", longest, self.positions)
        # Prompts of a like length go together: little padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        results: dict[int, Continuation] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            results.update(zip(batch, self.continue_batch([Request(ids[i], max_new_tokens) for i in batch]), strict=True))
            advance(len(batch))
        return [results[i] for i in range(len(ids))]

    def continue_batch(self, requests: Sequence[Request]) -> list[Continuation]:
        """Return the continuations of some requests of equal `sampling`, asked together."""
        width, pad = max(len(request.ids) for request in requests), self._eos_ids[0] if self._eos_ids else 0
        input_bs = torch.tensor([[pad] * (width - len(request.ids)) + list(request.ids) for request in requests], device=self._device)  # [batch, width]
        mask_bs = torch.tensor([[0] * (width - len(request.ids)) + [1] * len(request.ids) for request in requests], device=self._device)
        watches = [_Watch(request, self._eos_ids, self._decode) for request in requests]
        how = transformers.GenerationConfig(
            **{"do_sample": False, "num_beams": 1, **requests[0].sampling},
            max_new_tokens=max(request.max_new_tokens for request in requests),
            pad_token_id=pad,
            eos_token_id=list(self._eos_ids) or None,
        )
        ends = transformers.StoppingCriteriaList([_Watched(watches)])
        with quiet_transformers(), torch.inference_mode():
            self.model.generate(input_ids=input_bs, attention_mask=mask_bs, generation_config=how, stopping_criteria=ends)
        return [watch.continuation() for watch in watches]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Watch:
    """Sees a row's new tokens as they come, and says when it has ended."""

    def __init__(self, request: Request, eos_ids: tuple[int, ...], decode: Callable[[Sequence[int]], str]) -> None:
        self._request, self._eos_ids, self._decode = request, eos_ids, decode
        self._ids: list[int] = []
        self._ended: Literal["end", "stop", "length"] | None = None
        self._text = ""  # of the tokens before _read
        self._start, self._read = 0, 0  # those from _start to _read are decoded again with each new one: a token's text depends on those before it

    def see(self, token: int) -> bool:
        """Take one token more, unless the row has ended; return whether it has."""
        if self._ended is None:
            if token in self._eos_ids:
                self._ended = "end"
                return True
            self._ids.append(token)
            if self._request.stops and self._is_stopped():
                self._ended = "stop"
            elif len(self._ids) == self._request.max_new_tokens:
                self._ended = "length"
        return self._ended is not None

    def continuation(self) -> Continuation:
        """Return what was written, up to the stop text."""
        text, request = self._decode(self._ids), self._request
        stop = find_stop(text, request.stops, request.thoughts, starts_inside=request.starts_inside)
        return Continuation(text[:stop], len(self._ids), "stop" if stop is not None else self._ended or "length")

    def _is_stopped(self) -> bool:
        known, longer = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(longer) <= len(known) or longer.endswith("\N{REPLACEMENT CHARACTER}"):  # a character that is not complete
            return False
        self._text += longer[len(known) :]
        self._start, self._read = self._read, len(self._ids)
        request = self._request
        return find_stop(self._text, request.stops, request.thoughts, starts_inside=request.starts_inside, is_whole=False) is not None


class _Watched(transformers.StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch when its watch says so."""

    def __init__(self, watches: Sequence[_Watch]) -> None:
        self._watches = watches

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Return which rows have ended [batch]; input_ids [batch, prompt and new tokens]."""
        last = input_ids[:, -1].tolist()
        return torch.tensor([watch.see(token) for watch, token in zip(self._watches, last, strict=True)], device=input_ids.device)
