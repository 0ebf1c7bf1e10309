"""One rank that computes logits of checkpoints, one after the other, and writes them where a rank of the last stage has them."""

import json
import sys
from pathlib import Path

import torch

from tpt_megatron.config.parallel import ParallelConfig
from tpt_megatron.convert.checkpoint_reader import read_record
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.logits import checkpoint_logits


def main() -> None:
    """Read the job from argv[1]: layout, tokens, and for each checkpoint the file that its logits go to."""
    job = json.loads(Path(sys.argv[1]).read_text())
    parallel = ParallelConfig.model_validate(job["parallel"])
    groups.join(parallel)
    tokens = torch.tensor(job["tokens"])
    for folder, output in job["outputs"].items():
        model = read_record(Path(folder)).model
        of_model = parallel.model_copy(update={"sequence_parallel": model.experts is not None and parallel.tensor_parallel > 1})
        logits = checkpoint_logits(Path(folder), model, tokens, of_model)
        if logits is not None:  # the same on every rank of the last stage
            torch.save(logits, f"{output}.{torch.distributed.get_rank()}")
    groups.leave()


if __name__ == "__main__":
    main()
