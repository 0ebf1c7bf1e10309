"""One rank of a parity run: fixed data through the engine, losses written by rank 0. Started by torchrun from the tests."""

import json
import sys
from pathlib import Path

import numpy as np

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.checkpoint import CheckpointWriter, load_checkpoint
from tpt_megatron.mcore.engine import Engine, MicroBatch

VOCABULARY, SEQUENCE, GLOBAL_BATCH, KINDS = 250, 32, 8, 4
WEIGHT_OF_DOCUMENT = 0.3


def micro_batches(config: TrainConfig, rank: int, ranks: int) -> list[MicroBatch]:
    """This rank's sequences of a step: each is a function of its number alone. Two documents each, parts alternate and weigh differently."""
    share, micro = GLOBAL_BATCH // ranks, config.micro_batch_sequences
    return [micro_batch(config, range(first, first + micro)) for first in range(rank * share, (rank + 1) * share, micro)]


def micro_batch(config: TrainConfig, numbers: range) -> MicroBatch:
    # The same eight sequences every step, so that there is something to learn.
    rows = np.stack([np.random.default_rng(number).integers(0, VOCABULARY, SEQUENCE + 1) for number in numbers])
    places, number = np.arange(SEQUENCE), np.array(numbers)[:, None]
    parts = np.broadcast_to(places % 3 == 0, (len(numbers), SEQUENCE))
    return MicroBatch(
        tokens=rows[:, :-1].copy(),
        labels=rows[:, 1:].copy(),
        weights=np.where(parts, 1.0, WEIGHT_OF_DOCUMENT).astype(np.float32),
        kinds=(parts + 2 * (number % 2)).astype(np.int32),  # two parts of two sources
        documents=(places >= 5 + number).astype(np.int32) if config.data.attention == "document" else None,
    )


def main() -> None:
    """Read the job from argv[1]: config, load and save folders, steps; write the losses to its `output`."""
    job = json.loads(Path(sys.argv[1]).read_text())
    config = check_config(TrainConfig, job["config"], "job")
    layout = groups.join(config.parallel)
    engine = Engine(config, KINDS)
    if job["load"]:
        load_checkpoint(engine, Path(job["load"]), "", weights_only=job["first"] == 1)
    lines = []
    for step in range(job["first"], job["last"] + 1):
        if job["save_before"] == step:
            writer = CheckpointWriter(engine, Path(job["save"]))
            writer.save(step, {}, {})
            writer.wait()
        batches = micro_batches(config, layout.data_parallel_rank, layout.data_parallel_size)
        result = engine.train_step(batches, learning_rate=3e-3)
        by_kind = {f"loss_{kind}": result.losses.mean([kind]) for kind in range(KINDS)}
        lines.append({"step": step, "loss": result.losses.loss, **by_kind, "gradient_norm": result.gradient_norm})
    if layout.rank == 0:
        Path(job["output"]).write_text(json.dumps(lines))
    groups.leave()


if __name__ == "__main__":
    main()
