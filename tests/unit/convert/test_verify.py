"""What verification is for: every mistake that a conversion can make, made on purpose, is found and named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.families import configs, edit_config, edit_tensors, random_model, save_model, tensors_of
from tpt_megatron import cli
from tpt_megatron.config.model import ModelConfig, RopeScaling
from tpt_megatron.convert import hugging_face, importing, verify
from tpt_megatron.convert.export import export_checkpoint
from tpt_megatron.convert.families.rules import GATE_UP, QKV, Fusion
from tpt_megatron.convert.importing import import_model
from tpt_megatron.errors import ConversionError, DataError, MachineError

# megatron-core's, of defaults of its own.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "DeprecationWarning", "FutureWarning")]

Folders = Callable[[str], tuple[Path, Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """For a case: the model folder, the checkpoint and its export, made once. Tests copy what they spoil."""

    @cache
    def made(case: str) -> tuple[Path, Path, Path]:
        root = tmp_path_factory.mktemp(case)
        source = save_model(random_model(configs()[case]), root / "source")
        checkpoint = import_model(source, root / "checkpoints")
        export_checkpoint(checkpoint, root / "export")
        return source, checkpoint, root / "export"

    return made


@pytest.mark.parametrize("case", configs())
def test_what_is_right_is_verified_in_both_directions(case: str, folders: Folders) -> None:
    source, checkpoint, export = folders(case)
    for target, folder in (("checkpoint", source), ("hugging_face", export)):
        found = verify.verify(checkpoint, folder, target)  # type: ignore[arg-type]
        assert found.all_layers
        assert found.tensors == len(tensors_of(source))
        assert found.difference < 2e-5
        assert found.largest > 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_conversion_to_fewer_bits_is_held_against_itself(dtype: str, folders: Folders, tmp_path: Path) -> None:
    source, checkpoint, _ = folders("qwen2-tied")
    rounded = import_model(source, tmp_path / "checkpoints", dtype)
    assert verify.verify(rounded, source, "checkpoint").difference < 2e-5
    export_checkpoint(checkpoint, tmp_path / "export", dtype)
    assert verify.verify(checkpoint, tmp_path / "export", "hugging_face").difference < 2e-5
    import_model(tmp_path / "export", tmp_path / "wide", "fp32")
    assert verify.verify(tmp_path / "wide" / "iter_0000000", tmp_path / "export", "checkpoint").difference < 2e-5


LAYER = "model.layers.1."


def swap_gate_and_up(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    gate, up = (LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up"))
    return {gate: tensors[up], up: tensors[gate]}


def plain_qkv(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What comes of [q of group, k, v, q of group, ...] when it is taken for [Q | K | V]."""
    names = [LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"]
    q, k, v = (tensors[name] for name in names)
    groups = 2
    fused = torch.cat([torch.cat([part.chunk(groups)[group] for part in (q, k, v)]) for group in range(groups)])
    return dict(zip(names, fused.split([len(q), len(k), len(v)]), strict=True))


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    name = LAYER + "self_attn.o_proj.weight"
    assert tensors[name].shape[0] == tensors[name].shape[1]
    return {name: tensors[name].T.contiguous()}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(swap_gate_and_up, LAYER + "mlp.gate_proj.weight is not what .* has in decoder.layers.mlp.linear_fc1.weight", id="gate and up"),
        pytest.param(plain_qkv, LAYER + r"self_attn.q_proj.weight is not what .* has in decoder.layers.self_attention.linear_qkv.weight", id="plain qkv"),
        pytest.param(transposed, LAYER + r"self_attn.o_proj.weight is not what", id="transposed"),
        pytest.param(lambda tensors: {"model.norm.weight": None}, "model.norm.weight is missing", id="missing"),
        pytest.param(
            lambda tensors: {
                LAYER + "mlp.down_proj.weight": tensors[LAYER + "mlp.down_proj.weight"].index_add(0, torch.tensor([3]), torch.full((1, 80), 1e-7))
            },
            LAYER + "mlp.down_proj.weight is not what",
            id="one row by a rounding",
        ),
    ],
)
@pytest.mark.parametrize("target", ["checkpoint", "hugging_face"])
def test_a_tensor_that_is_not_the_same_is_named(spoil: Callable[..., dict[str, Any]], named: str, target: Any, folders: Folders, tmp_path: Path) -> None:
    source, checkpoint, export = folders("llama")
    spoilt = Path(shutil.copytree(export if target == "hugging_face" else source, tmp_path / "spoilt"))
    edit_tensors(spoilt, spoil(tensors_of(spoilt)))
    with pytest.raises(ConversionError, match=named):
        verify.verify(checkpoint, spoilt, target)


@pytest.mark.parametrize(
    ("case", "removed", "changes", "named"),
    [
        ("llama-tied-scaled", ("rope_scaling",), {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_scaling is None"),
        ("llama", ("rope_parameters",), {"rope_theta": 500_000.0}, "rope_theta is 500000.0, the checkpoint's is 10000.0"),
        ("llama", (), {"rms_norm_eps": 1e-6}, "norm_epsilon is 1e-06, the checkpoint's is 3e-05"),
        ("qwen2-tied", (), {"tie_word_embeddings": False}, "tie_embeddings is False, the checkpoint's is True"),
        ("qwen3_moe", (), {"num_experts_per_tok": 1}, "experts is .*'top_k': 1"),
        ("mistral", (), {"head_dim": 8}, "head_dim is 8, the checkpoint's is 16"),
    ],
)
def test_a_config_that_says_something_else_is_named_by_key(
    case: str, removed: tuple[str, ...], changes: dict[str, Any], named: str, folders: Folders, tmp_path: Path
) -> None:
    _, checkpoint, export = folders(case)
    spoilt = Path(shutil.copytree(export, tmp_path / "spoilt"))
    edit_config(spoilt, *removed, **changes)
    with pytest.raises(ConversionError, match=named):
        verify.verify(checkpoint, spoilt, "hugging_face")


def test_what_no_config_json_has_is_not_compared(folders: Folders, tmp_path: Path) -> None:
    _, checkpoint, export = folders("llama")
    trained = Path(shutil.copytree(checkpoint, tmp_path / "iter_0000005"))
    (trained / "checksums.json").unlink()
    record = json.loads((trained / "tpt.json").read_text())
    record["model"] |= {"mtp_loss_weight": 0.3, "embedding_init_std": 0.5}
    (trained / "tpt.json").write_text(json.dumps(record))
    assert verify.verify(trained, export, "hugging_face").difference < 2e-5


def test_what_does_not_verify_gets_no_name_and_the_same_command_begins_anew(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, checkpoint, _ = folders("llama")
    commands: dict[str, Callable[[], None]] = {
        "imported": lambda: cli.import_(source, tmp_path / "imported", verify=True),
        "exported": lambda: cli.export(checkpoint, tmp_path / "exported", verify=True),
    }
    for name, command in commands.items():
        with monkeypatch.context() as strict:
            strict.setattr(verify, "BOUND", -1.0)
            with pytest.raises(ConversionError, match=rf"differ by up to .*{name}.*; nothing was kept|{name}.* differ by up to .*; nothing was kept"):
                command()
        assert [path.name for path in tmp_path.iterdir() if name in path.name] == []
        command()
        assert (tmp_path / name).is_dir()


def test_a_tensor_too_many_is_named(folders: Folders, tmp_path: Path) -> None:
    _, checkpoint, export = folders("llama")
    spoilt = Path(shutil.copytree(export, tmp_path / "spoilt"))
    edit_tensors(spoilt, {"model.extra.weight": torch.ones(3)})
    with pytest.raises(ConversionError, match=r"tensors that the checkpoint has not: model\.extra\.weight"):
        verify.verify(checkpoint, spoilt, "hugging_face")


def test_embeddings_that_were_untied_are_found_with_their_tensor(folders: Folders, tmp_path: Path) -> None:
    _, checkpoint, export = folders("qwen2-tied")
    spoilt = Path(shutil.copytree(export, tmp_path / "spoilt"))
    edit_tensors(spoilt, {"lm_head.weight": tensors_of(export)["model.embed_tokens.weight"].flip(0)})
    with pytest.raises(ConversionError, match=r"tensors that the checkpoint has not: lm_head\.weight"):
        verify.verify(checkpoint, spoilt, "hugging_face")


def _transposed(parts: Any, model: ModelConfig) -> Any:
    return parts[0].T.contiguous()


WRONG_FUSIONS = {
    "gate and up swapped": (
        "mlp.linear_fc1.weight",
        Fusion(lambda parts, model: GATE_UP.join(parts[::-1], model), lambda weight, model: GATE_UP.split(weight, model)[::-1]),
    ),
    "experts' gate and up swapped": (
        "experts.linear_fc1.weight",
        Fusion(lambda parts, model: GATE_UP.join(parts[::-1], model), lambda weight, model: GATE_UP.split(weight, model)[::-1]),
    ),
    "plain qkv": (
        "linear_qkv.weight",
        Fusion(
            lambda parts, model: torch.cat(list(parts)),
            lambda weight, model: weight.split([model.num_heads * model.head_size] + 2 * [model.num_query_groups * model.head_size]),
        ),
    ),
    "plain qkv bias": (
        "linear_qkv.bias",
        Fusion(
            lambda parts, model: torch.cat(list(parts)),
            lambda bias, model: bias.split([model.num_heads * model.head_size] + 2 * [model.num_query_groups * model.head_size]),
        ),
    ),
    "transposed": ("linear_proj.weight", Fusion(_transposed, lambda weight, model: (weight.T,))),
}


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        ("llama", "gate and up swapped"),
        ("mistral", "gate and up swapped"),
        ("qwen3_moe", "experts' gate and up swapped"),
        ("llama-tied-scaled", "plain qkv"),
        ("qwen3", "plain qkv"),
        ("qwen2", "plain qkv bias"),
        ("llama", "transposed"),
    ],
)
def test_a_wrong_table_is_found_by_the_logits_alone(case: str, mistake: str, monkeypatch: pytest.MonkeyPatch, folders: Folders, tmp_path: Path) -> None:
    """Made in both directions, it gives every tensor back: that is why logits are compared."""
    key, fusion = WRONG_FUSIONS[mistake]
    family = hugging_face.FAMILIES[configs()[case].model_type]
    rules = tuple(dataclasses.replace(rule, fusion=fusion) if rule.key.endswith(key) else rule for rule in family.rules)
    assert rules != family.rules
    monkeypatch.setitem(hugging_face.FAMILIES, family.model_type, dataclasses.replace(family, rules=rules))
    source = folders(case)[0]
    checkpoint = import_model(source, tmp_path / "checkpoints")
    export_checkpoint(checkpoint, tmp_path / "export")
    before, after = tensors_of(source), tensors_of(tmp_path / "export")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for target, folder in (("checkpoint", source), ("hugging_face", tmp_path / "export")):
        with pytest.raises(ConversionError, match=r"transformers' logits and megatron-core's of .* differ by up to"):
            verify.verify(checkpoint, folder, target)  # type: ignore[arg-type]


MISREAD = {
    "no rope scaling": ("llama-tied-scaled", {"rope_scaling": None}),
    "another rope scaling": ("llama-tied-scaled", {"rope_scaling": RopeScaling(factor=32.0, original_max_position_embeddings=32)}),
    "rope base": ("qwen3", {"rope_theta": 10_000.0}),
    "norm epsilon": ("llama", {"norm_epsilon": 1e-6}),
}


@pytest.mark.parametrize("mistake", MISREAD)
def test_a_config_that_is_misread_is_found_by_the_logits_alone(mistake: str, monkeypatch: pytest.MonkeyPatch, folders: Folders, tmp_path: Path) -> None:
    case, changes = MISREAD[mistake]

    def misread(config: Any, path: Path) -> Any:
        family, model = hugging_face.model_of(config, path)
        return family, model.model_copy(update=changes)

    for module in (importing, verify):
        monkeypatch.setattr(module, "model_of", misread)
    source = folders(case)[0]
    with pytest.raises(ConversionError, match="differ by up to"):
        verify.verify(import_model(source, tmp_path / "checkpoints"), source, "checkpoint")


@pytest.fixture
def deep(tmp_path: Path) -> tuple[Path, Path]:
    """A model folder of eleven layers and its checkpoint."""
    config = configs()["qwen2"]
    config.num_hidden_layers, config.layer_types = 11, ["full_attention"] * 11
    source = save_model(random_model(config), tmp_path / "source")
    return source, import_model(source, tmp_path / "checkpoints")


def memory_for(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))


def test_where_memory_is_short_first_middle_and_last_layer_are_compared(deep: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, checkpoint = deep
    parameters = sum(tensor.numel() for tensor in tensors_of(source).values())
    memory_for(monkeypatch, 24 * parameters // 2)
    found = verify.verify(checkpoint, source, "checkpoint")
    assert (found.layers, found.all_layers) == ((0, 5, 10), False)
    assert found.difference < 2e-5
    export_checkpoint(checkpoint, tmp_path / "export", "bf16")
    assert verify.verify(checkpoint, tmp_path / "export", "hugging_face").layers == (0, 5, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "export", "source"], "models of some layers are left behind"
    memory_for(monkeypatch, 24 * parameters // 20)
    with pytest.raises(MachineError, match="every tensor is as it should be; to compare logits of 3 layers"):
        verify.verify(checkpoint, source, "checkpoint")


def test_a_wrong_table_is_found_by_three_layers_too(monkeypatch: pytest.MonkeyPatch, deep: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = deep
    family = hugging_face.FAMILIES["qwen2"]
    rules = tuple(dataclasses.replace(rule, fusion=WRONG_FUSIONS["plain qkv"][1]) if rule.fusion is QKV else rule for rule in family.rules)
    monkeypatch.setitem(hugging_face.FAMILIES, "qwen2", dataclasses.replace(family, rules=rules))
    checkpoint = import_model(source, tmp_path / "wrong")
    memory_for(monkeypatch, 24 * sum(tensor.numel() for tensor in tensors_of(source).values()) // 2)
    with pytest.raises(ConversionError, match="differ by up to"):
        verify.verify(checkpoint, source, "checkpoint")


def test_a_tokenizer_that_cannot_be_read_is_one_line(folders: Folders, tmp_path: Path) -> None:
    source, checkpoint, _ = folders("llama")
    spoilt = Path(shutil.copytree(source, tmp_path / "spoilt"))
    (spoilt / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"spoilt/tokenizer\.json: not a tokenizer\.json"):
        verify.verify(checkpoint, spoilt, "checkpoint")
