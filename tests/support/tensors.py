"""Comparing what two runs ended with."""

from __future__ import annotations

from pathlib import Path

import torch

from tpt_megatron.convert.checkpoint_reader import CheckpointReader, find_checkpoint


def assert_same_tensors(run: Path, other: Path) -> None:
    """The latest checkpoints of both hold the same bits: weights and optimizer."""
    mine, theirs = (CheckpointReader(find_checkpoint(folder)) for folder in (run, other))
    assert mine.path.name == theirs.path.name
    assert mine.tensors == theirs.tensors
    assert any("exp_avg" in key for key in mine.tensors)
    for key in mine.tensors:
        assert torch.equal(mine.read(key), theirs.read(key)), key
