"""How long a step takes, roughly: enough to say which of two layouts is the faster one, not to promise a speed.

A step is computed at a share of the chip's peak, and sends what its layout makes it send over links of two kinds. Assumed, and not measured:

    matrix products reach 55 % of the peak in bf16, 45 % in FP8; whole layers that are computed anew take a third more, attention alone a twelfth
    a GPU sends 360 GB/s within a node (NVLink of an H100, four fifths of its 450) and 40 GB/s out of it (400 Gbit/s a GPU, four fifths)
    tensor-, expert- and pipeline-parallel traffic waits for nothing else; half of the context-parallel, and, where overlapping is on, 70 % of the
    data-parallel traffic hides behind computation
"""

from __future__ import annotations

from dataclasses import dataclass

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.launch.gpus import Gpu
from tpt_megatron.train.flops import flops_per_token

REACHED = {False: 0.55, True: 0.45}
"""Of the peak, by whether it is FP8's."""
ANEW = {"none": 1.0, "selective": 13 / 12, "full": 4 / 3}
WITHIN_NODE, BETWEEN_NODES = 360e9, 40e9
HIDDEN_OF_CONTEXT, HIDDEN_OF_DATA = 0.5, 0.7


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step by what they go into."""

    compute: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    bubble: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.tensor + self.context + self.expert + self.pipeline + self.data + self.bubble


def step_time(config: TrainConfig, world_size: int, gpu: Gpu, parameters_of_rank: int, gpus_per_node: int) -> StepTime:
    """Estimate one step of a layout that is possible. The GPU's peak must be known."""
    model, parallel = config.model, config.parallel
    tp, pp, cp, ep = parallel.tensor_parallel, parallel.pipeline_parallel, parallel.context_parallel, parallel.expert_parallel
    in_fp8 = config.fp8 != "none"
    peak = gpu.peak_flops(in_fp8)
    assert peak is not None
    dp = world_size // (tp * pp * cp)
    count = config.global_batch_sequences // (config.micro_batch_sequences * dp)
    tokens = config.micro_batch_sequences * config.data.sequence_length // cp  # of a rank's micro-batch
    layers = model.num_layers // pp
    width = 2 if config.precision == "bf16" else 4
    whole = flops_per_token(model, config.data.sequence_length) * config.global_batch_sequences * config.data.sequence_length
    compute = whole / (world_size * peak * REACHED[in_fp8]) * ANEW[config.recompute]

    def seconds(sent: float, ranks: int) -> float:
        return sent / (WITHIN_NODE if ranks <= gpus_per_node else BETWEEN_NODES)

    hidden = tokens * model.hidden_size * width
    # A layer gathers and scatters twice forwards and twice backwards, and with its inputs cut gathers two of them again.
    rounds = (4 + parallel.sequence_parallel) * (ANEW[config.recompute] if config.recompute == "full" else 1)
    tensor = count * layers * seconds(rounds * 2 * (tp - 1) / tp * hidden, tp)
    keys_and_values = tokens * 2 * model.num_query_groups * model.head_size / tp * width
    context = count * layers * seconds(3 * (cp - 1) * keys_and_values, tp * cp) * (1 - HIDDEN_OF_CONTEXT)
    expert = 0.0
    if model.experts is not None:
        sent = 4 * hidden / (tp if parallel.sequence_parallel else 1) * model.experts.top_k * (ep - 1) / ep
        expert = count * layers * seconds(sent, tp * ep)
    pipeline = 0.0
    if pp > 1:
        pipeline = count * parallel.virtual_pipeline * seconds(2 * hidden / (tp if parallel.sequence_parallel else 1), world_size // dp)
    shared = dp * cp
    data = seconds(parameters_of_rank * (4 + width) * (shared - 1) / shared, tp * shared)
    data *= 1 - HIDDEN_OF_DATA if parallel.overlap_grad_reduce else 1
    waiting = (pp - 1) / (parallel.virtual_pipeline * count) * (compute + tensor + context + expert)
    return StepTime(compute, tensor, context, expert, pipeline, data, waiting)
