"""How likely a model finds the last tokens of sequences: batches of like length, padded on the right, where no token of a causal model looks."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.evaluate.models import load_model
from tpt_megatron.files import sha256_of
from tpt_megatron.quiet import quiet_transformers
from tpt_megatron.tokenizer import TokenizerLike, load_tokenizer

Ids = npt.NDArray[np.int64]
ROWS_AT_ONCE = 1024
"""Tokens whose logits are held in fp32 at a time."""


def choose_device(name: str) -> torch.device:
    """Return the device that a config's key `device` names, or auto; ConfigError where this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA device(s); give cpu, auto, or one that it has")
    return device


def fingerprint(folder: Path) -> str:
    """Return 16 hex digits that change with a model folder's weights or config; DataError where there are no weights."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not weights or not (folder / "config.json").is_file():
        raise DataError(f"{folder}: not a Hugging Face model folder (it lacks config.json or weights); give one, or a run or a checkpoint")
    digests = "".join(sha256_of(path) for path in (*weights, folder / "config.json"))
    return hashlib.sha256(digests.encode()).hexdigest()[:16]


def model_tokenizer(folder: Path) -> TokenizerLike:
    """Return the tokenizer of a model folder; DataError where it has none, or none with a token that ends a text."""
    try:
        with quiet_transformers():
            loaded: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001  transformers raises bare exceptions of many kinds
        raise DataError(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)})") from None
    if loaded.eos_token is None:
        raise DataError(f"{folder}: its tokenizer_config.json names no eos_token; put there the token that ends a document")
    return load_tokenizer(str(folder), str(loaded.eos_token))


class LanguageModel:
    """A causal language model of a Hugging Face folder, ready to be asked."""

    def __init__(self, folder: Path, dtype: str, device: torch.device) -> None:
        """Load it; DataError when it is missing, incomplete or damaged. Nothing is ever downloaded."""
        loaded = load_model(folder, dtype, str(device))
        self.folder = folder
        self._model, self._device = loaded.model, loaded.device
        self.vocabulary_size = int(self._model.config.vocab_size)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters

    def log_likelihoods(
        self, asked: Sequence[tuple[Ids, int]], batch_tokens: int, advance: Callable[[int], object] = lambda sequences: None
    ) -> list[npt.NDArray[np.float32]]:
        """Return the natural logarithm of the probability of each of the last n tokens of each (ids, n), given all before it.

        Needs 0 < n < len(ids). Batches have at most `batch_tokens` tokens, padding included, or one sequence. `advance` is told how many each had.
        DataError for an id that the model has not.
        """
        largest = max((int(ids.max()) for ids, _ in asked), default=0)
        if largest >= self.vocabulary_size:
            raise DataError(f"{self.folder}: it has {self.vocabulary_size} ids and the texts have {largest}; they are of another tokenizer")
        found: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(asked)
        for batch in batches([len(ids) for ids, _ in asked], batch_tokens):
            for number, values in zip(batch, self._of_batch([asked[number] for number in batch]), strict=True):
                found[number] = values
            advance(len(batch))
        return found

    @torch.inference_mode()
    def _of_batch(self, asked: Sequence[tuple[Ids, int]]) -> list[npt.NDArray[np.float32]]:
        width = max(len(ids) for ids, _ in asked)
        ids_bs = torch.zeros((len(asked), width), dtype=torch.int64)
        mask_bs = torch.zeros_like(ids_bs)
        for row, (ids, _) in enumerate(asked):
            ids_bs[row, : len(ids)], mask_bs[row, : len(ids)] = torch.from_numpy(ids), 1
        ids_bs, mask_bs = ids_bs.to(self._device), mask_bs.to(self._device)
        first = min(len(ids) - wanted for ids, wanted in asked) - 1  # the earliest position whose logits are needed
        options = {"logits_to_keep": width - first} if self._keeps_logits else {}
        logits_bsv = self._model(input_ids=ids_bs, attention_mask=mask_bs, use_cache=False, **options).logits
        offset = first if self._keeps_logits else 0
        values = []
        for row, (ids, wanted) in enumerate(asked):
            begin = len(ids) - wanted
            values.append(_log_probabilities(logits_bsv[row, begin - 1 - offset : len(ids) - 1 - offset], ids_bs[row, begin : len(ids)]))
        return values


def _log_probabilities(logits_tv: torch.Tensor, ids_t: torch.Tensor) -> npt.NDArray[np.float32]:
    """Return log p [t] of ids under logits, in fp32 whatever these are."""
    pieces = [
        -torch.nn.functional.cross_entropy(logits_tv[at : at + ROWS_AT_ONCE].float(), ids_t[at : at + ROWS_AT_ONCE], reduction="none")
        for at in range(0, len(ids_t), ROWS_AT_ONCE)
    ]
    found: npt.NDArray[np.float32] = torch.cat(pieces).cpu().numpy()
    return found


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of sequences of like length, the longest first, so many that they have at most `tokens` tokens when padded; one at least."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
