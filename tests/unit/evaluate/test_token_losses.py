from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.token_files import write_token_files
from tpt_megatron.datasets import open_dataset
from tpt_megatron.errors import DataError
from tpt_megatron.evaluate import token_losses as module
from tpt_megatron.evaluate.hard_tokens import GROUPS, difficulty, summarise
from tpt_megatron.evaluate.token_losses import Documents, choose_documents, positions_of, token_losses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Documents of 1 to 20 tokens and one that is empty; each has a thought of two tokens before it, and one of two sources."""
    sequences = [([i + j for j in range(i)], [200, 201] if i else [], f"source {i % 2}") for i in range(18)]
    write_token_files(tmp_path / "data", sequences)
    return tmp_path / "data"


def test_documents_are_taken_evenly_with_what_each_token_is(prefix: Path) -> None:
    dataset = open_dataset(prefix)
    everything = choose_documents(dataset, 0, 1000)
    assert np.unique(everything.document).tolist() == list(range(1, 18))  # the first is empty
    chosen = choose_documents(dataset, 3, 10)
    assert np.unique(chosen.document).tolist() == [1, 9, 17]
    assert [len(tokens) for tokens in chosen.whole] == [4, 10, 10]
    assert chosen.cut == 2
    at = chosen.document == 9
    assert chosen.position[at].tolist() == list(range(1, 10))
    assert chosen.token[at].tolist() == [201, *range(9, 17)]
    assert chosen.part[at].tolist() == [1] + [0] * 8
    assert [chosen.sources[number] for number in chosen.source[at]] == ["source 1"] * 9


def test_losses_are_those_of_each_document_by_itself(model: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = choose_documents(open_dataset(prefix), 0, 15)
    alone = LlamaForCausalLM.from_pretrained(model)
    expected = []
    with torch.no_grad():
        for tokens in documents.whole:
            ids = torch.from_numpy(tokens)[None]
            expected += torch.nn.functional.cross_entropy(alone(ids).logits[0, :-1], ids[0, 1:], reduction="none").tolist()
    advanced: list[int] = []
    for room in (1, 3 * 4 * 257 * 40, 1 << 28):  # batches of one document, of a few, and one of all
        monkeypatch.setattr(module, "LOGITS_BYTES", room)
        advanced.clear()
        found = token_losses(model, documents, "float32", advanced.append)
        assert np.abs(found - expected).max() < 2e-5
        assert sum(advanced) == len(documents.whole)
    assert len(advanced) == 1


def test_a_model_of_fewer_ids_is_refused(model: Path, tmp_path: Path) -> None:
    write_token_files(tmp_path / "data", [([255, 300, 4], [], None)], "int32")
    with pytest.raises(DataError, match="it has 257 ids and the texts have 300; they are of another tokenizer"):
        token_losses(model, choose_documents(open_dataset(tmp_path / "data"), 0, 64), "float32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: the model cannot be loaded"):
        token_losses(tmp_path / "empty", choose_documents(open_dataset(tmp_path / "data"), 0, 64), "float32")


@given(arrays(np.float32, st.integers(1, 200), elements=st.sampled_from([0.0, 0.5, 1.0, 7.0])))
def test_groups_are_of_equal_size_and_rise_with_the_loss(losses: np.ndarray) -> None:  # type: ignore[type-arg]
    group = difficulty(losses)
    sizes = np.bincount(group, minlength=GROUPS)
    assert len(sizes) == GROUPS
    assert sizes.max() - sizes.min() <= 1
    groups = [losses[group == number] for number in np.unique(group)]
    assert all(low.max() <= high.min() for low, high in pairwise(groups))


def test_what_was_learned_and_not_kept_is_counted_where_it_is() -> None:
    part, source = np.array([0, 0, 0, 1, 1, 1], np.uint8), np.array([0, 0, 1, 1, 1, 1], np.uint16)
    token = np.array([5, 5, 6, 7, 7, 8])
    nothing = np.zeros(6, np.int64)
    documents = Documents(nothing, nothing.astype(np.int32), token, part, source, ["web", None], [nothing], 0)
    losses = {"base": np.array([2.0, 3.0, 0.5, 4.0, 0.2, 1.0], np.float32), "arm": np.array([0.5, 3.5, 0.4, 0.9, 1.2, 0.1], np.float32)}
    found = summarise(documents, losses, "base", 1.0)
    assert found["means"]["all"]["all"] == {"tokens": 6, "base": pytest.approx(10.7 / 6), "arm": pytest.approx(6.6 / 6)}
    assert found["means"]["part"]["thinking"] == {"tokens": 3, "base": pytest.approx(5.2 / 3), "arm": pytest.approx(2.2 / 3)}
    assert found["means"]["source"]["(none)"]["tokens"] == 4
    # Not learned by base: tokens 0, 1, 3, 5. The arm has 0, 3 and 5. Of 2 and 4, which base has, the arm lost 4.
    assert found["learned"]["all"]["all"]["arm"] == {"learned": 0.75, "forgotten": 0.5}
    assert found["learned"]["part"]["document"]["arm"] == {"learned": 0.5, "forgotten": 0.0}
    assert found["learned"]["source"]["web"]["arm"] == {"learned": 0.5, "forgotten": None}
    assert [(row["id"], row["tokens"]) for row in found["lowered"]["arm"]] == [(7, 2), (5, 2), (8, 1), (6, 1)]
    assert found["lowered"]["arm"][0]["nats"] == pytest.approx(2.1)
    assert found["means"]["difficulty"]["9"] == {"tokens": 1, "base": 4.0, "arm": pytest.approx(0.9)}  # six tokens in ten groups: some have none


@pytest.mark.parametrize(("config", "says"), [('{"model_type": "bloom"}', "does not say how many tokens it reads"), ("{", "config.json cannot be read")])
def test_a_model_that_does_not_say_what_it_reads_is_told(tmp_path: Path, config: str, says: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(DataError, match=says):
        positions_of(tmp_path)
