"""megatron-core's own readers on what preprocess writes: IndexedDataset, and GPTDataset, which trains on it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tpt_megatron.config.preprocess import PreprocessConfig
from tpt_megatron.datasets import open_dataset
from tpt_megatron.preprocess.runner import run_preprocess


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with open(tmp_path / "in.jsonl", "w") as file:
        for i in range(200):
            file.write(json.dumps({"text": f"document {i} " * (1 + i % 7), "thoughts": [{"text": f"thought {i}", "generator": "g"}]}) + "\n")
    run_preprocess(PreprocessConfig(input=(str(tmp_path / "in.jsonl"),), output=tmp_path / "out", tokenizer="byte", piece_megabytes=0.005))
    return tmp_path / "out/append/train"


def test_indexed_dataset_gives_every_sequence(prefix: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    theirs, ours = IndexedDataset(str(prefix)), open_dataset(prefix)
    assert len(theirs) == len(ours.lengths) == 200
    assert theirs.document_indices.tolist() == list(range(201))
    for i in range(200):
        assert np.array_equal(theirs[i], ours.tokens[ours.offsets[i] : ours.offsets[i + 1]])


def test_gpt_dataset_packs_them(prefix: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split
    ours = open_dataset(prefix)
    tokenizer = SimpleNamespace(vocab_size=257, eod=256, pad=-1, unique_identifiers={"name": "byte"})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([str(prefix)], None),
        split="1,0,0",
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "cache"),
    )
    numbers = np.arange(len(ours.lengths), dtype=np.int32)
    packed = GPTDataset(IndexedDataset(str(prefix)), str(prefix), numbers, None, Split.train, config)
    assert len(packed) == (len(ours.tokens) - 1) // 64
    seen = np.concatenate([packed[i]["tokens"].numpy() for i in range(len(packed))])
    # All tokens but those of the last incomplete sequence, in the dataset's own order of documents.
    assert np.count_nonzero(seen == 256) >= 195
    counts, all_counts = (np.bincount(tokens, minlength=257) for tokens in (seen, ours.tokens))
    assert (counts <= all_counts).all() and (all_counts - counts).sum() == len(ours.tokens) - 64 * len(packed)
    positions = packed[0]["position_ids"].numpy()
    ends = np.flatnonzero(packed[0]["tokens"].numpy() == 256)
    assert (positions[ends[ends < 63] + 1] == 0).all()
