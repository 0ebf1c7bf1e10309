"""The training loop: what happens when. How a step is computed is mcore's business."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import PART_DOCUMENT, PART_THINKING, TokenDataset, open_dataset
from tpt_megatron.errors import ConfigError, DataError, Stopped
from tpt_megatron.files import read_json, write_json
from tpt_megatron.log import progress_bar
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.engine import Engine, LossSums
from tpt_megatron.mcore.model import count_parameters
from tpt_megatron.train.data import SequenceOrder, step_batches
from tpt_megatron.train.metrics import MetricsFile, git_revision, versions
from tpt_megatron.train.saving import Saving, arm_of
from tpt_megatron.train.schedule import learning_rate
from tpt_megatron.train.signals import StopRequest

log = logging.getLogger(__name__)


def run_train(config: TrainConfig) -> None:
    """Train, from the run folder's latest checkpoint where there is one, to config.last_step.

    Alone or as one rank under torchrun. Raises ConfigError, DataError or CheckpointError before any step is taken when
    something does not fit, and Stopped after saving when a signal came.
    """
    layout = groups.join(config.parallel)
    try:
        Run(config, layout).train()
    finally:
        groups.leave()


@dataclass(frozen=True, slots=True)
class _Data:
    train: TokenDataset
    order: SequenceOrder
    validation: SequenceOrder | None


class Run:
    """One run on one rank: config, data and engine, and the order in which things happen to them."""

    def __init__(self, config: TrainConfig, layout: groups.Layout) -> None:
        self._layout = layout
        data = _open_data(config)
        self._config = _resolve_vocabulary(config, data.train)
        _check_batch(self._config, layout)
        self._data = data
        self._engine = Engine(self._config, kinds=2)
        self._saving = Saving(self._config, self._engine, data.train)

    def train(self) -> None:
        """Take every step that is left, measuring, validating and saving on the way."""
        config, rank_0 = self._config, self._layout.rank == 0
        done = self._saving.resume()
        if done >= config.last_step:
            log.info("%s: all %d steps were already done", config.run_dir, config.last_step)
            return
        if rank_0:
            self._describe_run()
        metrics_path = config.run_dir / "metrics.jsonl" if rank_0 else None
        with MetricsFile(metrics_path, done) as metrics, StopRequest() as stop, progress_bar("train", config.last_step, completed=done) as bar:
            for step in range(done + 1, config.last_step + 1):
                line = self._step(step)
                if config.validate_every_steps and step % config.validate_every_steps == 0:
                    line["validation_loss"] = self._validate()
                metrics.write(line)
                bar.say(f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s")
                bar.advance()
                stopping = groups.any_rank(stop.asked)
                if stopping or step == config.last_step or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
                    metrics.sync()
                    self._saving.save(step, config.progress.tokens_after(step))
                    log.info("step %d of %d: loss %.4f, saved", step, config.last_step, line["loss"])
                if stopping and step < config.last_step:
                    raise Stopped(f"{config.run_dir}: stopped by a signal after saving step {step}; run the same command again to continue")

    def _step(self, step: int) -> dict[str, Any]:
        """Take step number `step` (from 1) and return its metrics."""
        config, layout = self._config, self._layout
        began = time.perf_counter()
        rate = learning_rate(config, step)
        batch = config.progress.batch(step)
        batches = step_batches(
            self._data.order,
            config.progress.sequences_before(step),
            global_batch=batch,
            micro_batch=config.micro_batch_sequences,
            rank=layout.data_parallel_rank,
            ranks=layout.data_parallel_size,
        )
        result = self._engine.train_step(batches, rate)
        loss = result.losses.loss
        if not (math.isfinite(loss) and math.isfinite(result.gradient_norm)):
            raise DataError(
                f"{config.run_dir}: step {step} has loss {loss} and gradient norm {result.gradient_norm}; "
                "lower optimizer.learning_rate, or look at the data; the last checkpoint is untouched"
            )
        seconds = time.perf_counter() - began
        return {
            "step": step,
            "tokens_seen": config.progress.tokens_after(step),
            "loss": loss,
            **({} if self._data.train.parts is None else loss_by_part(result.losses)),
            "gradient_norm": result.gradient_norm,
            "learning_rate": rate,
            "tokens_per_second": batch * config.data.sequence_length / seconds,
            "step_time_s": seconds,
        }

    def _validate(self) -> float:
        config, layout = self._config, self._layout
        assert self._data.validation is not None
        sums: list[LossSums] = []
        for number in range(config.validation_batches):
            batches = step_batches(
                self._data.validation,
                number * config.global_batch_sequences,
                global_batch=config.global_batch_sequences,
                micro_batch=config.micro_batch_sequences,
                rank=layout.data_parallel_rank,
                ranks=layout.data_parallel_size,
            )
            sums.append(self._engine.evaluate(batches))
        return sum(sums[1:], sums[0]).loss

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
                "arm": arm_of(self._data.train),
                "config": self._config.model_dump(mode="json"),
                "parameters": count_parameters(self._config.model),
                "data": self._data.train.details,
                "sessions": [*sessions, session],
            },
        )


def loss_by_part(losses: LossSums) -> dict[str, float]:
    """Return the mean loss of each part that has tokens, by metric name."""
    means = {"loss_document": losses.mean([PART_DOCUMENT]), "loss_thinking": losses.mean([PART_THINKING])}
    return {name: mean for name, mean in means.items() if mean is not None}


def _open_data(config: TrainConfig) -> _Data:
    def order(dataset: TokenDataset) -> SequenceOrder:
        weights = (config.data.loss_weights.document, config.data.loss_weights.thinking)
        return SequenceOrder(dataset, config.data.sequence_length, config.seed, document_attention=config.data.attention == "document", weights=weights)

    train = open_dataset(config.data.train)
    validation = None if config.data.validation is None else order(open_dataset(config.data.validation))
    wanted = config.validation_batches * config.global_batch_sequences
    if config.validate_every_steps and validation is not None and wanted > validation.sequences_per_epoch:
        raise ConfigError(
            f"validation_batches={config.validation_batches} x global_batch_sequences={config.global_batch_sequences} = {wanted} sequences, "
            f"but {config.data.validation} holds {validation.sequences_per_epoch}; lower validation_batches or give more validation data"
        )
    return _Data(train, order(train), validation)


def _resolve_vocabulary(config: TrainConfig, dataset: TokenDataset) -> TrainConfig:
    """Return the config with model.vocab_size set: the dataset's, or the config's where it is large enough."""
    needed = None if dataset.details is None else int(dataset.details["vocabulary_size"])
    given = config.model.vocab_size
    if not given and needed is None:
        raise ConfigError(f"model.vocab_size=0 takes the dataset's vocabulary, but {config.data.train} has no manifest that states one; give model.vocab_size")
    if needed is None:
        needed = dataset.largest_token() + 1
    if given and given < needed:
        raise ConfigError(f"model.vocab_size={given} is smaller than the vocabulary of {config.data.train}, {needed}; raise it")
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": given or needed})})


def _check_batch(config: TrainConfig, layout: groups.Layout) -> None:
    unit = config.micro_batch_sequences * layout.data_parallel_size
    for batch in reversed(config.progress.batches):
        if batch % unit:
            which = "global_batch_sequences" if batch == config.global_batch_sequences else "batch_ramp: a batch of"
            raise ConfigError(
                f"{which}{'=' if which.startswith('global') else ' '}{batch} is not a multiple of micro_batch_sequences={config.micro_batch_sequences} "
                f"x {layout.data_parallel_size} data-parallel rank(s) = {unit}; the nearest that are: {max(unit, batch // unit * unit)}"
                f" and {(batch // unit + 1) * unit}"
            )
