from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch_dist import EOD, checkpoint_state, random_llama, tiny_model, write_checkpoint  # noqa: E402

from tpt_megatron.convert.checkpoint_reader import CheckpointReader, find_checkpoint, iteration_folders  # noqa: E402
from tpt_megatron.convert.export import export_checkpoint, plan_shards  # noqa: E402
from tpt_megatron.convert.families.rules import ALONE, Piece  # noqa: E402
from tpt_megatron.errors import CheckpointError, ConversionError, TptError, UsageError  # noqa: E402

IDS = torch.arange(2 * 40).view(2, 40) % 61
LOGITS_BOUND = 2e-5


def logits(llama: Any) -> Any:
    with torch.inference_mode():
        return llama(input_ids=IDS).logits


def exported(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="untied-gqa-head_dim-apart"),
        pytest.param({"tie_embeddings": True}, id="tied"),
        pytest.param({"num_heads": 4, "num_query_groups": 4, "head_dim": None}, id="mha"),
        pytest.param({"num_heads": 4, "num_query_groups": 1, "head_dim": None, "num_layers": 1}, id="one-group-one-layer"),
    ],
)
def test_exported_model_is_the_original(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    original = random_llama(model)
    write_checkpoint(tmp_path / "run", model, checkpoint_state(original, model, padded_vocab=128))
    export_checkpoint(tmp_path / "run", tmp_path / "hf")

    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {name: tensor for name, tensor in original.state_dict().items() if not (model.tie_embeddings and name == "lm_head.weight")}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    assert (logits(exported(tmp_path / "hf")) - logits(original)).abs().max() < LOGITS_BOUND


def swap_gate_and_up(state: dict[str, Any], model: Any) -> None:
    key = "decoder.layers.mlp.linear_fc1.weight"
    state[key] = torch.cat(list(reversed(state[key].split(model.ffn_hidden_size, dim=1))), dim=1)


def plain_qkv(state: dict[str, Any], model: Any) -> None:
    key, size = "decoder.layers.self_attention.linear_qkv.weight", model.head_size
    grouped = state[key].view(model.num_layers, model.num_query_groups, -1, size, model.hidden_size)
    state[key] = torch.cat([grouped[:, :, :-2].flatten(1, 3), grouped[:, :, -2].flatten(1, 2), grouped[:, :, -1].flatten(1, 2)], dim=1)


def swap_norms(state: dict[str, Any], model: Any) -> None:
    first, second = "decoder.layers.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    state[first], state[second] = state[second], state[first]


def reverse_layers(state: dict[str, Any], model: Any) -> None:
    key = "decoder.layers.mlp.linear_fc2.weight"
    state[key] = state[key].flip(0)


@pytest.mark.parametrize("spoil", [swap_gate_and_up, plain_qkv, swap_norms, reverse_layers])
def test_comparison_notices_a_wrong_layout(tmp_path: Path, spoil: Callable[[dict[str, Any], Any], None]) -> None:
    model = tiny_model()
    original = random_llama(model)
    state = checkpoint_state(original, model, padded_vocab=128)
    spoil(state, model)
    write_checkpoint(tmp_path / "run", model, state)
    export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert (logits(exported(tmp_path / "hf")) - logits(original)).abs().max() > 1000 * LOGITS_BOUND


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = tiny_model()
    words = tuple(f"w{i}" for i in range(59))
    for step, seed in ((50, 1), (100, 2)):
        state = checkpoint_state(random_llama(model, seed), model, padded_vocab=128)
        state["optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"] = torch.ones(3, 32, 56)
        state["decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"] = b"nothing"
        write_checkpoint(folder, model, state, step=step, words=words)
    return folder


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "damaged"))


def test_folder_is_complete_and_its_tokenizer_is_the_runs(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    source = run / "checkpoints" / "iter_0000100" / "tokenizer.json"
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == source.read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("w3 w5").input_ids == [tokenizer.convert_tokens_to_ids(word) for word in ("w3", "w5")]
    assert tokenizer.eos_token == EOD
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == exported(tmp_path / "hf").generation_config.eos_token_id
    assert (config["rope_theta"], config["rms_norm_eps"], config["head_dim"], config["max_position_embeddings"]) == (5_000.0, 3e-5, 12, 64)
    assert config["rope_parameters"] == {"rope_theta": 5_000.0, "rope_type": "default"}, "transformers 4.57 ignores it, 5 knows no rope_theta beside it"
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "vanilla" in card
    assert "100,000" in card


def test_latest_checkpoint_is_taken_unless_one_is_named(run: Path, tmp_path: Path) -> None:
    for name in ("", "checkpoints", "checkpoints/iter_0000100"):
        assert find_checkpoint(run / name).name == "iter_0000100"
    assert find_checkpoint(run / "checkpoints/iter_0000050").name == "iter_0000050"
    assert [path.name for path in iteration_folders(run / "checkpoints")] == ["iter_0000050", "iter_0000100"]


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), (None, "float32")])
def test_dtype_is_asked_for_or_kept(run: Path, tmp_path: Path, dtype: str | None, name: str) -> None:
    export_checkpoint(run, tmp_path / "hf", dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {getattr(torch, name)}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == name
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == getattr(torch, name)


def test_small_shards_load_as_the_same_model(run: Path, tmp_path: Path) -> None:
    export_checkpoint(run, tmp_path / "whole")
    export_checkpoint(run, tmp_path / "sharded", shard_bytes=20_000)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == {path.name for path in files}
    for path in files:
        with safe_open(path, "pt") as shard:
            assert {key: path.name for key in shard.keys()}.items() <= index["weight_map"].items()  # noqa: SIM118
    assert torch.equal(logits(exported(tmp_path / "whole")), logits(exported(tmp_path / "sharded")))


def test_shards_are_planned_within_their_size() -> None:
    def of(*rows: int) -> list[Piece]:
        return [Piece(f"key{number}", (), (count,), {f"name{number}": (count,)}, ALONE) for number, count in enumerate(rows)]

    assert [(len(shard.pieces), shard.bytes) for shard in plan_shards(of(3, 3, 3, 9, 1), 2, 12)] == [(2, 12), (1, 6), (1, 18), (1, 2)]
    assert [shard.name for shard in plan_shards(of(3, 3), 2, 12)] == ["model.safetensors"]
    assert [shard.name for shard in plan_shards(of(3, 3), 2, 11)] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_layers_are_read_one_at_a_time(run: Path) -> None:
    reader = CheckpointReader(run / "checkpoints" / "iter_0000100")
    key = "decoder.layers.mlp.linear_fc2.weight"
    whole = reader.read(key)
    assert whole.shape == reader.tensors[key].shape == (3, 32, 56)
    for layer in range(3):
        assert torch.equal(reader.read(key, (layer,)), whole[layer])


def one_line(error: pytest.ExceptionInfo[TptError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_output_in_use_and_wrong_dtype_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError) as error:
        export_checkpoint(run, tmp_path / "hf")
    assert "not empty" in one_line(error)
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep"
    with pytest.raises(UsageError, match="fp32, bf16, fp16"):
        export_checkpoint(run, tmp_path / "other", "int8")


def test_an_output_is_what_its_name_leads_to(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk" / "hf").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "hf")
    export_checkpoint(run, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "hf" / "model.safetensors").is_file()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for output in (Path(), tmp_path / "empty"):
        with pytest.raises(UsageError, match="the folder that you are in"):
            export_checkpoint(run, output)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "volume"))
    (tmp_path / "volume").mkdir()
    with pytest.raises(UsageError, match="a mount point"):
        export_checkpoint(run, tmp_path / "volume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "empty", "link", "volume"]


def test_the_card_names_the_checkpoint_where_the_path_does_not(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints" / "iter_0000100")
    export_checkpoint(Path(), tmp_path / "hf")
    assert "checkpoint `iter_0000100`" in (tmp_path / "hf" / "README.md").read_text()


LATEST = "checkpoints/latest_checkpointed_iteration.txt"
ITERATION = "checkpoints/iter_0000100"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: shutil.rmtree(run), "no such checkpoint folder"),
        (lambda run: (run / LATEST).unlink(), "holds no checkpoint"),
        (lambda run: (run / LATEST).write_text("release"), "release"),
        (lambda run: shutil.rmtree(run / ITERATION), "iter_0000100"),
        (lambda run: (run / ITERATION / "tpt.json").unlink(), "tpt.json"),
        (lambda run: cut(run / ITERATION / "tpt.json"), "not valid JSON"),
        (lambda run: (run / ITERATION / "tpt.json").write_text('{"format": 9}'), "format 9"),
        (lambda run: (run / ITERATION / "tpt.json").write_text('{"format": 1}'), "step"),
        (lambda run: (run / ITERATION / ".metadata").unlink(), ".metadata"),
        (lambda run: cut(run / ITERATION / ".metadata"), ".metadata"),
        (lambda run: (run / ITERATION / "__0_0.distcp").unlink(), "__0_0.distcp"),
        (lambda run: cut(run / ITERATION / "__0_0.distcp"), "damaged"),
        (lambda run: (run / ITERATION / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_damage_is_one_line_and_leaves_nothing(damaged: Path, tmp_path: Path, damage: Callable[[Path], Any], says: str) -> None:
    damage(damaged)
    with pytest.raises(CheckpointError) as error:
        export_checkpoint(damaged, tmp_path / "out" / "hf")
    assert says in one_line(error)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_metadata_runs_no_code(damaged: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    (damaged / ITERATION / ".metadata").write_bytes(b"cposix\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        export_checkpoint(damaged, tmp_path / "hf")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("key", "tensor", "says"),
    [
        ("decoder.layers.mlp.router.weight", torch.zeros(3, 4, 32), "no place for"),
        ("decoder.layers.mlp.linear_fc2.weight", None, "missing"),
        ("decoder.layers.mlp.linear_fc2.weight", torch.zeros(3, 32, 55), "shape"),
        ("embedding.word_embeddings.weight", torch.zeros(60, 32), "fewer than"),
        ("output_layer.weight", torch.zeros(64, 32), "shape"),
    ],
)
def test_keys_must_be_the_models(tmp_path: Path, key: str, tensor: Any, says: str) -> None:
    model = tiny_model()
    state = checkpoint_state(random_llama(model), model, padded_vocab=128)
    state.pop(key, None)
    if tensor is not None:
        state[key] = tensor
    write_checkpoint(tmp_path / "run", model, state)
    with pytest.raises(ConversionError) as error:
        export_checkpoint(tmp_path / "run", tmp_path / "hf")
    assert says in one_line(error)
    assert key in one_line(error)
