"""What a run saves and what it continues from: its checkpoints, and what must be the same for a run to be the same."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpt_megatron.checkpoints import DESCRIPTION, IMPORTED, discard, finished_steps, iteration_folder, latest_step, to_discard, way_out
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import TokenDataset, sidecar
from tpt_megatron.errors import CheckpointError
from tpt_megatron.files import open_atomic, read_json
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.checkpoint import CheckpointWriter, load_checkpoint, read_description
from tpt_megatron.mcore.engine import Engine
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON
from tpt_megatron.train.data import RunData
from tpt_megatron.train.mirroring import Mirroring, ask

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Position:
    """How far a run is: what, beside model and optimizer, a checkpoint must know.

    passed_over     sequences that are not read, since the run went back and on with later ones
    norms           what `StepGuard` remembers, and
    skips_in_a_row  how many steps before this one were not learned from
    sound           the step of the last checkpoint that was not saved among such steps, 0 for none: where a run that is lost goes back to
    """

    step: int = 0
    tokens_seen: int = 0
    passed_over: int = 0
    norms: list[float] = field(default_factory=list)
    skips_in_a_row: int = 0
    sound: int = 0


class Saving:
    """The checkpoints of one run, under run_dir/checkpoints, and of its mirror where it has one."""

    def __init__(self, config: TrainConfig, engine: Engine, data: RunData, rank: int) -> None:
        self._config, self._engine, self._data, self._rank = config, engine, data, rank
        self._checkpoints = config.run_dir / "checkpoints"
        self._imported = config.run_dir / "imported"
        self._writer = CheckpointWriter(engine, self._checkpoints, self._completed)
        self._mirroring = None if config.checkpoint.mirror is None else Mirroring(config.checkpoint, self._checkpoints, rank)

    def catch_up(self) -> None:
        """Fetch what the mirror has and this machine has not, before `resume`. CheckpointError when the mirror is of another run, or cannot be used."""
        newer = None if self._mirroring is None else self._mirroring.newer()
        if self._mirroring is None or newer is None:
            return
        step, description = newer
        self._check(description, f"{self._config.checkpoint.mirror}, step {step}", resuming=True)
        self._mirroring.fetch(step)

    def follow(self) -> None:
        """Have the mirror follow, from now on, what is here."""
        if self._mirroring is not None and self._rank == 0:
            self._mirroring.follow()

    def resume(self) -> Position:
        """Load what there is to continue from, and return where that is."""
        step = groups.ask_rank_0(lambda: latest_step(self._checkpoints))
        if self._rank == 0:  # an earlier start of this run may have loaded another model and saved nothing
            shutil.rmtree(self._imported, ignore_errors=True)
        if step is None:
            chosen = self._config.checkpoint
            if chosen.load_from is not None:
                self._load(self._fetched(chosen.load_from), weights_only=chosen.load == "weights")
            return Position()
        log.info("%s: continuing after step %d", self._config.run_dir, step)
        return self.go_back(step)

    def go_back(self, step: int) -> Position:
        """Load the checkpoint of this run after `step`, and return where that is."""
        folder = iteration_folder(self._checkpoints, step)
        description = self._load(folder)
        if description["step"] != step:
            raise CheckpointError(f"{folder}: it says it holds step {description['step']}, not {step}; {way_out(folder, resuming=True)}")
        return Position(
            step,
            int(description["tokens_seen"]),
            int(description.get("passed_over", 0)),
            list(description.get("gradient_norms", [])),
            int(description.get("skips_in_a_row", 0)),
            int(description.get("sound", step)),
        )

    def _fetched(self, load_from: str) -> Path:
        """Return the folder of checkpoint.load_from: a copy under run_dir, verified, of one that a URL names."""
        if "://" not in load_from:
            folder = Path(load_from)
            latest = groups.ask_rank_0(lambda: latest_step(folder))  # of a folder of checkpoints, as `tpt convert import` makes one
            return folder if latest is None else iteration_folder(folder, latest)
        return Path(ask(self._rank, "copy", load_from, str(self._config.run_dir / "load_from"))["folder"])

    def _load(self, folder: Path, *, weights_only: bool = False) -> dict[str, Any]:
        resuming = folder.parent == self._checkpoints
        instead = way_out(folder, resuming=resuming)
        description = read_description(folder, instead)
        self._check(description, str(folder), resuming=resuming, weights_only=weights_only)
        load_checkpoint(self._engine, folder, instead, weights_only=weights_only)
        if self._rank == 0:
            self._keep_imported(folder)
        return description

    def _keep_imported(self, folder: Path) -> None:
        """Copy what the model was imported with, if it was, to where every checkpoint of this run takes it from: `folder` may be deleted meanwhile."""
        for path in folder.glob(f"{IMPORTED}*"):
            self._imported.mkdir(parents=True, exist_ok=True)
            with open_atomic(self._imported / path.name) as file:
                file.write(path.read_bytes())

    def _check(self, description: Mapping[str, Any], where: str, *, resuming: bool, weights_only: bool = False) -> None:
        """Refuse a checkpoint of another model, precision or, when it is of this run, data."""
        ours = self._config.model.model_dump(mode="json") | {"head_dim": self._config.model.head_size}
        theirs = dict(description["model"])
        theirs["head_dim"] = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_heads"]  # which some configs spell out and others do not
        # How positions are turned is no weight: sequences that become longer from one run to the next take another base.
        free = ("init_std", "vocab_divisor", *(("rope_theta", "rope_scaling") if weights_only else ()))
        for key, value in theirs.items():
            if ours.get(key) != value and not key.endswith(free):
                raise CheckpointError(
                    f"{where}: the checkpoint has model.{key}={value}, the config {ours.get(key)}; use the checkpoint's value, or another run_dir"
                )
        if description["precision"] != self._config.precision and not weights_only:
            raise CheckpointError(f"{where}: the checkpoint was trained in {description['precision']}, the config says precision={self._config.precision}")
        if resuming and description["data"] != self._data_fingerprint():
            differs = ", ".join(sorted(_differing(description["data"], self._data_fingerprint())))
            read = ", ".join(self._config.data.train_paths)
            raise CheckpointError(f"{where}: the run was trained on other data than {read} as this config reads it ({differs}); use that, or another run_dir")

    def _data_fingerprint(self) -> dict[str, Any]:
        ramp = self._config.batch_ramp
        batches = {"global_batch_sequences": self._config.global_batch_sequences, "batch_ramp": None if ramp is None else ramp.model_dump()}
        return {**self._data.train.stream.fingerprint(), **batches}

    def save(self, position: Position, validation_loss: float | None) -> None:
        """Write a checkpoint of what the engine holds, and make it the latest: now, or behind training's back."""
        config, datasets = self._config, self._data.datasets
        if not position.skips_in_a_row:
            position.sound = position.step
        path, details = next(((path, dataset.details) for path, dataset in datasets.items() if dataset.details is not None), ("", None))
        keys = ("tokenizer_fingerprint", "end_of_document", "eod_id", "vocabulary_size")
        tokenizer = None if details is None else {key.removeprefix("tokenizer_"): details[key] for key in keys} | {"chat": details.get("chat")}
        beside = {name: sidecar(Path(path or config.data.train_paths[0]), name) for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL)}
        self._writer.save(
            position.step,
            {
                "tokens_seen": position.tokens_seen,
                "passed_over": position.passed_over,
                "gradient_norms": position.norms,
                "skips_in_a_row": position.skips_in_a_row,
                "sound": position.sound,
                "validation_loss": validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None,
                "model": config.model.model_dump(mode="json"),
                "sequence_length": config.data.sequence_length,
                "precision": config.precision,
                "arm": arm_of(datasets),
                "tokenizer": tokenizer,
                "data": self._data_fingerprint(),
            },
            {name: path for name, path in beside.items() if path.is_file()} | {path.name: path for path in self._imported.glob(f"{IMPORTED}*")},
        )
        if not config.checkpoint.asynchronous:
            self._writer.wait()

    def poll(self) -> None:
        """Complete the checkpoint under way if it is written, and see to the mirror. For every rank to call once a step."""
        self._writer.poll()
        if self._mirroring is not None:
            self._mirroring.poll()

    def wait(self) -> None:
        """Complete the checkpoint under way, if any: nothing is left to be done here after this."""
        self._writer.wait()

    def wait_for_mirror(self, still_waiting: Callable[[], None]) -> None:
        """Wait until the mirror has what is here; `still_waiting` is called again and again meanwhile. CheckpointError when it cannot be done."""
        if self._mirroring is not None:
            self._mirroring.wait(still_waiting)

    def take_mirror_time(self) -> float:
        """Return how long the copying took that ended since this was asked last, in seconds; 0 for none."""
        if self._mirroring is None:
            return 0.0
        seconds, self._mirroring.seconds = self._mirroring.seconds, 0.0
        return seconds

    def close(self) -> None:
        """End what is still under way to the mirror after a failure."""
        if self._mirroring is not None:
            self._mirroring.close()

    def _completed(self, latest: int) -> None:
        self._discard_others(latest)
        self.follow()

    def _discard_others(self, latest: int) -> None:
        """Delete what need not be kept now that there is one more. Later steps than it are of a past that was taken back: they stay."""
        rules = self._config.checkpoint
        if not rules.keep_last:
            return
        steps = [step for step in finished_steps(self._checkpoints) if step <= latest]
        sound = read_json(iteration_folder(self._checkpoints, latest) / DESCRIPTION)["sound"]
        for step in to_discard(steps, self._validation_losses(steps) if rules.keep_best else {}, rules):
            if step == sound:
                continue
            folder = iteration_folder(self._checkpoints, step)
            discard(folder)
            log.info("%s: deleted, it need not be kept", folder)

    def _validation_losses(self, steps: list[int]) -> dict[int, float]:
        """Return the validation losses that the checkpoints themselves name, so that the best survives a restart."""
        losses = {}
        for step in steps:
            path = iteration_folder(self._checkpoints, step) / DESCRIPTION
            if path.is_file() and (loss := read_json(path).get("validation_loss")) is not None:
                losses[step] = float(loss)
        return losses


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> set[str]:
    return {key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)}


def arm_of(datasets: Mapping[str, TokenDataset]) -> str | None:
    """Return the arm that the datasets' manifests name, several joined by +; None without a manifest."""
    return "+".join(dict.fromkeys(str(dataset.details["arm"]) for dataset in datasets.values() if dataset.details is not None)) or None
