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

from tests.support.datasets import write_dataset
from tpt_megatron.datasets import SOURCE_DTYPE, sidecar, token_dtype
from tpt_megatron.errors import DataError
from tpt_megatron.preprocess import dataset, joining
from tpt_megatron.preprocess.dataset import PartWriter, Row, SourceNumbers
from tpt_megatron.preprocess.pieces import SpooledIds
from tpt_megatron.tokenizer import Tokenizer


def of_size(vocabulary: int) -> Tokenizer:
    words = {"<eod>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=words, unk_token="<eod>"))
    return Tokenizer(backend, "<eod>")


SMALL, LARGE = of_size(300), of_size(70_000)


@pytest.mark.parametrize("tokenizer", [SMALL, LARGE], ids=["uint16", "int32"])
@hypothesis_settings(max_examples=25)
@given(data=st.data(), documents=st.lists(st.lists(st.integers(0, 299), max_size=20), min_size=1, max_size=20))
def test_bin_and_idx_are_byte_for_byte_megatrons_own(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, data: st.DataObject, documents: list[list[int]]
) -> None:
    """Whatever the parts, and with sequences left out, as megatron-core's own builder writes the ids."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    cuts = sorted(data.draw(st.lists(st.integers(0, len(documents)), max_size=3)))
    kept = data.draw(st.none() | st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)))
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder / "ours", tokenizer, [([(0, ids)], str(number), None, None) for number, ids in enumerate(documents)], cuts, kept)
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(tokenizer.vocabulary_size))
    for number, ids in enumerate(documents):
        if kept is None or kept[number]:
            builder.add_document([*ids, tokenizer.eod_id], [len(ids) + 1])  # as the builder takes it, through numpy.array
    builder.finalize(str(folder / "theirs.idx"))
    for ending in ("bin", "idx"):
        assert (folder / f"ours.{ending}").read_bytes() == (folder / f"theirs.{ending}").read_bytes()


THREE = [
    ([(1, [7, 8]), (0, [9])], "a", "web", "g"),
    ([(0, [9])], "b", None, None),
    ([(0, [])], "c", "web", None),
]


@pytest.mark.parametrize("cuts", [[], [1], [0, 2, 3]])
def test_sidecars_tell_parts_sources_and_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: list[int]) -> None:
    monkeypatch.setattr(joining, "ROWS_PER_GROUP", 2)
    prefix = tmp_path / "train"
    made = write_dataset(prefix, SMALL, THREE, cuts)
    assert sorted(entry.name for entry in made.outputs) == sorted(path.name for path in tmp_path.iterdir())
    assert {entry.name: entry.bytes for entry in made.outputs} == {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert list(sidecar(prefix, "parts.bin").read_bytes()) == [1, 1, 0, 0, 0, 0, 0]
    table = pq.read_table(sidecar(prefix, "documents.parquet"))
    assert table.to_pylist() == [
        {"id": "a", "sample": 0, "source": "web", "generator": "g", "tokens_document": 2, "tokens_thinking": 2, "offset": 0},
        {"id": "b", "sample": 0, "source": None, "generator": None, "tokens_document": 2, "tokens_thinking": 0, "offset": 4},
        {"id": "c", "sample": 0, "source": "web", "generator": None, "tokens_document": 1, "tokens_thinking": 0, "offset": 6},
    ]
    assert pq.ParquetFile(sidecar(prefix, "documents.parquet")).num_row_groups == 2
    assert made.sources == ["web", None]
    assert np.fromfile(sidecar(prefix, "sources.bin"), SOURCE_DTYPE).tolist() == [0, 1, 0]
    assert (made.counts.sequences, made.counts.tokens, made.counts.by_part) == (3, 7, {0: 5, 1: 2})


def test_where_the_parts_were_cut_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "ROWS_PER_GROUP", 4)
    many = [([(0, [i % 7] * (i % 5)), (1, [1] * (i % 3))], f"d{i}", f"s{i % 4}", None) for i in range(30)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = write_dataset(tmp_path / "a/train", SMALL, many)
    cut = write_dataset(tmp_path / "b/train", SMALL, many, [1, 9, 9, 22])
    assert whole.outputs == cut.outputs


@given(runs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12)), min_size=1, max_size=30), at_once=st.integers(1, 10))
def test_runs_become_a_byte_a_token_however_they_are_cut(runs: list[tuple[int, int]], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "NUMBERS_AT_ONCE", at_once)
        blocks = list(joining._marks(np.array(runs, dataset.RUN)))
    assert b"".join(blocks) == b"".join(bytes([part]) * tokens for part, tokens in runs)
    assert all(len(block) <= at_once for block in blocks)


def test_left_out_sequences_leave_no_trace(tmp_path: Path) -> None:
    many = [([(0, [i % 7] * (i % 5)), (1, [1] * (i % 3))], f"d{i}", f"s{i % 4}", None) for i in range(30)]
    kept = [i % 4 != 0 and not 10 < i < 15 for i in range(30)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    left = write_dataset(tmp_path / "a/train", SMALL, many, [7, 11], kept)
    only = write_dataset(tmp_path / "b/train", SMALL, [one for one, stays in zip(many, kept, strict=True) if stays])
    assert left.outputs == only.outputs
    assert (left.sources, left.counts) == (only.sources, only.counts)
    assert None not in left.sources


def test_a_long_sequence_is_written_as_a_short_one_is(tmp_path: Path) -> None:
    ids = np.arange(250, dtype=np.uint32)
    ids.tofile(tmp_path / "spool")
    for name, document in (("long", SpooledIds(tmp_path / "spool", 0, 250)), ("short", ids)):
        with PartWriter(tmp_path / name, np.dtype(np.uint16), 0, SourceNumbers(), ordinals=True) as writer:
            segments = [(0, document[:100]), (1, ids[:3]), (0, document[100:250])]
            row = Row("a", 0, None, None, 5)
            writer.add_long(segments, row) if name == "long" else writer.add(segments, row)
    for path in tmp_path.glob("long.*"):
        assert path.read_bytes() == path.with_name(path.name.replace("long", "short")).read_bytes()
    assert len(list(tmp_path.glob("long.*"))) == 6


def test_too_many_sources_and_too_long_a_sequence_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = SourceNumbers()
    for i in range(65536):
        numbers.number(str(i))
    with pytest.raises(DataError, match="more than 65,536 different sources"):
        numbers.number("another")
    assert numbers.number("65535") == 65535
    monkeypatch.setattr(dataset, "_LONGEST_SEQUENCE", 3)
    with pytest.raises(DataError, match="document 'a' has 4 tokens"):
        write_dataset(tmp_path / "train", SMALL, [([(0, [1, 2, 3])], "a", None, None)])


def test_nothing_remains_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(joining, "_write_index", fail)
    with pytest.raises(OSError, match="No space left"):
        write_dataset(tmp_path / "train", SMALL, THREE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_flushed_is_removed_all_the_same(tmp_path: Path) -> None:
    file = joining._Hashed(tmp_path / "train.bin")
    file._file.close()
    file._file = open("/dev/full", "wb")  # noqa: SIM115 - closed by abandon
    file.write(b"some bytes that are buffered")
    file.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runs_at_once", [1, 3, 1000])
def test_runs_are_read_in_blocks_with_and_without_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_at_once: int) -> None:
    monkeypatch.setattr(joining, "RUNS_AT_ONCE", runs_at_once)
    many = [([(0, [i % 7] * (i % 5)), (1, [1] * (i % 3))], f"d{i}", None, None) for i in range(30)]
    kept = [i % 3 != 1 for i in range(30)]
    write_dataset(tmp_path / "train", SMALL, many, [7], kept)
    parts = [part for (segments, *_), stays in zip(many, kept, strict=True) if stays for part, ids in [*segments, (0, [0])] for _ in ids]
    assert list(sidecar(tmp_path / "train", "parts.bin").read_bytes()) == parts


def test_the_dtype_is_megatrons() -> None:
    assert (token_dtype(65499), token_dtype(65500)) == (np.uint16, np.int32)
