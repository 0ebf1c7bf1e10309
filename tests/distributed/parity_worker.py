"""One rank of a parity run: fixed data through the engine, losses written by rank 0. Started by torchrun from the tests."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.checkpoint import CheckpointWriter, load_checkpoint
from tpt_megatron.mcore.engine import Engine, MicroBatch

VOCABULARY, SEQUENCE, GLOBAL_BATCH, KINDS = 250, 32, 8, 4
WEIGHT_OF_DOCUMENT = 0.3


SUCCESSORS = np.random.default_rng(0).integers(0, VOCABULARY, (VOCABULARY, 4))
"""Of each token in a chain: a model that has learnt them all has a loss of ln 4."""


def micro_batches(config: TrainConfig, rank: int, ranks: int, first: int | None = None) -> list[MicroBatch]:
    """This rank's sequences of a step: each is a function of its number alone. Two documents each, parts alternate and weigh differently.

    first: the number of the step's first sequence, of a chain; None: the same eight of every step, to be learnt by heart.
    """
    share, micro = GLOBAL_BATCH // ranks, config.micro_batch_sequences
    draw, begin = (by_heart, 0) if first is None else (chain, first)
    return [micro_batch(config, range(at, at + micro), draw) for at in range(begin + rank * share, begin + (rank + 1) * share, micro)]


def by_heart(number: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(number).integers(0, VOCABULARY, SEQUENCE + 1)


def chain(number: int) -> npt.NDArray[np.int64]:
    generator = np.random.default_rng(number)
    row = [int(generator.integers(0, VOCABULARY))]
    for which in generator.integers(0, SUCCESSORS.shape[1], SEQUENCE):
        row.append(int(SUCCESSORS[row[-1], which]))
    return np.array(row)


def micro_batch(config: TrainConfig, numbers: range, draw: Callable[[int], npt.NDArray[np.int64]]) -> MicroBatch:
    rows = np.stack([draw(number) for number in numbers])
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
    """Read the job from argv[1]: config, load and save folders, steps, and whether its data is a chain; write the losses to its `output`."""
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
        first = step * GLOBAL_BATCH if job.get("chain") else None
        batches = micro_batches(config, layout.data_parallel_rank, layout.data_parallel_size, first)
        result = engine.train_step(batches, learning_rate=3e-3)
        by_kind = {f"loss_{kind}": result.losses.mean([kind]) for kind in range(KINDS)}
        lines.append({"step": step, "loss": result.losses.loss, **by_kind, "gradient_norm": result.gradient_norm})
    if layout.rank == 0:
        Path(job["output"]).write_text(json.dumps(lines))
    groups.leave()


if __name__ == "__main__":
    main()
