"""Values on a GPU against those of a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.byte_model import make_byte_model
from tpt_megatron.evaluate.likelihood import LanguageModel, choose_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-2), ("bfloat16", 1.0)])
def test_likelihoods_are_those_of_a_cpu(tmp_path: Path, dtype: str, apart: float) -> None:
    folder = make_byte_model(tmp_path / "model")
    draw = np.random.default_rng(0)
    asked = [(draw.integers(0, 257, 10 + 7 * number), 5 + number) for number in range(20)]
    assert choose_device("auto").type == "cuda"
    on_cpu = LanguageModel(folder, "float32", torch.device("cpu")).log_likelihoods(asked, 500)
    on_gpu = LanguageModel(folder, dtype, choose_device("cuda:0")).log_likelihoods(asked, 500)
    assert max(np.abs(one - other).max() for one, other in zip(on_cpu, on_gpu, strict=True)) < apart
