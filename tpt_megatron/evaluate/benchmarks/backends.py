"""What answers requests: transformers in this process, or vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tpt_megatron.config.evaluate import BenchmarkOptions
from tpt_megatron.errors import ConfigError
from tpt_megatron.evaluate.generate import Continuation, Generator, Request


class Backend(Protocol):
    """A model that continues prompts, and says how likely texts are.

    positions  how many tokens, prompt and continuation together, it can read; None where it does not say
    begins     how many tokens at a prompt's front are none of its text, and stay where it is cut: 1 with a BOS
    """

    begins: int

    @property
    def positions(self) -> int | None:
        """See the class."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens that a prompt becomes, a BOS before them where one is asked for."""

    def continue_batch(self, requests: Sequence[Request]) -> list[Continuation]:
        """Return the continuations of requests of equal sampling, in their order."""

    def loglikelihoods(self, kind: str, instances: Sequence[Any]) -> list[Any]:
        """Return what lm-eval's method `kind` (loglikelihood or loglikelihood_rolling) does for its instances."""


class TransformersBackend:
    """The model of a folder, on CPU or one GPU. Log-likelihoods are lm-eval's own, of the same model."""

    def __init__(self, generator: Generator, options: BenchmarkOptions, batch_size: int) -> None:
        self._generator, self._batch_size, self._add_bos = generator, batch_size, options.add_bos_token
        if options.add_bos_token and generator.tokenizer.bos_token_id is None:
            raise ConfigError("benchmark_options.add_bos_token=true: the model's tokenizer has no BOS token")
        self.begins = int(options.add_bos_token)
        self._lm: Any = None

    @property
    def positions(self) -> int | None:
        """How many tokens the model was made to read."""
        return self._generator.positions

    def encode(self, text: str) -> list[int]:
        """Return a prompt's tokens."""
        bos = [self._generator.tokenizer.bos_token_id] if self._add_bos else []
        return bos + self._generator.encode(text)

    def continue_batch(self, requests: Sequence[Request]) -> list[Continuation]:
        """Return the continuations."""
        return self._generator.continue_batch(requests)

    def loglikelihoods(self, kind: str, instances: Sequence[Any]) -> list[Any]:
        """Ask lm-eval's class for transformers, which is made at the first call."""
        if self._lm is None:
            from lm_eval.models.huggingface import HFLM

            self._lm = HFLM(
                pretrained=self._generator.model,
                tokenizer=self._generator.tokenizer,
                backend="causal",
                batch_size=self._batch_size,
                max_length=self.positions,
                add_bos_token=self._add_bos,
            )
        return list(getattr(self._lm, kind)(list(instances), disable_tqdm=True))


def open_backend(folder: Path, generator: Generator | None, options: BenchmarkOptions, dtype: str, batch_size: int) -> Backend:
    """Return the backend that the config asks for; `generator` is the folder's model where it is transformers."""
    if generator is not None:
        return TransformersBackend(generator, options, batch_size)
    from tpt_megatron.evaluate.benchmarks.vllm_backend import VllmBackend

    return VllmBackend(folder, options, dtype)
