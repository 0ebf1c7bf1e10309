"""Greedy continuation of prompts by a Hugging Face model, in batches padded on the left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tpt_megatron.errors import DataError
from tpt_megatron.quiet import quiet_transformers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt, up to the end of the document or the limit; `new_tokens` leaves the end token out."""

    text: str
    new_tokens: int


class Generator:
    """A model and its tokenizer. Prompts are tokenised as documents are in preprocessing: no special token is put before them."""

    def __init__(self, folder: Path, dtype: str) -> None:
        """Load a model folder; DataError when it is missing, incomplete or damaged. Nothing is ever downloaded."""
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder}: not a Hugging Face model folder (no config.json in it); give one, or a run as run_dir")
        if not (folder / "tokenizer.json").is_file():
            why = "evaluation reads no SentencePiece tokenizers yet" if (folder / "tokenizer.model").is_file() else "the run's dataset had no tokenizer"
            raise DataError(f"{folder}: has no tokenizer.json, so prompts cannot be read; {why}")
        try:
            with quiet_transformers():
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # noqa: BLE001  transformers and safetensors raise bare exceptions of many kinds for damage
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{folder}: the model cannot be loaded ({reason})") from None
        if missing := sorted(loading["missing_keys"]):  # transformers would make them up at random
            raise DataError(f"{folder}: the weights lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; export the model again")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().to(self._device)
        self._eos_ids = _ids(model.generation_config.eos_token_id) or _ids(self._tokenizer.eos_token_id)
        self._positions = getattr(model.config, "max_position_embeddings", None)

    def continue_all(
        self, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int, advance: Callable[[int], None] = lambda _: None
    ) -> list[Continuation]:
        """Return one greedy continuation for each prompt, in their order. `advance` is told how many each batch finished.

        Raises DataError for a prompt without tokens.
        """
        ids = [list(self._tokenizer(prompt, add_special_tokens=False).input_ids) for prompt in prompts]
        for prompt, prompt_ids in zip(prompts, ids, strict=True):
            if not prompt_ids:
                raise DataError(f"prompt {prompt!r} has no tokens; there is nothing to continue")
        longest = max(len(prompt_ids) for prompt_ids in ids) + max_new_tokens
        if self._positions is not None and longest > self._positions:
            log.warning("prompt and max_new_tokens reach %d positions, the model was trained on %d", longest, self._positions)
        # Prompts of a like length go together: little padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        results: dict[int, Continuation] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            results.update(zip(batch, self._continue_batch([ids[i] for i in batch], max_new_tokens), strict=True))
            advance(len(batch))
        return [results[i] for i in range(len(ids))]

    def _continue_batch(self, ids: list[list[int]], max_new_tokens: int) -> list[Continuation]:
        width, pad = max(map(len, ids)), self._eos_ids[0] if self._eos_ids else 0
        input_bs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=self._device)  # [batch, width]
        mask_bs = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self._device)
        # A fresh generation config: the folder's own may ask for sampling.
        greedy = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=list(self._eos_ids) or None
        )
        with quiet_transformers(), torch.inference_mode():
            output_bs = self._model.generate(input_ids=input_bs, attention_mask=mask_bs, generation_config=greedy)
        return [self._until_end(row) for row in output_bs[:, width:].tolist()]

    def _until_end(self, new_ids: list[int]) -> Continuation:
        end = next((i for i, token in enumerate(new_ids) if token in self._eos_ids), len(new_ids))
        return Continuation(self._tokenizer.decode(new_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False), end)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
