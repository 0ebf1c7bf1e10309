import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_kernels_that_are_installed_for_cuda_are_left_alone(tmp_path: Path) -> None:
    for name in ("transformer_engine", "apex"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    code = "from megatron.core.optimizer import clip_grads; from tpt_megatron.mcore import engine"  # in whichever order
    ended = subprocess.run([sys.executable, "-c", f"import tpt_megatron.mcore; {code}"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
