from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from tests.support.byte_model import make_byte_model
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.evaluate.likelihood import LanguageModel, batches, choose_device, fingerprint, model_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel(folder, "float32", CPU)


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder)


def by_hand(reference: LlamaForCausalLM, ids: np.ndarray, wanted: int) -> np.ndarray:  # type: ignore[type-arg]
    with torch.no_grad():
        logits = reference(torch.from_numpy(ids)[None]).logits[0].double()
    return np.array([float(torch.log_softmax(logits[at - 1], 0)[ids[at]]) for at in range(len(ids) - wanted, len(ids))])


sequences = st.lists(st.lists(st.integers(0, 256), min_size=2, max_size=40), min_size=1, max_size=8)


@settings(max_examples=20)
@given(sequences, st.integers(1, 100), st.data())
def test_values_are_the_models_whatever_the_batches_are(
    reference: LlamaForCausalLM, model: LanguageModel, lists: list[list[int]], room: int, data: st.DataObject
) -> None:
    asked = [(np.array(ids, np.int64), data.draw(st.integers(1, len(ids) - 1))) for ids in lists]
    advanced: list[int] = []
    found = model.log_likelihoods(asked, room, advanced.append)
    assert sum(advanced) == len(asked)
    for (ids, wanted), values in zip(asked, found, strict=True):
        assert len(values) == wanted
        assert np.abs(values - by_hand(reference, ids, wanted)).max() < 1e-4


def test_logits_are_in_slices_where_a_target_is_long(reference: LlamaForCausalLM, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, 257, 100)
    whole = model.log_likelihoods([(ids, 90)], 1)[0]
    monkeypatch.setattr("tpt_megatron.evaluate.likelihood.ROWS_AT_ONCE", 7)
    assert np.array_equal(whole, model.log_likelihoods([(ids, 90)], 1)[0])
    assert np.abs(whole - by_hand(reference, ids, 90)).max() < 1e-4


def test_bfloat16_is_near(folder: Path, model: LanguageModel) -> None:
    ids = np.random.default_rng(0).integers(0, 257, 60)
    exact, rough = (model.log_likelihoods([(ids, 50)], 100)[0] for model in (model, LanguageModel(folder, "bfloat16", CPU)))
    assert 0 < np.abs(exact - rough).max() < 1
    assert rough.dtype == np.float32


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_hold_every_sequence_once_and_no_more_than_they_may(lengths: list[int], room: int) -> None:
    made = list(batches(lengths, room))
    assert sorted(number for batch in made for number in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= room


def test_what_does_not_fit_is_refused_in_a_line(folder: Path, model: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has 257 ids and the texts have 300; they are of another tokenizer"):
        model.log_likelihoods([(np.array([1, 300]), 1)], 10)
    with pytest.raises(DataError, match="not a Hugging Face model folder"):
        fingerprint(tmp_path)
    with pytest.raises(DataError, match="the model cannot be loaded"):
        LanguageModel(tmp_path, "float32", CPU)
    if torch.cuda.device_count() < 9:
        with pytest.raises(ConfigError, match="device=cuda:8: this machine has"):
            choose_device("cuda:8")
    assert choose_device("cpu") == CPU
    with pytest.raises(DataError, match="its tokenizer cannot be loaded"):
        model_tokenizer(tmp_path)


def test_the_fingerprint_is_of_weights_and_config(folder: Path, tmp_path: Path) -> None:
    same = make_byte_model(tmp_path / "same")
    assert fingerprint(same) == fingerprint(folder)
    assert fingerprint(make_byte_model(tmp_path / "other", seed=1)) != fingerprint(folder)
    (same / "config.json").write_text((same / "config.json").read_text().replace('"rms_norm_eps"', '"rms_norm_eps_"'))
    assert fingerprint(same) != fingerprint(folder)
    tokenizer = model_tokenizer(folder)
    assert (tokenizer.end_of_document, tokenizer.decode(tokenizer.encode("añb"))) == ("<|endoftext|>", "añb")
