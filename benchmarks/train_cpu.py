"""Tokens per second of the trainer's engine against a plain PyTorch GPT of the same shape, side by side in one process.

    python benchmarks/train_cpu.py [--rounds 5] [--shape 10m|demo]

Both train in fp32 on one thread with AdamW on the same random tokens: forward, backward, gradient clipping, update. The two
take turns, a few steps each, so that a change of the machine's speed meets both; the figures are medians over the rounds,
and the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.engine import Engine, MicroBatch
from tpt_megatron.mcore.model import count_parameters

SHAPES = {
    "10m": ({"num_layers": 6, "hidden_size": 320, "ffn_hidden_size": 864, "num_heads": 5, "num_query_groups": 5, "vocab_size": 4096}, 256, 4),
    "demo": ({"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 176, "num_heads": 2, "num_query_groups": 2, "vocab_size": 128}, 256, 8),
}


class Norm(nn.RMSNorm):
    """RMSNorm at the trainer's epsilon."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-5)


class PlainLayer(nn.Module):
    """One Llama-style layer, written the plain way."""

    def __init__(self, width: int, feed_forward: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = Norm(width), Norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * feed_forward, bias=False), nn.Linear(feed_forward, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return x [b, s, width] after the layer; cos and sin [s, head_dim]."""
        b, s, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (t * cos + torch.cat((-t[..., t.size(-1) // 2 :], t[..., : t.size(-1) // 2]), -1) * sin for t in (q, k))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, s, width))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class PlainGpt(nn.Module):
    """The peer: embeddings, layers, head, cross-entropy."""

    def __init__(self, shape: dict[str, int], sequence: int, vocabulary: int) -> None:
        super().__init__()
        width = shape["hidden_size"]
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
        self.layers = nn.ModuleList(PlainLayer(width, shape["ffn_hidden_size"], shape["num_heads"]) for _ in range(shape["num_layers"]))
        self.norm = Norm(width)
        half = width // shape["num_heads"] // 2
        angles = torch.outer(torch.arange(sequence), 10_000.0 ** (-torch.arange(half) / half)).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--shape", choices=SHAPES, default="10m")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape, sequence, batch = SHAPES[args.shape]
    config = check_config(
        TrainConfig,
        {
            "run_dir": "unused",
            "model": shape,
            "data": {"train": "unused", "sequence_length": sequence, "attention": "sequence"},
            "optimizer": {"learning_rate": 1e-3},
            "steps": 1,
            "global_batch_sequences": batch,
            "micro_batch_sequences": batch,
        },
        "benchmark",
    )
    groups.join(config.parallel)
    engine = Engine(config, 1)
    plain = PlainGpt(shape, sequence, shape["vocab_size"])
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    row = np.random.default_rng(0).integers(0, shape["vocab_size"], (batch, sequence + 1))
    ours = MicroBatch(row[:, :-1].copy(), row[:, 1:].copy(), np.ones((batch, sequence), np.float32), np.zeros((batch, sequence), np.int32))
    tokens, labels = torch.from_numpy(ours.tokens), torch.from_numpy(ours.labels)

    def engine_step() -> None:
        engine.train_step([ours], 1e-3)

    def plain_step() -> None:
        adam.zero_grad()
        plain(tokens, labels).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()

    def tokens_per_second(step: object) -> float:
        began = time.perf_counter()
        for _ in range(args.steps):
            step()  # type: ignore[operator]
        return args.steps * batch * sequence / (time.perf_counter() - began)

    for step in (engine_step, plain_step):
        tokens_per_second(step)  # warm-up
    rounds = [(tokens_per_second(engine_step), tokens_per_second(plain_step)) for _ in range(args.rounds)]
    ratios = [mine / theirs for mine, theirs in rounds]
    print(f"shape {args.shape}: {count_parameters(config.model):,} parameters, sequence {sequence}, batch {batch}, fp32, one thread, {args.rounds} rounds")
    print(f"tpt_megatron   {statistics.median(mine for mine, _ in rounds):8,.0f} tokens/s")
    print(f"plain PyTorch  {statistics.median(theirs for _, theirs in rounds):8,.0f} tokens/s")
    print(f"ratio          {statistics.median(ratios):8.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    groups.leave()


if __name__ == "__main__":
    main()
