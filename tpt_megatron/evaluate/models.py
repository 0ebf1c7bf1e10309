"""Models and tokenizers out of Hugging Face folders, as evaluation asks them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tpt_megatron.errors import DataError, MachineError, TptError
from tpt_megatron.quiet import quiet_transformers


@dataclass(frozen=True)
class LoadedModel:
    """A causal model on its device, ready to be asked.

    eos_ids    the ends of text that its generation config names; may be none
    positions  how many tokens it was made to read; None where it does not say
    """

    model: Any
    device: torch.device
    eos_ids: tuple[int, ...]
    positions: int | None


def load_model(folder: Path, dtype: str, device: str | None = None) -> LoadedModel:
    """Load a model folder's weights as `dtype` (float32 or bfloat16); nothing is ever downloaded. device: default a GPU where there is one.

    DataError when it is missing, incomplete or damaged, MachineError for a device that is not there.
    """
    if device is not None and device.startswith("cuda") and not _has(device):
        raise MachineError(f"device={device}: this machine has no such GPU; give cpu, or none to take what there is")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        with quiet_transformers():
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
            )
    except TptError:
        raise
    except Exception as error:  # noqa: BLE001  transformers and safetensors raise bare exceptions of many kinds for damage
        raise DataError(f"{folder}: the model cannot be loaded ({_first_line(error)})") from None
    if missing := sorted(loading["missing_keys"]):  # transformers would make them up at random
        raise DataError(f"{folder}: the weights lack {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}; export the model again")
    ends = ids_of(model.generation_config.eos_token_id)
    # generate() takes what a request leaves open from here: a repetition penalty that the folder asks for would change greedy decoding.
    model.generation_config = transformers.GenerationConfig()
    return LoadedModel(model.eval().to(where), where, ends, getattr(model.config, "max_position_embeddings", None))


def load_tokenizer(folder: Path) -> Any:
    """Return a model folder's tokenizer; DataError where it has none that can be read."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: not a Hugging Face model folder (no config.json in it); give one, or a run as run_dir")
    if not (folder / "tokenizer.json").is_file():
        why = "evaluation reads no SentencePiece tokenizers yet" if (folder / "tokenizer.model").is_file() else "the run's dataset had no tokenizer"
        raise DataError(f"{folder}: has no tokenizer.json, so prompts cannot be read; {why}")
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except TptError:
        raise
    except Exception as error:  # noqa: BLE001  as for weights
        raise DataError(f"{folder}: the tokenizer cannot be loaded ({_first_line(error)})") from None


def ids_of(value: Any) -> tuple[int, ...]:
    """Return a config's end tokens, of which it may have none, one or several."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _has(device: str) -> bool:
    return torch.cuda.is_available() and int(device.partition(":")[2] or 0) < torch.cuda.device_count()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
