from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tpt_megatron.datasets import sidecar
from tpt_megatron.preprocess import dataset
from tpt_megatron.preprocess.dataset import DatasetWriter
from tpt_megatron.tokenizer import Tokenizer


def of_size(vocabulary: int) -> Tokenizer:
    words = {"<eod>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=words, unk_token="<eod>"))
    return Tokenizer(backend, "<eod>")


SMALL, LARGE = of_size(300), of_size(70_000)


def write(prefix: Path, tokenizer: Tokenizer, documents: list[list[int]]) -> None:
    with DatasetWriter(prefix, tokenizer) as writer:
        for number, ids in enumerate(documents):
            writer.add([(0, np.array(ids, np.int32))], str(number), None, None)
        writer.finish()


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE], ids=["uint16", "int32"])
@hypothesis_settings(max_examples=25)
@given(documents=st.lists(st.lists(st.integers(0, 299), max_size=20), min_size=1, max_size=20))
def test_bin_and_idx_are_byte_for_byte_megatrons_own(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, documents: list[list[int]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("dataset")
    write(folder / "ours", tokenizer, documents)
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(tokenizer.vocabulary_size))
    for ids in documents:
        builder.add_document([*ids, tokenizer.eod_id], [len(ids) + 1])  # as the builder takes it, through numpy.array
    builder.finalize(str(folder / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (folder / f"ours.{ending}").read_bytes() == (folder / f"theirs.{ending}").read_bytes()


def test_sidecars_tell_parts_and_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROWS_PER_GROUP", 2)
    prefix = tmp_path / "train"
    with DatasetWriter(prefix, SMALL) as writer:
        writer.add([(1, np.array([7, 8], np.int32)), (0, np.array([9], np.int32))], "a", "web", "g")
        writer.add([(0, np.array([9], np.int32))], "b", None, None)
        writer.add([(0, np.array([], np.int32))], "c", None, None)
        files = writer.finish()
    assert sorted(path.name for path in files) == sorted(path.name for path in tmp_path.iterdir())
    assert list(sidecar(prefix, "parts.bin").read_bytes()) == [1, 1, 0, 0, 0, 0, 0]
    table = pq.read_table(sidecar(prefix, "documents.parquet"))
    assert table.to_pylist() == [
        {"id": "a", "source": "web", "generator": "g", "tokens_document": 2, "tokens_thinking": 2},
        {"id": "b", "source": None, "generator": None, "tokens_document": 2, "tokens_thinking": 0},
        {"id": "c", "source": None, "generator": None, "tokens_document": 1, "tokens_thinking": 0},
    ]
    assert pq.ParquetFile(sidecar(prefix, "documents.parquet")).num_row_groups == 2
    assert (writer.counts.documents, writer.counts.tokens, writer.counts.tokens_document, writer.counts.tokens_thinking) == (3, 7, 5, 2)


@pytest.mark.parametrize("after_finish", [False, True])
def test_nothing_remains_after_an_error(tmp_path: Path, after_finish: bool) -> None:
    def fail() -> None:
        with DatasetWriter(tmp_path / "train", SMALL) as writer:
            writer.add([(0, np.array([1], np.int32))], "a", None, None)
            if after_finish:
                writer.finish()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []
