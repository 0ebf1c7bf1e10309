"""metrics.jsonl: one JSON object a step, and what the run folder says about how it was made."""

from __future__ import annotations

import importlib.metadata
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.files import parse_json_line, read_lines, write_text
from tpt_megatron.mcore.machine import device_name, memory_bytes
from tpt_megatron.train.flops import flops_per_token, peak_tflops


class MetricsFile:
    """Appends one line a step; on a resume, the lines of steps that the checkpoint does not know are cut off first.

    `path` None writes nothing: one rank keeps the metrics.
    """

    def __init__(self, path: Path | None, first_step: int) -> None:
        self._file: IO[bytes] | None = None
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.take_back(first_step)

    def take_back(self, last_step: int) -> None:
        """Cut off the lines of the steps after `last_step`."""
        if self._path is None:
            return
        if self._file is not None:
            self._file.close()
        if self._path.exists():
            cut_after(self._path, last_step)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line; a value that is not finite is written as a string, since JSON has no NaN."""
        if self._file is None:
            return
        line = orjson.dumps(_readable(metrics), option=orjson.OPT_APPEND_NEWLINE)
        while line:  # a disk that is nearly full takes a part, and says so the next time only
            line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Flush the lines to disk, so that no checkpoint outlives the metrics before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()


class Speed:
    """How fast a step was, and how much of the machine's promise that is."""

    def __init__(self, config: TrainConfig, world_size: int) -> None:
        self._flops_per_token = flops_per_token(config.model, config.data.sequence_length)
        self._world_size = world_size
        precision = config.precision if config.fp8 == "none" else "fp8"
        self._peak_tflops = config.watch.peak_tflops or peak_tflops(device_name(), precision)

    def metrics(self, tokens: int, places: int, seconds: float) -> dict[str, float]:
        """Return a step's speed. tokens: those that were learned from; places: of tokens in its sequences, padding among them.

        model_tflops_per_gpu follows the convention of `flops.py`, over all places; on a CPU a rank stands for a GPU. mfu is its part of what
        the chip's data sheet promises, where that is known.
        """
        tflops = places * self._flops_per_token / seconds / self._world_size / 1e12
        speed = {"tokens_per_second": tokens / seconds, "tokens_per_second_per_gpu": tokens / seconds / self._world_size, "model_tflops_per_gpu": tflops}
        if self._peak_tflops is not None:
            speed["mfu"] = tflops / self._peak_tflops
        return speed | {"memory_gb": memory_bytes() / 1e9}


def _readable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _readable(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def cut_after(path: Path, last_step: int) -> None:
    """Keep the lines of the steps 1 to last_step; a line torn by a crash can only be the last. DataError for another that is no step's."""
    kept: list[str] = []
    torn: RecordError | None = None
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if torn is not None:
            raise DataError(f"{torn}, and lines follow: the file is damaged; mend that line, or move the file away")
        try:
            metrics = parse_json_line(line, where)
        except RecordError as error:
            torn = error
            continue
        if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
            raise DataError(f"{where}: not a step's line; the file is damaged, move it away")
        if metrics["step"] <= last_step:
            kept.append(line.decode())
    write_text(path, "".join(f"{line}\n" for line in kept))


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers depend on."""
    names = ("tpt-megatron", "torch", "megatron-core", "transformer-engine", "numpy", "tokenizers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the git revision of the package's source, `-dirty` when it has uncommitted changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() or None
