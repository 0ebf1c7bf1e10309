"""A trace of some steps, with a range for each: by torch's profiler on any machine, and for nsys (NVTX) on CUDA."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tpt_megatron.config.watching import ProfileConfig

_cuda: Any = torch.cuda  # untyped, in part
log = logging.getLogger(__name__)


class StepProfiler:
    """For a `with` block. `before` and `after` each step, of which those that the config names are traced; config None: nothing is."""

    def __init__(self, config: ProfileConfig | None, folder: Path, rank: int) -> None:
        self._config = config if config is not None and rank in config.ranks else None
        self._path = folder / f"rank-{rank:05}.json.gz"
        self._profile: Any = None
        self._range: Any = None
        """Of the step under way, in the trace."""
        self._on_cuda = torch.cuda.is_available()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def before(self, step: int) -> None:
        """Begin the trace where its first step comes."""
        if self._config is None or step != self._config.first_step:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            _cuda.cudart().cudaProfilerStart()  # nsys profile --capture-range=cudaProfilerApi begins here
        self._profile = torch.profiler.profile(activities=activities)
        self._profile.__enter__()
        self._push(step)

    def after(self, step: int) -> None:
        """End the trace after its last step."""
        if self._profile is None or self._config is None:
            return
        self._pop()
        if step + 1 >= self._config.first_step + self._config.steps:
            self._end()
        else:
            self._push(step + 1)

    def _push(self, step: int) -> None:
        self._range = torch.profiler.record_function(f"step {step}")
        self._range.__enter__()
        if self._on_cuda:
            _cuda.nvtx.range_push(f"step {step}")

    def _pop(self) -> None:
        if self._on_cuda:
            _cuda.nvtx.range_pop()
        self._range.__exit__(None, None, None)
        self._range = None

    def _end(self) -> None:
        if self._profile is None:
            return
        if self._range is not None:  # the run ends within a step
            self._pop()
        self._profile.__exit__(None, None, None)
        if self._on_cuda:
            _cuda.cudart().cudaProfilerStop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._path))
        self._profile = None
        log.info("%s: the trace, for https://ui.perfetto.dev", self._path)
