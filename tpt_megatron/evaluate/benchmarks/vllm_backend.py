"""The backend `vllm`, through lm-eval's class for it. Written after lm-eval 0.4.13's and vLLM's sources (0.11 to 0.32); it has not been run.

vLLM ends a request at the first stop text, whether in a thought or not. So a request whose thought holds one is taken up again where it ended, until a
stop text counts: its tokens are the prompt of the next one, which vLLM has in its prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpt_megatron.config.evaluate import BenchmarkOptions
from tpt_megatron.errors import ConfigError
from tpt_megatron.evaluate.generate import Continuation, Request
from tpt_megatron.evaluate.thoughts import ends_in_thought, find_stop


class VllmBackend:
    """A model folder in vLLM, on the GPUs that CUDA_VISIBLE_DEVICES names."""

    def __init__(self, folder: Path, options: BenchmarkOptions, dtype: str) -> None:
        from lm_eval.models.vllm_causallms import VLLM

        self._add_bos, self.begins = options.add_bos_token, int(options.add_bos_token)
        self._lm: Any = VLLM(pretrained=str(folder), dtype=dtype, add_bos_token=options.add_bos_token, seed=options.seed, batch_size="auto")
        if options.add_bos_token and self._lm.tokenizer.bos_token_id is None:
            raise ConfigError("benchmark_options.add_bos_token=true: the model's tokenizer has no BOS token")

    @property
    def positions(self) -> int | None:
        """How many tokens vLLM reads of prompt and continuation together."""
        return int(self._lm.max_length)

    def encode(self, text: str) -> list[int]:
        """Return a prompt's tokens."""
        bos = [self._lm.tokenizer.bos_token_id] if self._add_bos else []
        return bos + list(self._lm.tokenizer(text, add_special_tokens=False).input_ids)

    def continue_batch(self, requests: Sequence[Request]) -> list[Continuation]:
        """Return the continuations; requests that a stop text in a thought has ended go on together."""
        states = [Stretches(request) for request in requests]
        while going_on := [state for state in states if state.ended is None]:
            parameters = [self._parameters(state) for state in going_on]
            prompts = [{"prompt_token_ids": [*state.request.ids, *state.ids]} for state in going_on]
            for state, output in zip(going_on, self._lm.model.generate(prompts, sampling_params=parameters, use_tqdm=False), strict=True):
                state.take(list(output.outputs[0].token_ids), output.outputs[0].finish_reason, output.outputs[0].stop_reason, self._decode)
        return [state.continuation() for state in states]

    def loglikelihoods(self, kind: str, instances: Sequence[Any]) -> list[Any]:
        """Ask lm-eval's class."""
        return list(getattr(self._lm, kind)(list(instances), disable_tqdm=True))

    def _parameters(self, state: Stretches) -> Any:
        from vllm import SamplingParams

        how = {"temperature": 0.0, **{key: value for key, value in state.request.sampling.items() if key != "do_sample"}}
        if not state.request.sampling.get("do_sample"):
            how["temperature"] = 0.0
        return SamplingParams(**how, max_tokens=state.request.max_new_tokens - len(state.ids), stop=state.stops(), include_stop_str_in_output=True)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._lm.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Stretches:
    """A request that is answered in stretches, each up to what vLLM takes for a stop text: the tokens so far, and how it ended (None: it goes on)."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.ids: list[int] = []
        self.ended: Any = None
        self._text = ""

    def stops(self) -> list[str]:
        """Return what is to end the next stretch: in a thought its end; outside what ends the continuation."""
        thoughts = self.request.thoughts
        if ends_in_thought(self._text, thoughts, starts_inside=self.request.starts_inside):
            return [thoughts.close] if self.request.stops else []
        return [*self.request.stops, thoughts.open] if self.request.stops else []

    def take(self, ids: list[int], finish_reason: str, stop_reason: Any, decode: Any) -> None:
        """Take a stretch that has ended. A stop_reason that is a text is one of `stops`; a token, or none, is the end of the document."""
        request = self.request
        is_document_end = finish_reason == "stop" and not isinstance(stop_reason, str)
        self.ids += ids
        if is_document_end and self.ids:
            self.ids.pop()  # vLLM hands the end token over with the others
        self._text = decode(self.ids)
        stop = find_stop(self._text, request.stops, request.thoughts, starts_inside=request.starts_inside, is_whole=False)
        if stop is not None:
            self.ended = "stop"
        elif is_document_end:
            self.ended = "end"
        elif finish_reason != "stop" or len(self.ids) >= request.max_new_tokens:
            self.ended = "length"

    def continuation(self) -> Continuation:
        """Return what was written, up to the stop text."""
        request = self.request
        stop = find_stop(self._text, request.stops, request.thoughts, starts_inside=request.starts_inside)
        return Continuation(self._text[:stop], len(self.ids), "stop" if stop is not None else self.ended)
