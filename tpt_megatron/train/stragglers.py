"""Ranks that are slower than the others, found by NVIDIA's resiliency extension while the run goes on.

A step takes as long on every rank as on the slowest, since the others wait for it; so what is compared is the forward pass of a
micro-batch, in which data-parallel ranks do not wait for one another. On CUDA the extension compares its kernels, one by one and without
those of communication; on a CPU, where its kernel timing does not work, it compares the time that we take.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch

from tpt_megatron.config.watching import StragglerConfig
from tpt_megatron.errors import MachineError

log = logging.getLogger(__name__)

SECTION = "forward"


class Stragglers:
    """For a `with` block. `forward` is put around forward passes, `compare` after steps, on every rank; config None: neither does anything.

    MachineError when the extension is not installed, or cannot time kernels on this machine.
    """

    def __init__(self, config: StragglerConfig | None) -> None:
        self._config = config
        self._seconds: list[float] = []  # of each forward pass since the ranks were compared, on a CPU
        self._detector: Any = None
        if config is None:
            return
        try:
            from nvidia_resiliency_ext import straggler
            from nvidia_resiliency_ext.straggler import reporting
        except ImportError as error:
            raise MachineError(f"watch.stragglers needs nvidia-resiliency-ext ({error}); run: pip install 'tpt-megatron[resiliency]'") from None
        if torch.cuda.is_available():
            try:
                straggler.Detector.initialize(scores_to_compute=["relative_perf_scores"])
            except (ImportError, RuntimeError) as error:
                raise MachineError(f"watch.stragglers: kernels cannot be timed on this machine ({error}); leave it out") from error
            self._detector = straggler.Detector
        else:
            self._reports = reporting.ReportGenerator(["relative_perf_scores"])
            self._median = straggler.Statistic.MED

    def __enter__(self) -> Stragglers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._detector is not None:
            self._detector.shutdown()

    def forward(self) -> AbstractContextManager[None]:
        """Time what is done within."""
        if self._config is None:
            return nullcontext()
        return self._timed() if self._detector is None else self._detector.detection_section(SECTION)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds.append(time.perf_counter() - began)

    def compare(self, step: int) -> dict[str, float]:
        """Compare the ranks where `step` is one to do it at, log those that are too slow, and return metrics, on rank 0; nothing elsewhere.

        slowest_rank, and slowest_rank_speed, its speed as a part of the fastest rank's.
        """
        if self._config is None or step % self._config.every_steps:
            return {}
        if self._detector is not None:
            report = self._detector.generate_report()
        else:
            report = self._reports.generate_report({SECTION: {self._median: statistics.median(self._seconds)}}, {})
            self._seconds.clear()
        if report is None:  # it is rank 0 that hears of all
            return {}
        speeds = report.gpu_relative_perf_scores if self._detector is not None else report.section_relative_perf_scores[SECTION]
        measured = {rank: speed for rank, speed in speeds.items() if not math.isnan(speed)}
        if not measured:
            return {}
        slow = sorted((speed, rank) for rank, speed in measured.items() if speed < self._config.threshold)
        if slow:
            named = ", ".join(f"rank {rank} at {speed:.2f}" for speed, rank in slow)
            log.warning("step %d: slower than %g of the fastest rank's speed: %s", step, self._config.threshold, named)
        slowest = min(measured, key=lambda rank: measured[rank])
        return {"slowest_rank": slowest, "slowest_rank_speed": measured[slowest]}
