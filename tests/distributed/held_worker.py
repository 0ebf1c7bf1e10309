"""One rank that takes a step and says what it held: bytes of parameters, gradients and optimizer, and the most that autograd kept at once."""

import gc
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.checkpoint import CheckpointWriter
from tpt_megatron.mcore.engine import Engine, MicroBatch
from tpt_megatron.mcore.simulation import held_by


class Kept:
    """Counts the storages that autograd keeps, each once, but for those that are there anyway."""

    def __init__(self, engine: Engine) -> None:
        buffers = [buffer for chunk in engine.model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        held = [tensor for buffer in buffers for tensor in (buffer.param_data, buffer.grad_data) if tensor is not None]
        held += [parameter for chunk in engine.model for parameter in chunk.parameters()]
        self._held = {tensor.untyped_storage()._cdata for tensor in held}
        self._uses: Counter[int] = Counter()
        self._bytes = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> "Packed":
        storage = tensor.untyped_storage()
        packed = Packed(tensor, self, storage._cdata, storage.nbytes())
        if packed.key not in self._held:
            self._uses[packed.key] += 1
            self._bytes += packed.bytes if self._uses[packed.key] == 1 else 0
            self.peak = max(self.peak, self._bytes)
        return packed

    def release(self, packed: "Packed") -> None:
        if packed.key not in self._held:
            self._uses[packed.key] -= 1
            self._bytes -= packed.bytes if self._uses[packed.key] == 0 else 0


class Packed:
    def __init__(self, tensor: torch.Tensor, kept: Kept, key: int, size: int) -> None:
        self.tensor, self.kept, self.key, self.bytes = tensor, kept, key, size

    def __del__(self) -> None:
        self.kept.release(self)


def main() -> None:
    """Read {"config", "output", "save"} from argv[1]; write this rank's findings to OUTPUT.RANK.json, and a checkpoint where it is wanted."""
    job = json.loads(Path(sys.argv[1]).read_text())
    config = check_config(TrainConfig, job["config"], "job")
    layout = groups.join(config.parallel)
    engine = Engine(config, kinds=1)
    shape = (config.micro_batch_sequences, config.data.sequence_length)
    zeros = np.zeros(shape, np.int64)
    documents = np.zeros(shape, np.int32) if config.data.attention == "document" else None
    batch = MicroBatch(zeros, zeros, np.ones(shape, np.float32), np.zeros(shape, np.int32), documents)
    count = config.global_batch_sequences // config.micro_batch_sequences // layout.data_parallel_size
    kept = Kept(engine)
    gc.disable()
    # megatron-core leaves marks on parameters in the backward pass, which asks for them when gradients are reduced early; what comes out of hooks is a copy.
    is_watched = job.get("watch", True) and not config.parallel.overlap_grad_reduce
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda packed: packed.tensor) if is_watched else nullcontext():
        engine.train_step([batch] * count, learning_rate=1e-3)
    Path(f"{job['output']}.{layout.rank}.json").write_text(
        json.dumps(asdict(held_by(engine)) | {"kept": kept.peak if is_watched else None, "allocated": torch.cuda.max_memory_allocated()})
    )
    if job["save"]:
        writer = CheckpointWriter(engine, Path(job["save"]))
        writer.save(1, {}, {})
        writer.wait()
    groups.leave()


if __name__ == "__main__":
    main()
