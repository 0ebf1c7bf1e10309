"""Token datasets made from given ids, by the writer that preprocess uses: parts are written, then joined."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from tpt_megatron.datasets import token_dtype
from tpt_megatron.preprocess.dataset import PartWriter, Row, SourceNumbers
from tpt_megatron.preprocess.joining import DatasetJoin, JoinedDataset, Part
from tpt_megatron.tokenizer import TokenizerLike

TrainingSequence = tuple[list[tuple[int, list[int]]], str, str | None, str | None]
"""(segments, id, source, generator)"""


def write_dataset(
    prefix: Path, tokenizer: TokenizerLike, sequences: Sequence[TrainingSequence], cuts: Sequence[int] = (), kept: Sequence[bool] | None = None
) -> JoinedDataset:
    """Write PREFIX.*, without a manifest, in parts that are cut before sequences `cuts`; `kept` says which of the sequences stay."""
    dtype = token_dtype(tokenizer.vocabulary_size)
    with tempfile.TemporaryDirectory(dir=prefix.parent) as folder:
        parts = []
        for number, (begin, end) in enumerate(pairwise([0, *cuts, len(sequences)])):
            stem, sources = Path(folder) / f"{number}.part", SourceNumbers()
            with PartWriter(stem, dtype, tokenizer.eod_id, sources, ordinals=kept is not None) as writer:
                for ordinal, (segments, identity, source, generator) in enumerate(sequences[begin:end]):
                    writer.add([(part, np.array(ids, np.uint32)) for part, ids in segments], Row(identity, 0, source, generator, ordinal))
                    if ordinal % 3 == 2:
                        writer.flush()
            parts.append(Part(stem, sources.names, None if kept is None else np.array(kept[begin:end], np.bool_)))
        join = DatasetJoin(prefix, dtype, tokenizer.file_name, tokenizer.to_bytes())
        try:
            for part in parts:
                for step in join.steps(part, is_only=len(parts) == 1):
                    step()
            dataset = join.close()
        except BaseException:
            join.discard()
            raise
    dataset.rename()
    return dataset
