"""Metrics for TensorBoard and Weights & Biases, beside metrics.jsonl, from which both could be made anew."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tpt_megatron.config.watching import WandbConfig, WatchConfig
from tpt_megatron.errors import MachineError
from tpt_megatron.files import write_text


class Trackers:
    """For a `with` block; `write` gives every tracker one step's metrics. A resumed run goes on in the same charts.

    MachineError for a tracker that is not installed, or that cannot be begun.
    """

    def __init__(self, config: WatchConfig, run_dir: Path, first_step: int, description: Mapping[str, Any]) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.wandb is not None:
            self._wandb = _begin_wandb(config.wandb, run_dir, description)
        if config.tensorboard:
            self._open_tensorboard(first_step)

    def take_back(self, last_step: int) -> None:
        """Hide the steps after `last_step`, which come again. Weights & Biases keeps both: it forgets nothing."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._open_tensorboard(last_step)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Give on what has a number."""
        step, numbers = metrics["step"], dict(_numbers(metrics))
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **numbers})

    def _open_tensorboard(self, last_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MachineError("watch.tensorboard=true: TensorBoard is not installed; run: pip install 'tpt-megatron[tensorboard]'") from None
        # What was logged after the checkpoint that is continued from is hidden.
        self._tensorboard = SummaryWriter(self._folder, purge_step=last_step + 1)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def _begin_wandb(config: WandbConfig, run_dir: Path, description: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise MachineError("watch.wandb: wandb is not installed; run: pip install 'tpt-megatron[wandb]'") from None
    try:
        run = wandb.init(
            project=config.project,
            name=config.name or run_dir.name,
            entity=config.entity,
            mode=config.mode,
            id=_run_id(run_dir / "wandb-id.txt"),
            resume="allow",
            dir=str(run_dir),
            config=dict(description),
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        said = " ".join(str(error).split())
        raise MachineError(f"watch.wandb: {said}; or set watch.wandb.mode=offline and give what it writes to `wandb sync` later") from None
    # Its own count only grows: what a resumed run does again it would throw away.
    run.define_metric("*", step_metric="step")
    return run


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
