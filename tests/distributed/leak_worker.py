"""Losses of three documents that lie in one sequence, before and after the first one's tokens are exchanged. Started by tests."""

import json
import sys
from pathlib import Path

import numpy as np

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.engine import Engine, MicroBatch


def main() -> None:
    """argv: a JSON of the config, and the file for the losses: two lists, by document."""
    config = check_config(TrainConfig, json.loads(sys.argv[1]), "job")
    groups.join(config.parallel)
    engine = Engine(config, kinds=3)
    rows, length = config.micro_batch_sequences, config.data.sequence_length
    draw = np.random.default_rng(0)
    tokens, labels, others = draw.integers(0, config.model.vocab_size, (3, rows, length))
    documents = np.broadcast_to(np.searchsorted([length // 3, 3 * length // 4], np.arange(length), side="right").astype(np.int32), tokens.shape).copy()
    weights = np.ones(tokens.shape, np.float32)
    seen = documents if config.data.attention == "document" else None
    found = []
    for ids in (tokens, np.where(documents == 0, others, tokens)):
        losses = engine.evaluate([MicroBatch(ids, labels, weights, documents, seen)])
        found.append(losses.losses.tolist())
    Path(sys.argv[2]).write_text(json.dumps(found))
    groups.leave()


if __name__ == "__main__":
    main()
