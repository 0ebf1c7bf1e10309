"""The model as lm-eval sees it: answers come out of the journal, or of the backend and into the journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpt_megatron.config.evaluate import ThoughtDelimiters
from tpt_megatron.evaluate.benchmarks.backends import Backend
from tpt_megatron.evaluate.benchmarks.journal import Journal, request_key
from tpt_megatron.evaluate.generate import Request
from tpt_megatron.evaluate.thoughts import ends_in_thought, outside_thoughts

DEFAULT_NEW_TOKENS = 256
"""Of lm-eval's tasks that do not say how many; lm-eval's own default."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Asked:
    """One generation as it was: `ended` is end, stop or length; `is_cut` says that the prompt's beginning had no room."""

    prompt: str
    text: str
    new_tokens: int
    ended: str
    is_cut: bool
    is_thought_open: bool


@dataclass(frozen=True)
class Asking:
    """How requests are asked.

    settings  what decides answers besides the request: the model's weights, the backend, ...
    answers   anywhere or outside_thoughts: what lm-eval is given to mark
    check     raises Stopped when a signal came
    """

    settings: dict[str, Any]
    thoughts: ThoughtDelimiters
    answers: str
    batch_size: int
    seed: int
    check: Callable[[], None]
    advance: Callable[[int], None] = lambda count: None


class JournalledModel:
    """What lm-eval's `evaluate` takes for a model. `asked`: the generations of the last call, in the order of its requests."""

    rank, world_size = 0, 1

    def __init__(self, backend: Backend, journal: Journal, asking: Asking) -> None:
        self._backend, self._journal, self._asking = backend, journal, asking
        self.asked: list[Asked] = []

    def generate_until(self, instances: Sequence[Any]) -> list[str]:
        """Return what is written after each prompt, or what of it is outside of thoughts, where answers are to stand there."""
        thoughts = self._asking.thoughts
        answers = self._answer("generate_until", instances, self._generate)
        self.asked = []
        for instance, answer in zip(instances, answers, strict=True):
            prompt, text = instance.args[0], answer["text"]
            is_open = ends_in_thought(text, thoughts, starts_inside=ends_in_thought(prompt, thoughts))
            self.asked.append(Asked(prompt, text, answer["new_tokens"], answer["ended"], answer["is_cut"], is_open))
        if self._asking.answers == "anywhere":
            return [asked.text for asked in self.asked]
        return [outside_thoughts(asked.text, thoughts, starts_inside=ends_in_thought(asked.prompt, thoughts)) for asked in self.asked]

    def loglikelihood(self, instances: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether it is the greedy one) of each continuation."""
        return [(likelihood, is_greedy) for likelihood, is_greedy in self._answer("loglikelihood", instances, self._likelihoods("loglikelihood"))]

    def loglikelihood_rolling(self, instances: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each text, in nats."""
        return self._answer("loglikelihood_rolling", instances, self._likelihoods("loglikelihood_rolling"))

    def _likelihoods(self, kind: str) -> Callable[[Sequence[Any]], list[Any]]:
        return lambda batch: self._backend.loglikelihoods(kind, batch)

    def _answer(self, kind: str, instances: Sequence[Any], ask: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        """Return the answers in the order of `instances`; ask, batch by batch, for those that the journal has not."""
        seen: Counter[str] = Counter()
        keys = []
        for instance in instances:
            key = request_key(kind=kind, request=instance.args, settings=self._asking.settings)
            seen[key] += 1  # what is drawn several times is several requests
            keys.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
        missing = [number for number, key in enumerate(keys) if key not in self._journal]
        self._asking.advance(len(keys) - len(missing))
        # Long ones first: what does not fit into memory fails at once. Requests of other settings are no batch.
        missing.sort(key=lambda number: (_settings_of(instances[number]), -sum(map(len, _texts_of(instances[number]))), number))
        while missing:
            self._asking.check()
            same = next((i for i, number in enumerate(missing) if _settings_of(instances[number]) != _settings_of(instances[missing[0]])), len(missing))
            batch, missing = missing[: min(same, self._asking.batch_size)], missing[min(same, self._asking.batch_size) :]
            torch.manual_seed(int(request_key(seed=self._asking.seed, first=keys[batch[0]])[:8], 16))
            answers = ask([instances[number] for number in batch])
            self._journal.add({keys[number]: answer for number, answer in zip(batch, answers, strict=True)})
            self._asking.advance(len(batch))
        self._asking.check()
        return [self._journal[key] for key in keys]

    def _generate(self, batch: Sequence[Any]) -> list[dict[str, Any]]:
        requests, cuts = [], []
        for instance in batch:
            prompt, how = instance.args[0], dict(instance.args[1])
            limit = next((int(how[name]) for name in _LIMITS if how.get(name) is not None), DEFAULT_NEW_TOKENS)
            until = how.get("until") or []
            stops = tuple([until] if isinstance(until, str) else until)
            ids = self._backend.encode(prompt)
            kept, limit = fit(ids, limit, self._backend.positions, begins=self._backend.begins)
            inside = ends_in_thought(prompt, self._asking.thoughts)
            requests.append(Request(tuple(kept), limit, stops, self._asking.thoughts, inside, sampling_of(how)))
            cuts.append(len(kept) < len(ids))
        continuations = self._backend.continue_batch(requests)
        return [
            {"text": found.text, "new_tokens": found.new_tokens, "ended": found.ended, "is_cut": is_cut}
            for found, is_cut in zip(continuations, cuts, strict=True)
        ]


def fit(ids: list[int], max_new_tokens: int, positions: int | None, *, begins: int = 0) -> tuple[list[int], int]:
    """Return the prompt's tokens that a model of so many positions can read, and how many may follow. begins: how many at the front stay, a BOS.

    A long prompt leaves less room for what follows; where a quarter of the positions would not be left, or `max_new_tokens` if these are fewer, the
    prompt loses its beginning, which is examples.
    """
    if positions is None:
        return ids, max_new_tokens
    room = positions - min(max_new_tokens, max(1, positions // 4))
    kept = ids if len(ids) <= room else ids[:begins] + ids[len(ids) - (room - begins) :]
    return kept, min(max_new_tokens, positions - len(kept))


def sampling_of(how: dict[str, Any]) -> dict[str, Any]:
    """Return what of an lm-eval task's generation_kwargs is about drawing; nothing where decoding is greedy."""
    rest = {key: value for key, value in how.items() if key not in (*_LIMITS, "until", "do_sample", "temperature")}
    temperature = float(how.get("temperature") or 0.0)
    draws = how.get("do_sample", temperature > 0) and temperature > 0
    return {**rest, "do_sample": True, "temperature": temperature} if draws else {key: value for key, value in rest.items() if key not in ("top_p", "top_k")}


def _texts_of(instance: Any) -> list[str]:
    return [argument for argument in instance.args if isinstance(argument, str)]


def _settings_of(instance: Any) -> str:
    return repr([argument for argument in instance.args if not isinstance(argument, str)])
