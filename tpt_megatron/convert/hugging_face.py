"""A Hugging Face model folder: its config.json in both spellings, and its tensors in safetensors files, read one at a time and written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tpt_megatron.config.model import ModelConfig, RopeScaling
from tpt_megatron.convert.families import FAMILIES
from tpt_megatron.convert.families.rules import Family, Shape
from tpt_megatron.convert.streaming import StreamedView, StreamedWriter
from tpt_megatron.errors import ConversionError

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE = "chat_template.jinja", "chat_template.json"
KEPT_FILES = (
    *(CONFIG, GENERATION_CONFIG),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *(CHAT_TEMPLATE, OLDER_CHAT_TEMPLATE),
)
"""What a folder holds beside tensors that an export of the model, trained on, should have again."""
_FREE = ("max_window_layers", "sliding_window", "output_router_logits")
"""Keys of a config.json whose values change nothing here, windows being off: a source's own stay, also where it has none."""
_AT_ONCE = 1 << 24
"""Bytes of a tensor that are brought into another type, and written, in one go."""
_COMPUTED = "rotary_emb.inv_freq"
"""How the names end of what is computed from the config and no weight: the oldest folders have it, in a type of its own."""
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json; ConversionError when there is none, or it is no JSON object."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConversionError(f"{path}: no such file; give a Hugging Face model folder") from None
    except ValueError as error:
        raise ConversionError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: expected a JSON object")
    return config


def model_of(config: Mapping[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    """Return the family and the model that a config.json describes. ConversionError, by key and value, for what has no place in ours."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ConversionError(f"{path}: model_type={config.get('model_type')!r} is not known; known are {', '.join(FAMILIES)}")
    try:
        if refused := family.refuse(config) or _refuse(config):
            raise ConversionError(f"{path}: {refused} cannot be expressed here")
        theta, scaling = _rope(config, path)
        values = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "ffn_hidden_size": config["intermediate_size"],
            "num_heads": config["num_attention_heads"],
            "num_query_groups": config.get("num_key_value_heads") or config["num_attention_heads"],
            "head_dim": config.get("head_dim"),
            "vocab_size": config["vocab_size"],
            "rope_theta": theta,
            "rope_scaling": scaling,
            "norm_epsilon": config["rms_norm_eps"],
            "tie_embeddings": config.get("tie_word_embeddings", False),
            "init_std": config.get("initializer_range", 0.02),
            **family.read(config),
        }
        return family, ModelConfig.model_validate(values)
    except KeyError as error:
        raise ConversionError(f"{path}: key {error} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ConversionError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg'].removeprefix('Value error, ')}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConversionError(f"{path}: a value is of the wrong kind ({error})") from None


def _refuse(config: Mapping[str, Any]) -> str | None:
    if config.get("hidden_act", "silu") != "silu":
        return f"hidden_act={config['hidden_act']}"
    if config.get("quantization_config"):
        return "quantization_config"
    for found in (config, config.get("rope_parameters") or {}, config.get("rope_scaling") or {}):
        if found.get("partial_rotary_factor", 1.0) not in (None, 1.0):
            return f"partial_rotary_factor={found['partial_rotary_factor']}"
    if others := {*(config.get("layer_types") or ())} - {"full_attention"}:
        return f"layer_types with {', '.join(sorted(others))}"
    return None


def _rope(config: Mapping[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """Return RoPE's base and scaling from rope_theta and rope_scaling (transformers 4), or from rope_parameters (5), which must agree where both are.

    transformers 5 takes a base in rope_scaling, too.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if nested := [key for key, value in (new or {}).items() if isinstance(value, dict)]:
        raise ConversionError(f"{path}: rope_parameters of their own for {', '.join(nested)} cannot be expressed here")
    thetas = {float(found["rope_theta"]) for found in (config, new or {}, old or {}) if found.get("rope_theta") is not None}
    scalings = [_scaling(found, path) for found in (new, old) if found is not None]
    if len(thetas) > 1 or any(other != scalings[0] for other in scalings[1:]):
        raise ConversionError(f"{path}: rope_parameters and rope_theta, rope_scaling say different things; remove the wrong ones")
    return (thetas.pop() if thetas else 10_000.0), (scalings[0] if scalings else None)


def _scaling(found: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ConversionError(f"{path}: rope scaling of type {kind!r} cannot be expressed here; llama3 can")
    names = RopeScaling.model_fields
    if missing := names.keys() - found.keys():
        raise ConversionError(f"{path}: rope scaling llama3 without {', '.join(sorted(missing))}")
    return {name: found[name] for name in names}


def written_config(
    family: Family, model: ModelConfig, *, positions: int, dtype: torch.dtype, eod_id: int | None, source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return config.json of a model, in the spellings of transformers 4 and 5 at once.

    positions: the longest sequence. eod_id: the token that ends and begins texts; None: the source says which. source: the config.json that
    the model was imported with, whose other keys are kept. transformers 4.57 ignores rope_parameters silently and takes 10,000 for RoPE's
    base; 5 reads the older keys, too.
    """
    scaling = None if model.rope_scaling is None else {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    kept = dict(source or {"attention_dropout": 0.0, "use_cache": True})
    kept.pop("auto_map", None)  # names the source's own code, which is not taken along
    if source is None or eod_id is not None:
        kept |= {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": None}
    return kept | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "dtype": str(dtype).removeprefix("torch."),
        **{key: value for key, value in family.settings(model).items() if source is None or key not in _FREE},
    }


class HuggingFaceTensors:
    """The weights of a model folder, read one at a time: memory holds what was asked for and no file."""

    def __init__(self, folder: Path) -> None:
        """Read the index, and every file's header. ConversionError for a folder without tensors, or with damaged ones."""
        self.folder = folder
        self._places: dict[str, tuple[Path, int, int]] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in self._paths():
            data, header = read_header(path)
            for name, entry in header.items():
                if name.endswith(_COMPUTED):
                    continue
                if name in self._places:
                    raise ConversionError(f"{path}: {name} is in {self._places[name][0].name}, too; download both again")
                if entry["dtype"] not in DTYPES:
                    raise ConversionError(f"{path}: {name} is of type {entry['dtype']}; known are {', '.join(DTYPES)}")
                begin, end = entry["data_offsets"]
                self._places[name] = path, data + begin, end - begin
                self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), DTYPES[entry["dtype"]]

    def _paths(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if single.is_file():  # transformers looks for it first: an index beside it may be left over
            return [single]
        if not index.is_file():
            raise ConversionError(f"{self.folder}: neither {INDEX} nor {SINGLE} is there; other formats than safetensors are not read")
        try:
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
            if missing := [name for name in names if not (self.folder / name).is_file()]:
                raise ConversionError(f"{self.folder}: {', '.join(missing)} missing, which {INDEX} names; download them again")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConversionError(f"{index}: not an index of safetensors files") from None
        return [self.folder / name for name in names]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        path, offset, length = self._places[name]
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        try:
            if length != tensor.nbytes:
                raise ValueError(f"it has {length} bytes, its shape asks for {tensor.nbytes}")
            with StreamedView(path, offset, length) as file:
                if file.readinto(bytes_of(tensor)) != length:
                    raise ValueError("it is cut off")
        except (ValueError, OSError) as error:
            raise ConversionError(f"{path}: {name} cannot be read, the file is damaged ({error})") from None
        return tensor


def as_type(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor in another type; ConversionError, by its name, where fp16 would make infinities of its numbers."""
    if dtype is torch.float16 and tensor.dtype is not dtype:
        largest = max(abs(float(end)) for end in tensor.aminmax())
        if largest > torch.finfo(dtype).max:
            raise ConversionError(f"{name} has numbers of up to {largest:.3g}, beyond fp16's 65504; take bf16 or fp32")
    return tensor.to(dtype)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return where a safetensors file's data begins, and its header without metadata: of each tensor {dtype, shape, data_offsets}.

    ConversionError when it is damaged.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("it is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        for entry in header.values():
            entry["dtype"], entry["shape"] = str(entry["dtype"]), [int(axis) for axis in entry["shape"]]
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, the header says {8 + length + end}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path}: not a whole safetensors file ({error})") from None
    return 8 + length, dict(header)


@contextmanager
def writing(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Iterator[Any]:
    """Yield a function that takes the tensors of a safetensors file, of whatever type, one after the other in the order of `shapes`.

    The library has all tensors of a file in memory when it writes; here it is one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    waiting = list(shapes)
    with StreamedWriter(path, with_checksum=False) as file:
        file.write(len(text).to_bytes(8, "little") + text)

        def write(name: str, tensor: Tensor) -> None:
            assert name == waiting.pop(0) and tuple(tensor.shape) == tuple(shapes[name]), name
            for rows in torch.split(tensor, max(1, _AT_ONCE * len(tensor) // tensor.nbytes)):  # a copy in another type is one of few rows
                file.write(bytes_of(as_type(rows, dtype, name).contiguous()))

        yield write
        assert not waiting, waiting


def kept_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that go with the model: configs and tokenizer. ConversionError for a link that leads nowhere."""
    paths = [path for path in (folder / name for name in KEPT_FILES) if path.is_file() or path.is_symlink()]
    if broken := next((path for path in paths if not path.exists()), None):
        raise ConversionError(f"{broken}: links to what is not there; download it again")
    return paths
