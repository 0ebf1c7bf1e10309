"""Hugging Face to checkpoint and back: the same bits, the same config, the same files beside them, for every family."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.families import KEPT, configs, edit_config, edit_tensors, logits, random_model, save_model, tensors_of
from tpt_megatron.checkpoints import damages, read_checksums
from tpt_megatron.config.model import ModelConfig
from tpt_megatron.convert.checkpoint_reader import read_record
from tpt_megatron.convert.export import export_checkpoint
from tpt_megatron.convert.families import FAMILIES, family_of
from tpt_megatron.convert.hugging_face import model_of, read_config, written_config
from tpt_megatron.convert.importing import import_model
from tpt_megatron.errors import CheckpointError, ConversionError
from tpt_megatron.tokenizer import TokenizerLike, load_tokenizer, train_word_tokenizer


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def as_read(folder: Path) -> dict[str, Any]:
    """What transformers makes of config.json, without the folder's own name."""
    config: dict[str, Any] = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("case", configs())
def test_every_tensor_and_every_key_comes_back(case: str, spelling: int, tmp_path: Path) -> None:
    source = save_model(random_model(configs()[case]), tmp_path / "source", spelling=spelling)
    folder = import_model(source, tmp_path / "checkpoints")
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "export", shard_bytes=30_000)

    before, after = tensors_of(source), tensors_of(tmp_path / "export")
    assert len(list(source.glob("*.safetensors"))) > 2
    assert len(list((tmp_path / "export").glob("*.safetensors"))) > 2
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert same_bits(tensor, after[name]), name

    assert as_read(tmp_path / "export") == as_read(source)
    assert read_config(source).items() <= read_config(tmp_path / "export").items()
    for name, content in KEPT.items():
        assert (tmp_path / "export" / name).read_bytes() == content, name
    assert damages(folder, read_checksums(folder) or []) == []


@pytest.mark.parametrize("case", configs())
def test_the_checkpoint_says_which_model_it_is(case: str, tmp_path: Path) -> None:
    config = configs()[case]
    record = read_record(import_model(save_model(random_model(config), tmp_path / "source"), tmp_path / "checkpoints"))
    model, rope = record.model, config.rope_parameters
    assert (model.num_heads, model.num_query_groups, model.vocab_size) == (6, 2, config.vocab_size)
    assert (model.head_size, model.tie_embeddings, model.norm_epsilon) == (config.head_dim if "head_dim" in config.to_dict() else 8, *tied_and_epsilon(config))
    assert model.rope_theta == rope["rope_theta"]
    assert (model.rope_scaling is not None) == (case == "llama-tied-scaled")
    assert (model.qkv_bias, model.qk_norm, model.experts is not None) == ("qwen2" in case, "qwen3" in case, "moe" in case)
    assert (record.step, record.precision, record.sequence_length) == (0, "fp32", 256)


def tied_and_epsilon(config: Any) -> tuple[bool, float]:
    return config.tie_word_embeddings, config.rms_norm_eps


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a case, made at the first call; tests that change it copy it."""
    return cache(lambda case: save_model(random_model(configs()[case]), tmp_path_factory.mktemp("sources") / case))


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_smaller_type_is_rounded_once_and_stays(dtype: str, kind: torch.dtype, tmp_path: Path, sources: Any) -> None:
    source = sources("qwen2-tied")
    import_model(source, tmp_path / "checkpoints", dtype)
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "export")
    after = tensors_of(tmp_path / "export")
    for name, tensor in tensors_of(source).items():
        assert same_bits(tensor.to(kind), after[name]), name
    assert read_config(tmp_path / "export")["dtype"] == read_config(tmp_path / "export")["torch_dtype"] == str(kind).removeprefix("torch.")


def test_a_number_that_fp16_has_not_is_refused(tmp_path: Path, sources: Any) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(source, {name: tensors_of(source)[name].index_fill(0, torch.tensor([3]), -1e5)})
    with pytest.raises(ConversionError, match=f"{name} has numbers of up to 1e\\+05, beyond fp16's 65504; take bf16 or fp32"):
        import_model(source, tmp_path / "checkpoints", "fp16")
    import_model(source, tmp_path / "checkpoints")
    with pytest.raises(ConversionError, match=f"{name} has numbers of up to 1e"):
        export_checkpoint(tmp_path / "checkpoints", tmp_path / "export", "fp16")
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "export", "bf16")


def test_types_that_differ_need_one_to_be_named(tmp_path: Path, sources: Any) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    edit_tensors(source, {"model.norm.weight": tensors_of(source)["model.norm.weight"].bfloat16()})
    with pytest.raises(ConversionError, match="of several types, bf16, fp32; give --dtype"):
        import_model(source, tmp_path / "checkpoints")
    import_model(source, tmp_path / "checkpoints", "fp32")


def test_one_file_without_an_index_is_read_too(tmp_path: Path, sources: Any) -> None:
    source = Path(shutil.copytree(sources("qwen3"), tmp_path / "source"))
    edit_tensors(source, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})  # as the oldest folders have
    export_checkpoint(import_model(source, tmp_path / "checkpoints"), tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").is_file()
    after = tensors_of(tmp_path / "export")
    assert all(same_bits(tensor, after[name]) for name, tensor in tensors_of(sources("qwen3")).items())


def test_of_one_file_and_an_index_the_file_counts_as_in_transformers(tmp_path: Path, sources: Any) -> None:
    """A model that was saved anew into its folder leaves the old index and its files there."""
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    edit_tensors(source, {"model.norm.weight": torch.full((48,), 3.0)})
    for path in (*sources("llama").glob("*.safetensors"), sources("llama") / "model.safetensors.index.json"):
        shutil.copy(path, source)
    assert transformers.AutoModelForCausalLM.from_pretrained(source).model.norm.weight[0] == 3.0
    export_checkpoint(import_model(source, tmp_path / "checkpoints"), tmp_path / "export")
    assert tensors_of(tmp_path / "export")["model.norm.weight"][0] == 3.0


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_what_is_computed_has_no_say_in_the_type(kind: torch.dtype, tmp_path: Path, sources: Any) -> None:
    """Llama 2's folders have RoPE's frequencies beside weights of another type."""
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    weights = {name: tensor.half() for name, tensor in tensors_of(source).items()}
    edit_tensors(source, weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=kind)})
    export_checkpoint(import_model(source, tmp_path / "checkpoints"), tmp_path / "export")
    after = tensors_of(tmp_path / "export")
    assert after.keys() == weights.keys()
    assert all(same_bits(tensor, after[name]) for name, tensor in weights.items())


def test_a_tied_output_layer_may_be_there_as_a_copy_and_as_nothing_else(tmp_path: Path, sources: Any) -> None:
    source = Path(shutil.copytree(sources("qwen2-tied"), tmp_path / "source"))
    embedding = tensors_of(source)["model.embed_tokens.weight"]
    edit_tensors(source, {"lm_head.weight": embedding})
    export_checkpoint(import_model(source, tmp_path / "checkpoints"), tmp_path / "export")
    assert tensors_of(tmp_path / "export").keys() == tensors_of(sources("qwen2-tied")).keys()
    edit_tensors(source, {"lm_head.weight": embedding + 1})
    with pytest.raises(ConversionError, match=r"lm_head\.weight is not model\.embed_tokens\.weight.*tie_word_embeddings"):
        import_model(source, tmp_path / "other")


MODELS = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "head_dim": 12},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "qwen3_moe": {"qk_norm": True, "head_dim": 12, "experts": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, "aux_loss_coefficient": 0.0}},
}
SHAPE = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 80, "num_heads": 6, "num_query_groups": 2, "vocab_size": 131, "norm_epsilon": 2e-5}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_config_that_is_written_is_read_as_the_same_model(model_type: str, scaled: bool, tied: bool, tmp_path: Path) -> None:
    scaling = {"factor": 4.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 64} if scaled else None
    values = SHAPE | MODELS[model_type] | {"rope_theta": 2e6, "rope_scaling": scaling, "tie_embeddings": tied, "init_std": 0.01}
    model = ModelConfig.model_validate(values)
    family = family_of(model)
    assert family.model_type == model_type
    written = written_config(family, model, positions=128, dtype=torch.float32, eod_id=5)
    found_family, found = model_of(written, tmp_path / "config.json")
    assert found_family is family
    # Of a mixture the width of the MLP that no layer has is not asked for; head_dim may be spelled out.
    assert found.model_copy(update={"head_dim": model.head_dim}) == model
    assert found.head_size == model.head_size
    (tmp_path / "config.json").write_text(json.dumps(written))
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (6 * model.head_size, 48)
    assert theirs.config.eos_token_id == 5
    assert theirs.config.rope_parameters["rope_theta"] == 2e6


def test_a_bit_that_flipped_since_is_found_and_nothing_is_left(tmp_path: Path, sources: Any) -> None:
    """torch reads it as another number."""
    folder = import_model(sources("llama"), tmp_path / "checkpoints")
    for name in ("__0_0.distcp", "hugging_face.tokenizer.json"):
        whole = (folder / name).read_bytes()
        middle = len(whole) // 2
        (folder / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(CheckpointError, match=f"{name}: the file is damaged: its SHA-256 is not the one in checksums.json; export another one"):
            export_checkpoint(folder, tmp_path / "export")
        (folder / name).write_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    export_checkpoint(folder, tmp_path / "export")


def test_a_mistral_stays_one_and_a_llama_too(tmp_path: Path, sources: Any) -> None:
    for case in ("llama", "mistral"):
        export_checkpoint(import_model(sources(case), tmp_path / case), tmp_path / f"{case}-out")
        assert read_config(tmp_path / f"{case}-out")["model_type"] == case
    record = read_record(tmp_path / "mistral" / "iter_0000000")
    assert family_of(record.model.model_copy(update={"qkv_bias": True}), "mistral") is FAMILIES["qwen2"]


def test_what_no_family_has_together_is_said_by_key() -> None:
    for changes in ({"qk_norm": True, "qkv_bias": True}, {"experts": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}}, {"mtp_layers": 1}):
        with pytest.raises(ConversionError) as error:
            family_of(ModelConfig.model_validate(SHAPE | changes))
        assert all(key.removesuffix("s") in str(error.value) for key in changes)


def name_tokenizer(checkpoint: Path, made: TokenizerLike) -> None:
    """Write into a checkpoint which tokenizer made the data that it was trained on."""
    named = {"fingerprint": made.fingerprint, "end_of_document": made.end_of_document, "eod_id": made.eod_id, "vocabulary_size": made.vocabulary_size}
    path = checkpoint / "tpt.json"
    (checkpoint / "checksums.json").unlink()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": named}))


def test_code_that_stays_behind_is_not_asked_for(tmp_path: Path, sources: Any) -> None:
    """A source's own classes lie in files that no conversion takes along."""
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    edit_config(source, auto_map={"AutoConfig": "configuration_mine.MineConfig"})
    export_checkpoint(import_model(source, tmp_path / "checkpoints"), tmp_path / "export")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "export", trust_remote_code=True).model_type == "llama"


def test_generation_config_is_made_where_the_source_has_none(tmp_path: Path, sources: Any) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    (source / "generation_config.json").unlink()
    edit_config(source, eos_token_id=[2, 7])
    export_checkpoint(import_model(source, tmp_path / "checkpoints"), tmp_path / "export")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "export")
    assert (found.bos_token_id, found.eos_token_id) == (1, [2, 7])


def test_another_tokenizer_than_the_sources_takes_its_place(tmp_path: Path, sources: Any) -> None:
    """What was trained on another tokenizer's tokens must not be given the source's chat template, nor end where the source did."""
    folder = import_model(sources("llama"), tmp_path / "checkpoints")
    made = train_word_tokenizer([], [f"w{i}" for i in range(99)], "<end>")
    made.save(folder / "tokenizer.json")
    name_tokenizer(folder, made)
    export_checkpoint(folder, tmp_path / "export")
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "export" / name).read_text())["eos_token_id"] == made.eod_id, name


TEXT = "the cat sat on the mat and then it ran under a small tree while the dog was asleep"


def write_sentencepiece(path: Path) -> TokenizerLike:
    """Make a SentencePiece model as Llama 2's is, but without a BOS."""
    sentencepiece = pytest.importorskip("sentencepiece")
    options = {"sentence_iterator": iter([TEXT] * 50), "model_type": "bpe", "vocab_size": 300, "hard_vocab_limit": False, "byte_fallback": True}
    llamas = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "bos_id": -1}
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(model_writer=file, **options, **llamas, minloglevel=2)
    return load_tokenizer(str(path), "</s>")


@pytest.mark.parametrize(
    ("step", "arm", "says", "does_not_say"),
    [
        (0, None, "not trained by it", "base model"),
        (5, "append", "Trained from an imported model", "A base model"),
        (5, "chat", "Tuned on chats", "without a beginning-of-sequence"),
    ],
)
def test_the_card_says_no_more_of_an_imported_model_than_is_known(
    step: int, arm: str | None, says: str, does_not_say: str, tmp_path: Path, sources: Any
) -> None:
    """It may have been tuned to follow instructions, with a beginning-of-sequence token."""
    folder = import_model(sources("llama"), tmp_path / "checkpoints")
    (folder / "checksums.json").unlink()
    (folder / "tpt.json").write_text(json.dumps(json.loads((folder / "tpt.json").read_text()) | {"step": step, "arm": arm}))
    export_checkpoint(folder, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert says in card
    assert does_not_say not in card


def test_a_sentencepiece_model_is_read_as_what_it_is(tmp_path: Path, sources: Any) -> None:
    """Without a tokenizer_config.json transformers splits words otherwise than SentencePiece does, and puts a BOS first."""
    folder = import_model(sources("llama"), tmp_path / "checkpoints")
    made = write_sentencepiece(folder / "tokenizer.model")
    name_tokenizer(folder, made)
    export_checkpoint(folder, tmp_path / "export")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for asked in (TEXT, "two  spaces\nand a line", "4é2", ""):
        assert found(asked).input_ids == made.encode(asked)
    assert (found.eos_token_id, len(found)) == (made.eod_id, made.vocabulary_size)


def test_data_may_be_made_with_either_form_of_the_sources_tokenizer(tmp_path: Path, sources: Any) -> None:
    """Llama 2's folders have tokenizer.json and tokenizer.model."""
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    made = write_sentencepiece(source / "tokenizer.model")
    folder = import_model(source, tmp_path / "checkpoints")
    name_tokenizer(folder, made)
    shutil.copy(source / "tokenizer.model", folder)
    export_checkpoint(folder, tmp_path / "export")
    for name in (*KEPT, "tokenizer.model"):
        assert (tmp_path / "export" / name).read_bytes() == (source / name).read_bytes(), name


def test_the_same_tokenizer_brings_the_sources_files(tmp_path: Path, sources: Any) -> None:
    folder = import_model(sources("llama"), tmp_path / "checkpoints")
    made = load_tokenizer("byte", "<|endoftext|>")
    name_tokenizer(folder, made)
    export_checkpoint(folder, tmp_path / "export")
    for name, content in KEPT.items():
        assert (tmp_path / "export" / name).read_bytes() == content, name
    assert read_config(tmp_path / "export")["eos_token_id"] == 2


def test_longer_sequences_are_positions_and_another_rope_forgets_the_sources(tmp_path: Path, sources: Any) -> None:
    folder = import_model(sources("qwen3"), tmp_path / "checkpoints")
    record = json.loads((folder / "tpt.json").read_text())
    (folder / "checksums.json").unlink()
    tried = [({"sequence_length": 999}, {}, 999), ({"sequence_length": 64}, {}, 256), ({"sequence_length": 64}, {"rope_theta": 7e6}, 64)]
    for number, (changes, model, positions) in enumerate(tried):
        (folder / "tpt.json").write_text(json.dumps(record | changes | {"model": record["model"] | model}))
        export_checkpoint(folder, out := tmp_path / f"export{number}")
        config = read_config(out)
        assert (config["max_position_embeddings"], config["rope_theta"]) == (positions, model.get("rope_theta", 1_000_000.0))


def test_transformers_computes_the_same_of_both(tmp_path: Path, sources: Any) -> None:
    tokens = torch.arange(2 * 40).view(2, 40) * 7 % 257
    for case in ("llama-tied-scaled", "qwen3_moe"):
        export_checkpoint(import_model(sources(case), tmp_path / case), tmp_path / f"{case}-out", shard_bytes=40_000)
        folders = (sources(case), tmp_path / f"{case}-out")
        before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval() for folder in folders)
        assert torch.equal(logits(before, tokens), logits(after, tokens))


def test_spellings_that_disagree_are_refused(tmp_path: Path, sources: Any) -> None:
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    edit_config(source, rope_theta=999.0)
    with pytest.raises(ConversionError, match="say different things"):
        import_model(source, tmp_path / "checkpoints")


def test_a_base_of_rope_beside_its_scaling_counts(tmp_path: Path, sources: Any) -> None:
    """transformers 5 takes rope_scaling as its rope_parameters, 4.57 takes the scaling alone."""
    source = Path(shutil.copytree(sources("llama"), tmp_path / "source"))
    edit_config(source, "rope_parameters", rope_scaling={"rope_type": "default", "rope_theta": 777.0})
    assert transformers.AutoConfig.from_pretrained(source).rope_parameters["rope_theta"] == 777.0
    _, model = model_of(read_config(source), source / "config.json")
    assert model.rope_theta == 777.0
    edit_config(source, rope_theta=10_000.0)
    with pytest.raises(ConversionError, match="say different things"):
        model_of(read_config(source), source / "config.json")


_QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "vocab_size": 151_936, "use_sliding_window": False, "initializer_range": 0.02}
_LLAMA_3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
PUBLISHED = {
    "llama-3.2-1b": {
        **{"model_type": "llama", "attention_bias": False, "mlp_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048},
        **{"intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1},
        **{"rms_norm_eps": 1e-05, "rope_scaling": _LLAMA_3, "rope_theta": 500_000.0, "tie_word_embeddings": True, "vocab_size": 128_256},
    },
    "qwen2.5-1.5b": {
        **_QWEN,
        **{"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "max_window_layers": 28, "num_attention_heads": 12},
        **{"num_hidden_layers": 28, "num_key_value_heads": 2, "sliding_window": 131_072, "tie_word_embeddings": True, "use_mrope": False},
    },
    "qwen3-0.6b": {
        **_QWEN,
        **{"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28},
        **{"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None, "sliding_window": None},
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        **_QWEN,
        **{"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144},
        **{"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
    },
}
"""As config.json of the models themselves spells them, without what is of tokens and types."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_config_is_the_preset_of_its_name(preset: str) -> None:
    """So that a run that names the preset can start from the imported model."""
    _, found = model_of(PUBLISHED[preset], Path("config.json"))
    expected = ModelConfig.model_validate(preset)
    assert found.model_dump() | {"head_dim": found.head_size} == expected.model_dump() | {"head_dim": expected.head_size}
