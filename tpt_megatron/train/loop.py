"""The training loop: what happens when. How a step is computed is mcore's business."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import TokenDataset
from tpt_megatron.errors import ConfigError, DataError, Stopped
from tpt_megatron.files import read_json, write_json
from tpt_megatron.log import progress_bar
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.engine import Engine, MicroBatch
from tpt_megatron.mcore.model import count_parameters
from tpt_megatron.train.data import Batches, open_run_data, step_batches
from tpt_megatron.train.metrics import MetricsFile, git_revision, versions
from tpt_megatron.train.saving import Saving, arm_of
from tpt_megatron.train.schedule import learning_rate
from tpt_megatron.train.signals import StopRequest

log = logging.getLogger(__name__)


def run_train(config: TrainConfig) -> None:
    """Train, from the run folder's latest checkpoint where there is one, to config.steps.

    Alone or as one rank under torchrun. Raises ConfigError, DataError or CheckpointError before any step is taken when
    something does not fit, and Stopped after saving when a signal came.
    """
    layout = groups.join(config.parallel)
    try:
        Run(config, layout).train()
    finally:
        groups.leave()


class Run:
    """One run on one rank: config, data and engine, and the order in which things happen to them."""

    def __init__(self, config: TrainConfig, layout: groups.Layout) -> None:
        self._layout = layout
        _check_batch(config, layout)
        self._data = open_run_data(config)
        self._config = _resolve_vocabulary(config, self._data.datasets)
        self._engine = Engine(self._config, kinds=len(self._data.kinds.table))
        self._saving = Saving(self._config, self._engine, self._data)
        self._tokens_seen = 0

    def train(self) -> None:
        """Take every step that is left, measuring, validating and saving on the way."""
        config, rank_0 = self._config, self._layout.rank == 0
        done, self._tokens_seen = self._saving.resume()
        if done >= config.steps:
            log.info("%s: all %d steps were already done", config.run_dir, config.steps)
            return
        if rank_0:
            self._describe_run()
        metrics_path = config.run_dir / "metrics.jsonl" if rank_0 else None
        with MetricsFile(metrics_path, done) as metrics, StopRequest() as stop, progress_bar("train", config.steps, completed=done) as bar:
            for step in range(done + 1, config.steps + 1):
                line = self._step(step)
                self._saving.poll()
                if config.validate_every_steps and step % config.validate_every_steps == 0:
                    line |= self._validate()
                metrics.write(line)
                bar.say(f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s")
                bar.advance()
                stopping = groups.any_rank(stop.asked)
                if stopping or step == config.steps or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
                    metrics.sync()
                    log.info("step %d of %d: loss %.4f, saving", step, config.steps, line["loss"])
                    self._saving.save(step, self._tokens_seen, line.get("validation_loss"))
                if stopping and step < config.steps:
                    self._saving.wait()
                    raise Stopped(f"{config.run_dir}: stopped by a signal after saving step {step}; run the same command again to continue")
            self._saving.wait()

    def _step(self, step: int) -> dict[str, Any]:
        """Take step number `step` (from 1) and return its metrics."""
        config, kinds = self._config, self._data.kinds
        began = time.perf_counter()
        rate = learning_rate(config.optimizer, step - 1, config.steps)
        first_sequence = (step - 1) * config.global_batch_sequences
        batches = self._batches(self._data.train, first_sequence)
        result = self._engine.train_step(batches, rate)
        loss = result.losses.loss
        if not (math.isfinite(loss) and math.isfinite(result.gradient_norm)):
            self._saving.wait()
            raise DataError(
                f"{config.run_dir}: step {step} has loss {loss} and gradient norm {result.gradient_norm}; "
                "lower optimizer.learning_rate, or look at the data; the last checkpoint is untouched"
            )
        seconds, tokens = time.perf_counter() - began, kinds.tokens(result.losses)
        self._tokens_seen += tokens
        return {
            "step": step,
            "tokens_seen": self._tokens_seen,
            "loss": loss,
            **(kinds.by_part(result.losses) if self._data.has_parts else {}),
            **({"loss_by_source": kinds.by_source(result.losses)} if len(kinds.sources) > 1 else {}),
            "gradient_norm": result.gradient_norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "step_time_s": seconds,
        }

    def _batches(self, source: Batches, first_sequence: int) -> list[MicroBatch]:
        config, layout = self._config, self._layout
        return step_batches(
            source,
            first_sequence,
            global_batch=config.global_batch_sequences,
            micro_batch=config.micro_batch_sequences,
            rank=layout.data_parallel_rank,
            ranks=layout.data_parallel_size,
        )

    def _validate(self) -> dict[str, float]:
        """Return the loss of each validation set, and of its parts: `validation_loss`, or `validation_loss/NAME` of named sets."""
        config = self._config
        losses: dict[str, float] = {}
        for name, source in self._data.validation.items():
            sums = [self._engine.evaluate(self._batches(source, number * config.global_batch_sequences)) for number in range(config.validation_batches)]
            total = sum(sums[1:], sums[0])
            found = {"validation_loss": total.loss}
            if self._data.with_parts[name]:
                found |= self._data.kinds.by_part(total, "validation_loss")
            losses |= {f"{key}/{name}" if name else key: value for key, value in found.items()}
        return losses

    def _describe_run(self) -> None:
        """Write run.json: how this run is made. A later session of the same run is added to the list."""
        path = self._config.run_dir / "run.json"
        described = read_json(path) if path.exists() else {"sessions": []}
        if not isinstance(described, dict) or not isinstance(described.get("sessions"), list):
            raise DataError(f"{path}: not a run's description; it was damaged, move it away")
        sessions = described["sessions"]
        session = {
            "world_size": self._layout.world_size,
            "versions": versions(),
            "git_revision": git_revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(
            path,
            {
                "arm": arm_of(self._data.datasets),
                "config": self._config.model_dump(mode="json"),
                "parameters": count_parameters(self._config.model),
                "data": {path: dataset.details for path, dataset in self._data.datasets.items()},
                "sequences": self._data.train.stream.fingerprint(),
                "sessions": [*sessions, session],
            },
        )


def _resolve_vocabulary(config: TrainConfig, datasets: Mapping[str, TokenDataset]) -> TrainConfig:
    """Return the config with model.vocab_size set: the largest of the datasets', or the config's where it is large enough."""
    given, largest = config.model.vocab_size, 0
    for path, dataset in datasets.items():
        if not given and dataset.details is None:
            raise ConfigError(f"model.vocab_size=0 takes the dataset's vocabulary, but {path} has no manifest that states one; give model.vocab_size")
        needed = dataset.largest_token() + 1 if dataset.details is None else int(dataset.details["vocabulary_size"])
        if given and given < needed:
            raise ConfigError(f"model.vocab_size={given} is smaller than the vocabulary of {path}, {needed}; raise it")
        largest = max(largest, needed)
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": given or largest})})


def _check_batch(config: TrainConfig, layout: groups.Layout) -> None:
    unit = config.micro_batch_sequences * layout.data_parallel_size
    if config.global_batch_sequences % unit:
        raise ConfigError(
            f"global_batch_sequences={config.global_batch_sequences} is not a multiple of micro_batch_sequences={config.micro_batch_sequences} "
            f"x {layout.data_parallel_size} data-parallel rank(s) = {unit}; the nearest that are: {max(unit, config.global_batch_sequences // unit * unit)}"
            f" and {(config.global_batch_sequences // unit + 1) * unit}"
        )
