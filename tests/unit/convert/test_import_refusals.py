"""What cannot be imported is refused before anything is written: one line that names what, where, and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support.families import configs, edit_config, edit_tensors, random_model, save_model, tensors_of
from tpt_megatron.convert.checkpoint_reader import CheckpointReader, read_record
from tpt_megatron.convert.export import export_checkpoint
from tpt_megatron.convert.importing import import_model
from tpt_megatron.errors import ConversionError, MachineError, TptError, UsageError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {case: save_model(random_model(configs()[case]), root / case) for case in ("llama", "qwen2-tied", "qwen3", "qwen3_moe", "mistral")}


def refused(source: Path, output: Path, kind: type[TptError] = ConversionError, dtype: str | None = None) -> str:
    """The line that an import is refused with, nothing having been written."""
    beside = sorted(source.parent.iterdir())
    with pytest.raises(kind) as error:
        import_model(source, output, dtype)
    assert sorted(source.parent.iterdir()) == beside
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(path: Path, bytes_kept: int) -> None:
    path.write_bytes(path.read_bytes()[:bytes_kept])


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def write_header(path: Path, header: Any) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def lead_nowhere(path: Path) -> None:
    """As in a cache of the hub whose download was cut short."""
    path.unlink()
    path.symlink_to("../blobs/gone")


def put_the_first_into_the_last(folder: Path) -> None:
    last = sorted(folder.glob("*.safetensors"))[-1]
    save_file(load_file(last) | load_file(first_shard(folder)), last)


NAME = "model.layers.2.mlp.up_proj.weight"


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(shutil.rmtree, "config.json: no such file; give a Hugging Face model folder", id="no folder"),
        pytest.param(as_file, "config.json: no such file", id="a file"),
        pytest.param(lambda folder: cut(folder / "config.json", 50), "config.json: not valid JSON", id="config cut"),
        pytest.param(lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object", id="config no object"),
        pytest.param(lambda folder: (folder / "config.json").write_bytes(b'{"\xff": 1}'), "config.json: not valid JSON", id="config no text"),
        pytest.param(lambda folder: first_shard(folder).unlink(), "missing, which model.safetensors.index.json names; download them again", id="no shard"),
        pytest.param(lambda folder: cut(folder / INDEX, 99), "not an index of safetensors files", id="index cut"),
        pytest.param(lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 5, "b": "c"}}'), "not an index", id="index of numbers"),
        pytest.param(lambda folder: (folder / INDEX).unlink(), "neither model.safetensors.index.json nor model.safetensors is there", id="no index"),
        pytest.param(lambda folder: cut(first_shard(folder), first_shard(folder).stat().st_size - 4), "not a whole safetensors file", id="shard cut"),
        pytest.param(lambda folder: cut(first_shard(folder), 40), "not a whole safetensors file (it is cut off)", id="shard cut in its header"),
        pytest.param(lambda folder: cut(first_shard(folder), 0), "not a whole safetensors file", id="shard empty"),
        pytest.param(lambda folder: write_header(first_shard(folder), b"{not json"), "not a whole safetensors file", id="header no JSON"),
        pytest.param(lambda folder: write_header(first_shard(folder), []), "not a whole safetensors file", id="header no object"),
        pytest.param(lambda folder: write_header(first_shard(folder), {"a": {"data_offsets": [0, 0]}}), "not a whole safetensors file", id="header no type"),
        pytest.param(
            lambda folder: write_header(first_shard(folder), {"a": {"data_offsets": [0, 0], "dtype": "F8_E4M3", "shape": [0]}}),
            "a is of type F8_E4M3; known are F32, BF16, F16",
            id="fp8",
        ),
        pytest.param(lambda folder: edit_tensors(folder, {NAME: None}), f"tensors of a llama are missing: {NAME}", id="tensor missing"),
        pytest.param(lambda folder: edit_tensors(folder, {"model.a": torch.ones(2)}), "tensors that a llama has no place for: model.a", id="tensor unknown"),
        pytest.param(lambda folder: edit_tensors(folder, {NAME: torch.ones(80, 47)}), f"{NAME} has shape [80, 47], config.json asks for [80, 48]", id="shape"),
        pytest.param(lambda folder: lead_nowhere(folder / "tokenizer.json"), "tokenizer.json: links to what is not there; download it again", id="link"),
        pytest.param(put_the_first_into_the_last, "is in model-00001-of-00022.safetensors, too; download both again", id="tensor twice"),
        pytest.param(lambda folder: edit_tensors(folder, {"lm_head.weight": None}), "are missing: lm_head.weight", id="no output layer"),
        pytest.param(
            lambda folder: edit_tensors(folder, {NAME: tensors_of(folder)[NAME].half()}), "of several types, fp16, fp32; give --dtype", id="types differ"
        ),
    ],
)
def test_a_damaged_folder(damage: Callable[[Path], Any], says: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources["llama"], tmp_path / "source"))
    damage(source)
    assert says in refused(source, tmp_path / "out")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("llama", {"model_type": "gemma3"}, "model_type='gemma3' is not known; known are llama, mistral, qwen2, qwen3, qwen3_moe"),
        ("llama", {"model_type": None}, "model_type=None is not known"),
        ("llama", {"attention_bias": True}, "attention_bias=true cannot be expressed"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true cannot be expressed"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu cannot be expressed"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config cannot be expressed"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1e4}}, "rope scaling of type 'yarn' cannot be expressed here; llama3 can"),
        ("llama", {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, "rope scaling of type 'linear'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}}, "llama3 without high_freq_factor, low_freq_factor"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters of their own for full_attention"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 cannot be expressed"),
        ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 cannot be expressed"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 cannot be expressed"),
        ("llama", {"rope_theta": "a"}, "a value is of the wrong kind"),
        ("llama", {"rope_parameters": "a"}, "a value is of the wrong kind"),
        ("llama", {"layer_types": 3}, "a value is of the wrong kind"),
        ("llama", {"num_hidden_layers": "many"}, "num_layers"),
        ("llama", {"num_hidden_layers": 0}, "num_layers"),
        ("llama", {"num_attention_heads": 5}, "not divisible"),
        ("llama", {"rms_norm_eps": None}, "norm_epsilon"),
        ("llama", {"max_position_embeddings": None}, "max_position_embeddings=None: expected a whole number over 0"),
        ("llama", {"max_position_embeddings": "4k"}, "max_position_embeddings='4k': expected a whole number over 0"),
        ("mistral", {"sliding_window": 4096}, "sliding_window=4096 cannot be expressed"),
        ("qwen2-tied", {"use_sliding_window": True}, "use_sliding_window=true cannot be expressed"),
        ("qwen2-tied", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with sliding_attention cannot be expressed"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true cannot be expressed"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=true cannot be expressed"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=false cannot be expressed"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 cannot be expressed"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=[1] cannot be expressed"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "top_k=9 is more than num_experts=4"),
    ],
)
def test_what_has_no_place_here(case: str, changes: dict[str, Any], says: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources[case], tmp_path / "source"))
    edit_config(source, **changes)
    said = refused(source, tmp_path / "out")
    assert said.startswith(f"{source / 'config.json'}: ")
    assert says in said


@pytest.mark.parametrize(
    ("case", "key", "says"),
    [
        ("llama", "rms_norm_eps", "key 'rms_norm_eps' is missing"),
        ("llama", "num_hidden_layers", "key 'num_hidden_layers' is missing"),
        ("mistral", "sliding_window", "sliding_window=4096 cannot be expressed"),
        ("qwen3", "head_dim", "key 'head_dim' is missing"),
        ("qwen3_moe", "norm_topk_prob", "norm_topk_prob=false cannot be expressed"),
        ("qwen3_moe", "num_experts_per_tok", "key 'num_experts_per_tok' is missing"),
    ],
)
def test_a_key_that_is_missing_is_what_transformers_takes_it_for(case: str, key: str, says: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources[case], tmp_path / "source"))
    edit_config(source, key)
    assert says in refused(source, tmp_path / "out")


def test_a_key_that_is_missing_where_transformers_has_a_default_like_ours(sources: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources["llama"], tmp_path / "source"))
    edit_config(source, "head_dim", "rope_parameters", "tie_word_embeddings", "hidden_act", "initializer_range", "attention_bias", "mlp_bias")
    model = read_record(import_model(source, tmp_path / "out")).model
    defaults = transformers.LlamaConfig(hidden_size=model.hidden_size, num_attention_heads=model.num_heads)
    assert (model.head_size, model.tie_embeddings, model.init_std) == (defaults.head_dim, defaults.tie_word_embeddings, defaults.initializer_range)
    assert (model.rope_theta, model.rope_scaling) == (10_000.0, None)


def test_an_output_in_use_and_a_wrong_type(sources: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources["llama"], tmp_path / "source"))
    assert "fp32, bf16, fp16" in refused(source, tmp_path / "out", UsageError, "int8")
    import_model(source, tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    assert "holds checkpoints already; name another folder" in refused(source, tmp_path / "out", UsageError)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "other" / "iter_0000005").mkdir(parents=True)
    assert "holds checkpoints already" in refused(source, tmp_path / "other", UsageError)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    import_model(source, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep"
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(source, tmp_path / "file", UsageError)


def test_a_disk_without_room(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(sources["llama"], tmp_path / "source"))
    checkpoint = import_model(source, tmp_path / "checkpoints")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    assert "GB are free; nothing was written" in refused(source, tmp_path / "out" / "deeper", MachineError)
    with pytest.raises(MachineError, match="GB are free; nothing was written"):
        export_checkpoint(checkpoint, tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "source"]


@pytest.mark.parametrize("process", [4_194_304, os.getpid()], ids=["more than a process id can be", "as in a container, where every process is the first"])
def test_what_a_killed_conversion_left_does_not_count_as_used(process: int, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command would never begin anew on a disk that is half full of its own leftovers."""
    left = [tmp_path / "out" / f".iter_0000000.{process}.tmp", tmp_path / f".export.{process}.tmp"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 0 if any(folder.exists() for folder in left) else 10**9))
    left[0].mkdir(parents=True)
    checkpoint = import_model(sources["llama"], tmp_path / "out")
    left[1].mkdir()
    export_checkpoint(checkpoint, tmp_path / "export")


def test_damage_that_is_found_while_tensors_are_read_leaves_nothing(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the threads it comes up in: every tensor once."""
    from tpt_megatron.convert.hugging_face import HuggingFaceTensors

    source = Path(shutil.copytree(sources["qwen2-tied"], tmp_path / "source"))
    read = HuggingFaceTensors.read
    for name in list(tensors_of(source))[::7]:

        def failing(self: HuggingFaceTensors, asked: str, bad: str = name) -> torch.Tensor:
            if asked == bad:
                raise ConversionError(f"{bad} cannot be read")
            return read(self, asked)

        monkeypatch.setattr(HuggingFaceTensors, "read", failing)
        assert refused(source, tmp_path / "out") == f"{name} cannot be read"


def test_every_chunk_is_written_whichever_thread_it_fell_to(sources: dict[str, Path], tmp_path: Path) -> None:
    reader = CheckpointReader(import_model(sources["qwen3_moe"], tmp_path / "out"))
    assert sorted(path.name for path in reader.path.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    for key in reader.tensors:
        reader.read(key)
