"""What a rank keeps for the backward pass, by formula: a table of what each operation keeps, in bytes a token.

On a GPU it is what Transformer Engine's layers and megatron-core's fusions keep, from reading them; on a CPU what ours keep, which a test compares
with what autograd kept, to the byte. An even load of experts is taken for granted. Symbols, of one rank: h hidden size, q channels of its query
heads, k of its key-value heads, f its feed-forward channels, v its rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpt_megatron.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one rank at the moment when it has most.

    kept     by all micro-batches that are under way, for their backward passes
    logits   of the last stage, or what is made of them, of one micro-batch
    working  gradients inside one layer, and a layer that is computed anew, of one micro-batch
    """

    kept: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.kept + self.logits + self.working


def kept_by_layer(config: TrainConfig, *, on_cuda: bool = True) -> dict[str, float]:
    """Return what one layer keeps of one token of the rank's part of a sequence, in bytes, by what it is."""
    model, parallel = config.model, config.parallel
    width = 2 if config.precision == "bf16" else 4
    stored = 1 if config.fp8 != "none" else width  # the input of a matrix product
    tp = parallel.tensor_parallel
    h = model.hidden_size / (tp if parallel.sequence_parallel else 1)
    q, k = model.num_heads * model.head_size / tp, model.num_query_groups * model.head_size / tp
    norms = {"norms' inputs": 2 * h * width, "norms' outputs": 2 * h * stored, "norms' scales": 2 * 4 / (tp if parallel.sequence_parallel else 1)}
    if not on_cuda:
        norms["norms' quotients"] = 2 * h * width
    has_others = not on_cuda and parallel.context_parallel > 1  # keys and values of the other ranks, in place of views of its own
    attention = {
        "queries and keys, turned": (q + (0 if has_others else k)) * width,
        # The values are a part of it, and keep it whole.
        "queries, keys and values": (2 * k * parallel.context_parallel if has_others else q + 2 * k) * width,
        "attention's output": q * width + (q * stored if stored < width else 0),
        "attention's sums": 4 * model.num_heads / tp,
    }
    if model.qk_norm:
        copied = q if model.num_query_groups > tp else 0  # queries of one group lie side by side already
        attention["norms of queries and keys"] = (copied + (0 if on_cuda else q + k)) * width + 4 * (model.num_heads + model.num_query_groups) / tp
    if not on_cuda and has_mask(config):
        attention["mask"] = config.data.sequence_length * width  # in the layer's type
    if config.recompute == "selective":
        del attention["attention's sums"]
        attention.pop("mask", None)
    return norms | attention | _mlp(config, width, stored, on_cuda=on_cuda)


def has_mask(config: TrainConfig) -> bool:
    """Say whether attention on a CPU needs a mask; Transformer Engine's kernels are told lengths."""
    return config.data.attention == "document" or config.parallel.context_parallel > 1


def _mlp(config: TrainConfig, width: int, stored: int, *, on_cuda: bool) -> dict[str, float]:
    model, tp = config.model, config.parallel.tensor_parallel
    experts = model.experts
    if experts is None:
        f = model.ffn_hidden_size / tp
        rows = {"gate and up": 2 * f * width, "product of gate and up": f * stored}
        return rows if on_cuda else rows | {"gate, activated": f * width}
    copies, f = experts.top_k, experts.ffn_hidden_size
    # tp ranks hold a part of each expert and see the tokens of all of them.
    rows = {
        "router": (9 * experts.num_experts + 32 * copies) / tp,  # probabilities, which are taken, and where
        "tokens by expert": copies * model.hidden_size * stored,
        "gate and up": copies * 2 * f * width / tp,
        "product of gate and up": copies * f * stored / tp,
    }
    return rows if on_cuda else rows | {"gate, activated, up, and their products": copies * 3 * f * width / tp}


def under_way(config: TrainConfig, stage: int, micro_batches: int) -> tuple[int, int]:
    """Return how many (chunks, layers a chunk) a pipeline stage has computed forwards and not yet backwards, when these are most.

    One forward, one backward: a stage begins as many micro-batches as there are stages from it on. Interleaved, as many chunks as
    megatron-core's schedule warms up with, and one.
    """
    parallel = config.parallel
    pp, chunks = parallel.pipeline_parallel, parallel.virtual_pipeline
    layers = config.model.num_layers // (pp * chunks)
    if chunks == 1:
        return min(micro_batches, pp - stage), layers
    return min(micro_batches * chunks, 2 * (pp - stage - 1) + (chunks - 1) * pp + 1), layers


def activations(config: TrainConfig, stage: int, micro_batches: int, *, on_cuda: bool = True) -> Activations:
    """Return what the ranks of a pipeline stage hold in a step of so many micro-batches a data-parallel rank."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_parallel, parallel.pipeline_parallel
    width = 2 if config.precision == "bf16" else 4
    tokens = config.micro_batch_sequences * config.data.sequence_length // parallel.context_parallel
    h = model.hidden_size / (tp if parallel.sequence_parallel else 1)
    layer = sum(kept_by_layer(config, on_cuda=on_cuda).values())
    chunks, layers = under_way(config, stage, micro_batches)
    each = layers * (h * width if config.recompute == "full" else layer)
    q, k = model.num_heads * model.head_size / tp, model.num_query_groups * model.head_size / tp
    f = model.ffn_hidden_size / tp if model.experts is None else model.experts.top_k * model.experts.ffn_hidden_size / tp
    working = (3 * f + q + 2 * k + 2 * h) * width + (layer if config.recompute == "full" else 0)
    logits = ends = 0.0
    if not on_cuda:  # shared by all layers
        ends += 2 * model.head_size * width / config.micro_batch_sequences  # cosines and sines
        ends += config.data.sequence_length if config.recompute == "selective" and has_mask(config) else 0
    if stage == 0:
        ends += 8 * min(micro_batches, pp)  # token ids
    if stage == pp - 1:
        outputs = 1 + model.mtp_layers
        padded = -(-model.vocab_size // model.vocab_divisor) * model.vocab_divisor / tp
        logits = outputs * padded * (width if on_cuda else 4)  # their gradient, in their place; their softmax
        ends += outputs * (h * width * (2 if on_cuda else 3) + 4 * h / model.hidden_size + 9)  # the last norm; labels, and which are this rank's
        ends += model.mtp_layers * (layer + (4 if on_cuda else 6) * h * width + 8)  # two norms, and their outputs side by side
    return Activations(int(tokens * (chunks * each + ends)), int(tokens * logits), int(tokens * working))
