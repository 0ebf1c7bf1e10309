"""What megatron-core computes is what transformers computes from the export: the same losses on the same tokens.

The vocabulary is padded in the one and not in the other: rows of padding have no part in the loss.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys
from pathlib import Path
import numpy as np
from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.checkpoint import CheckpointWriter
from tpt_megatron.mcore.engine import Engine, MicroBatch

folder, kind = Path(sys.argv[1]), sys.argv[2]
tie = kind == "tied"
shape = {"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 112, "num_heads": 6, "num_query_groups": 2, "vocab_size": 201,
         "tie_embeddings": tie, "rope_theta": 5e5,
         "rope_scaling": {"factor": 8, "original_max_position_embeddings": 32} if tie else None}
if kind == "experts":
    shape |= {"qk_norm": True, "experts": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 56}}
config = check_config(TrainConfig, {"run_dir": "unused", "model": shape, "data": {"train": "unused", "sequence_length": 64, "attention": "sequence"},
    "optimizer": {"learning_rate": 1e-2}, "steps": 1, "global_batch_sequences": 2, "micro_batch_sequences": 2}, "test")
groups.join(config.parallel)
engine = Engine(config, 1)
rows = np.random.default_rng(0).integers(0, 201, (2, 65))
batch = MicroBatch(rows[:, :-1].copy(), rows[:, 1:].copy(), np.ones((2, 64), np.float32), np.zeros((2, 64), np.int32))
for _ in range(10):  # so that norms are no longer all ones
    engine.train_step([batch], 1e-2)
losses = engine.evaluate([batch])
description = {"tokens_seen": 0, "model": config.model.model_dump(mode="json"), "sequence_length": 64,
    "precision": "fp32", "arm": None, "tokenizer": None, "data": None}
writer = CheckpointWriter(engine, folder / "checkpoints")
writer.save(10, description, {})
writer.wait()
(folder / "theirs.json").write_text(json.dumps({"loss": losses.loss, "rows": rows.tolist()}))
groups.leave()
"""


@pytest.mark.parametrize("kind", ["tied", "untied", "experts"])
def test_losses_agree(tmp_path: Path, kind: str) -> None:
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from tpt_megatron.convert.export import export_checkpoint

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", CODE, str(tmp_path), kind], capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    expected = json.loads((tmp_path / "theirs.json").read_text())
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    rows = torch.tensor(expected["rows"])
    assert type(model).__name__ == ("Qwen3MoeForCausalLM" if kind == "experts" else "LlamaForCausalLM")
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    assert logits.size(-1) == 201
    loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert loss < 4.5, "the model has learnt nothing: agreement would say little"
    assert loss == pytest.approx(expected["loss"], abs=1e-5)
