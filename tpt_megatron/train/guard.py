"""Which steps are not learned from: losses that are not finite, and gradients far larger than those before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from tpt_megatron.config.watching import FaultConfig

NORMS_KEPT = 100
FEWEST_NORMS = 20
"""Before so many steps nothing is called a spike: gradients shrink fast at first."""


class StepGuard:
    """Judges each step before anything is changed. Its memory, `norms` and `skips_in_a_row`, belongs into a checkpoint: a resumed run must judge alike."""

    def __init__(self, config: FaultConfig, norms: Sequence[float] = (), skips_in_a_row: int = 0) -> None:
        self._config = config
        self._norms = deque(norms, NORMS_KEPT)
        self.skips_in_a_row = skips_in_a_row
        self.reason: str | None = None
        """Why the last step was refused; None when it was not."""

    @property
    def norms(self) -> list[float]:
        """The gradient norms of the last steps that were learned from; none are kept where nothing is compared with them."""
        return list(self._norms)

    def accept(self, loss: float, gradient_norm: float) -> bool:
        """Say whether to learn from a step, and remember it."""
        self.reason = self._objection(loss, gradient_norm)
        if self.reason is not None:
            self.skips_in_a_row += 1
            return False
        self.skips_in_a_row = 0
        if self._config.spike_factor is not None:
            self._norms.append(gradient_norm)
        return True

    def _objection(self, loss: float, gradient_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return f"loss {loss} and gradient norm {gradient_norm}"
        factor = self._config.spike_factor
        if factor is not None and len(self._norms) >= FEWEST_NORMS and gradient_norm > factor * (usual := median(self._norms)):
            return f"gradient norm {gradient_norm:.4g}, {gradient_norm / usual:.1f} times the median of the last {len(self._norms)}"
        return None

    @property
    def is_lost(self) -> bool:
        """Say whether so many steps in a row were refused that the run should go back."""
        return self.skips_in_a_row >= self._config.skips_in_a_row
