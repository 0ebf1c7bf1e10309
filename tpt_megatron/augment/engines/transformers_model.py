"""A Hugging Face chat model that continues prompts in batches, each row with its own random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tpt_megatron.config.augment import Sampling
from tpt_megatron.errors import ConfigError, DataError, MachineError
from tpt_megatron.quiet import quiet_transformers

_DTYPES: dict[str, Any] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the model wrote, without end token and stop text. `tokens` counts these too, as servers do."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]
    stop_reason: str | None


class ChatModel:
    """A model folder, loaded. Its generation_config.json says which tokens end a turn; how to sample is the caller's."""

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        """Load. DataError when the folder is incomplete or damaged, ConfigError without a chat template, MachineError for a device that is not there."""
        self.device = _device(device)
        try:
            with quiet_transformers():
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=_DTYPES[dtype], local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # noqa: BLE001  transformers and safetensors raise bare exceptions of many kinds for damage
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{folder}: the model cannot be loaded ({reason})") from None
        if missing := sorted(loading["missing_keys"]):  # transformers would make them up at random
            raise DataError(f"{folder}: the weights lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}")
        if not self.tokenizer.chat_template:
            raise ConfigError(f"generator.model={str(folder)!r} has no chat template, so it cannot be asked; give a model that was trained to chat")
        try:
            self._model = model.eval().to(self.device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MachineError(f"{folder}: the model cannot be put on device {str(self.device)!r} ({reason})") from None
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._end_ids = sorted({*_ids(model.generation_config.eos_token_id), *_ids(self.tokenizer.eos_token_id)})
        self._pad_id = next(iter([*_ids(self.tokenizer.pad_token_id), *self._end_ids]), 0)
        # generate() fills what its caller leaves open from here, and the folder's own file may hold penalties.
        self._model.generation_config = transformers.GenerationConfig()
        # Rust tokenizers may not be used by two threads at once; prompts are encoded in another one.
        self._decoder = copy.deepcopy(self.tokenizer)

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a rendered prompt; the template already wrote the special tokens."""
        return list(self.tokenizer(prompt, add_special_tokens=False).input_ids)

    def continue_batch(self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, is_abandoned: Callable[[], bool]) -> list[Continuation]:
        """Continue each prompt (token ids) with its seed; ends early, with anything, once `is_abandoned`. MachineError when memory does not suffice."""
        width = max(map(len, prompts))
        input_bs = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in prompts], device=self.device)  # [batch, width]
        mask_bs = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=self.device)
        ends = _Ends(len(prompts), width, self._end_ids, sampling.stop, self._decode, is_abandoned)
        # Sampling is ours (`_Draw`): what is left for generate() is to take the one token that stays possible.
        settings = transformers.GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, num_beams=1, pad_token_id=self._pad_id, eos_token_id=self._end_ids or None
        )
        processors = transformers.LogitsProcessorList([] if sampling.temperature == 0 else [_Draw(seeds, sampling)])
        try:
            with torch.inference_mode():
                output_bs = self._model.generate(
                    input_ids=input_bs,
                    attention_mask=mask_bs,
                    generation_config=settings,
                    logits_processor=processors,
                    stopping_criteria=transformers.StoppingCriteriaList([ends]),
                )
        except torch.OutOfMemoryError:
            raise MachineError(
                f"device {str(self.device)!r} has too little memory for {len(prompts)} replies at once of {width} + {sampling.max_tokens} tokens; "
                "lower generator.batch_size or generator.sampling.max_tokens"
            ) from None
        return [self._read(row, ends.end_of[i], ends.ended_by_token[i], sampling.stop) for i, row in enumerate(output_bs[:, width:].tolist())]

    def _read(self, new_ids: list[int], end: int | None, by_token: bool, stop: tuple[str, ...]) -> Continuation:
        if end is None:
            return Continuation(self._decode(new_ids), len(new_ids), "length", None)
        if by_token:
            return Continuation(self._decode(new_ids[: end - 1]), end, "stop", None)
        text = self._decode(new_ids[:end])
        found = min((position, word) for word in stop if (position := text.find(word)) >= 0)
        return Continuation(text[: found[0]], end, "stop", found[1])

    def _decode(self, ids: list[int]) -> str:
        # Special tokens are kept: in some models the think tags are special. End and padding are never passed here.
        return str(self._decoder.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Draw:
    """A logits processor that samples: it leaves one token possible in each row, drawn with that row's own random numbers.

    One uniform number for each row and step, from a generator on the CPU, is looked up in the row's cumulative distribution: a reply then does
    not depend on what else is in the batch, but for rounding.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self._generators = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
        self._warpers = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_k is not None:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores_bv = scores.float()  # [batch, vocabulary]
        for warper in self._warpers:
            scores_bv = warper(input_ids, scores_bv)
        cumulative_bv = scores_bv.softmax(dim=-1).cumsum(dim=-1)
        uniform_b = torch.stack([torch.rand((), generator=generator) for generator in self._generators]).to(scores.device)
        drawn_b1 = torch.searchsorted(cumulative_bv, uniform_b[:, None] * cumulative_bv[:, -1:], right=True)
        drawn_b1 = drawn_b1.clamp(max=scores.shape[-1] - 1)  # rounding may lift the product to the last sum
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn_b1, 0.0)


class _Ends:
    """A stopping criterion that keeps where each row ended: at an end token, or where a stop text was complete."""

    def __init__(
        self, rows: int, width: int, end_ids: Sequence[int], stop: tuple[str, ...], decode: Callable[[list[int]], str], is_abandoned: Callable[[], bool]
    ) -> None:
        self.end_of: list[int | None] = [None] * rows  # in new tokens, the last one included
        self.ended_by_token = [False] * rows
        self._width = width
        self._end_ids = frozenset(end_ids)
        self._stop = stop
        # A token is at least a byte, so a stop text ends within as many tokens; some more for those that decode to nothing.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 4
        self._decode = decode
        self._is_abandoned = is_abandoned

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1]
        tails = input_ids[:, max(self._width, length - self._tail) :].tolist()
        for row, tail in enumerate(tails):
            if self.end_of[row] is not None:
                continue
            if tail[-1] in self._end_ids:
                self.end_of[row], self.ended_by_token[row] = length - self._width, True
            elif self._stop and any(text in self._decode(tail) for text in self._stop):
                self.end_of[row] = length - self._width
        abandoned = self._is_abandoned()
        return torch.tensor([abandoned or end is not None for end in self.end_of], device=input_ids.device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"generator.device={name!r} is no device; write auto, cpu, cuda or cuda:N") from None


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
