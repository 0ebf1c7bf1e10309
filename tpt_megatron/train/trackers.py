"""Metrics for TensorBoard and Weights & Biases, beside metrics.jsonl, from which both could be made anew."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tpt_megatron.config.watching import WatchConfig
from tpt_megatron.errors import MachineError
from tpt_megatron.files import write_text


class Trackers:
    """For a `with` block; `write` gives every tracker one step's metrics. A resumed run goes on in the same charts."""

    def __init__(self, config: WatchConfig, run_dir: Path, first_step: int, description: Mapping[str, Any]) -> None:
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise MachineError("watch.tensorboard=true: TensorBoard is not installed; run: pip install 'tpt-megatron[tensorboard]'") from None
            # What was logged after the checkpoint that is continued from is hidden.
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        if config.wandb is not None:
            try:
                import wandb
            except ImportError:
                raise MachineError("watch.wandb: wandb is not installed; run: pip install 'tpt-megatron[wandb]'") from None
            chosen = config.wandb
            self._wandb = wandb.init(
                project=chosen.project,
                name=chosen.name or run_dir.name,
                entity=chosen.entity,
                mode=chosen.mode,
                id=_run_id(run_dir / "wandb-id.txt"),
                resume="allow",
                dir=str(run_dir),
                config=dict(description),
                settings=wandb.Settings(silent=True),
            )

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Give on what has a number."""
        step, numbers = metrics["step"], dict(_numbers(metrics))
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, uuid.uuid4().hex)
    return path.read_text()


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}{name}", float(value)
