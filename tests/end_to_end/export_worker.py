"""Trains a small model for ten steps through the engine, saves it, and writes the loss that it then has. Started by tests."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.checkpoint import CheckpointWriter
from tpt_megatron.mcore.engine import Engine, MicroBatch

VOCABULARY, SEQUENCE, BATCH, STEPS = 201, 64, 2, 10


def main() -> None:
    """argv: a folder, for checkpoints/ and theirs.json; what the config has besides, as JSON: `model` at least."""
    folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
    values: dict[str, Any] = {
        "run_dir": "unused",
        "data": {"train": "unused", "sequence_length": SEQUENCE, "attention": "sequence"},
        "optimizer": {"learning_rate": 1e-2},
        "steps": STEPS,
        "global_batch_sequences": BATCH,
        "micro_batch_sequences": BATCH,
    }
    config = check_config(TrainConfig, values | changes, "test")
    groups.join(config.parallel)
    engine = Engine(config, 1)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, SEQUENCE + 1))
    shape = (BATCH, SEQUENCE)
    batch = MicroBatch(rows[:, :-1].copy(), rows[:, 1:].copy(), np.ones(shape, np.float32), np.zeros(shape, np.int32))
    for _ in range(STEPS):  # so that norms are no longer all ones
        engine.train_step([batch], 1e-2)
    losses = engine.evaluate([batch])
    of_model = {"model": config.model.model_dump(mode="json"), "sequence_length": SEQUENCE, "precision": config.precision}
    writer = CheckpointWriter(engine, folder / "checkpoints")
    writer.save(STEPS, {"tokens_seen": 0, "arm": None, "tokenizer": None, "data": None} | of_model, {})
    writer.wait()
    (folder / "theirs.json").write_text(json.dumps({"loss": losses.loss, "rows": rows.tolist()}))
    groups.leave()


if __name__ == "__main__":
    main()
