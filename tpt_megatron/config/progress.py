"""How far a step brings a run: sequences and tokens before each step, where batches may grow over the first ones."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from pydantic import PositiveInt

from tpt_megatron.config.load import Config


class BatchRamp(Config):
    """Batches that grow: from start_sequences by increment_sequences to the full batch, each size for an equal share of `tokens`."""

    start_sequences: PositiveInt
    increment_sequences: PositiveInt
    tokens: PositiveInt


@dataclass(frozen=True, slots=True)
class _Phase:
    """Steps of one batch size, from `step` (from 0) and `sequence` on."""

    step: int
    sequence: int
    batch: int


class Progress:
    """Steps, sequences and tokens of a run. Steps are numbered from 1, as in metrics and checkpoints."""

    def __init__(self, batch: int, sequence_length: int, ramp: BatchRamp | None) -> None:
        self._sequence_length = sequence_length
        self._phases = [_Phase(0, 0, batch)]
        if ramp is not None:
            sizes = range(ramp.start_sequences, batch, ramp.increment_sequences)
            steps = [max(1, -(-ramp.tokens // (len(sizes) * size * sequence_length))) for size in sizes]
            self._phases = []
            step = sequence = 0
            for size, count in zip(sizes, steps, strict=True):
                self._phases.append(_Phase(step, sequence, size))
                step, sequence = step + count, sequence + count * size
            self._phases.append(_Phase(step, sequence, batch))

    @property
    def batches(self) -> tuple[int, ...]:
        """Every batch size that comes, in sequences, the full one last."""
        return tuple(phase.batch for phase in self._phases)

    def batch(self, step: int) -> int:
        """Return how many sequences step `step` has."""
        return self._phase(step - 1).batch

    def sequences_before(self, step: int) -> int:
        """Return how many sequences were seen before step `step`: the number of its first one."""
        phase = self._phase(step - 1)
        return phase.sequence + (step - 1 - phase.step) * phase.batch

    def tokens_after(self, step: int) -> int:
        """Return how many tokens were seen when step `step` is done."""
        return self.sequences_before(step + 1) * self._sequence_length

    def steps_for(self, tokens: int) -> int:
        """Return the least number of steps that sees so many tokens."""
        sequences = -(-tokens // self._sequence_length)
        for phase, following in pairwise(self._phases):
            if following.sequence >= sequences:
                return phase.step + -(-(sequences - phase.sequence) // phase.batch)
        last = self._phases[-1]
        return last.step + -(-(sequences - last.sequence) // last.batch)

    def _phase(self, step_from_0: int) -> _Phase:
        return self._phases[bisect_right(self._phases, step_from_0, key=lambda phase: phase.step) - 1]
