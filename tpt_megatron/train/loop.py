"""The training loop: what happens when. How a step is computed is mcore's business."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import orjson

from tpt_megatron.config.train import TrainConfig
from tpt_megatron.config.watching import WatchConfig
from tpt_megatron.convert.families import family_of
from tpt_megatron.errors import ConversionError, DataError, Stopped
from tpt_megatron.files import read_json, write_json
from tpt_megatron.log import Bar, progress_bar
from tpt_megatron.mcore import groups
from tpt_megatron.mcore.engine import Engine, MicroBatch
from tpt_megatron.mcore.model import count_parameters
from tpt_megatron.train.ahead import ReadAhead
from tpt_megatron.train.data import Batches, RunData, open_run_data, resolve_vocabulary, step_batches
from tpt_megatron.train.guard import StepGuard
from tpt_megatron.train.lock import alone_in
from tpt_megatron.train.metrics import MetricsFile, Speed, cut_after, git_revision, versions
from tpt_megatron.train.profiler import StepProfiler
from tpt_megatron.train.saving import Position, Saving, arm_of
from tpt_megatron.train.schedule import learning_rate
from tpt_megatron.train.signals import StopRequest
from tpt_megatron.train.stragglers import Stragglers
from tpt_megatron.train.trackers import Trackers
from tpt_megatron.train.watchdog import Watchdog

log = logging.getLogger(__name__)
SKIPPED = "skipped.jsonl"


def run_train(config: TrainConfig) -> None:
    """Train, from the run folder's latest checkpoint where there is one, to its last step.

    Alone or as one rank under torchrun. Raises ConfigError, DataError or CheckpointError before any step is taken when
    something does not fit, and Stopped after saving when a signal came.
    """
    layout = groups.join(config.parallel)
    try:
        config.check_batches(layout.data_parallel_size)
        data = open_run_data(config)
        with alone_in(config.run_dir):
            Run(config, layout, data).train()
    finally:
        groups.leave()


class Run:
    """One run on one rank: config, data and engine, and the order in which things happen to them."""

    def __init__(self, config: TrainConfig, layout: groups.Layout, data: RunData) -> None:
        self._layout, self._data = layout, data
        self._epochs = config.epochs
        self._config = resolve_vocabulary(self._data.config, self._data.opened)
        self._stragglers = Stragglers(config.watch.stragglers)
        self._engine = Engine(self._config, kinds=len(self._data.kinds.table), around_forward=self._stragglers.forward)
        self._saving = Saving(self._config, self._engine, self._data, layout.rank)
        self._position = Position()
        self._guard = StepGuard(config.faults)
        self._rollbacks = 0
        self._saved_in_s = 0.0
        self._speed = Speed(self._config, layout.world_size)
        self._ahead = ReadAhead(partial(self._batches, self._data.train))

    def train(self) -> None:
        """Take every step that is left, measuring, validating and saving on the way."""
        config, layout = self._config, self._layout
        self._saving.catch_up()
        self._continue_from(self._saving.resume())
        self._saving.follow()
        if self._position.step >= config.last_step:
            log.info("%s: all %d steps were already done", config.run_dir, config.last_step)
            self._saving.wait_for_mirror(lambda: None)
            return
        rank_0 = layout.rank == 0
        description = groups.ask_rank_0(self._begin_records)
        if rank_0:
            _say_what_cannot_be_exported(config)
        with ExitStack() as stack:
            stack.callback(self._saving.close)
            stack.enter_context(self._stragglers)
            stack.enter_context(self._ahead)
            stack.enter_context(old_objects_left_alone())
            metrics = stack.enter_context(MetricsFile(config.run_dir / "metrics.jsonl" if rank_0 else None, self._position.step))
            trackers = stack.enter_context(Trackers(config.watch if rank_0 else WatchConfig(), config.run_dir, self._position.step, description))
            profiler = stack.enter_context(StepProfiler(config.watch.profile, config.run_dir / "profile", layout.rank))
            watchdog = stack.enter_context(Watchdog(config.faults.stall_seconds, config.run_dir / "stalls", layout.rank))
            stop = stack.enter_context(StopRequest())
            bar = stack.enter_context(progress_bar("train", config.last_step, completed=self._position.step))
            while self._position.step < config.last_step:
                step = self._position.step + 1
                watchdog.step(f"step {step}")
                profiler.before(step)
                line = self._step(step)
                profiler.after(step)
                line |= self._stragglers.compare(step)
                self._saving.poll()
                if config.validate_every_steps and step % config.validate_every_steps == 0:
                    line |= self._validate(partial(watchdog.step, f"validation after step {step}"))
                metrics.write(line)
                trackers.write(line)
                self._say(line, bar)
                if self._guard.is_lost:
                    self._go_back(metrics, trackers, bar)
                    continue
                stopping = groups.any_rank(stop.asked)
                if stopping or step == config.last_step or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0):
                    watchdog.step(f"saving after step {step}")
                    metrics.sync()
                    self._save(line)
                if stopping:
                    break
            self._saving.wait()
            self._saving.wait_for_mirror(lambda: watchdog.step("copying checkpoints to their mirror"))
            if self._position.step < config.last_step:
                raise Stopped(f"{config.run_dir}: stopped by a signal after saving step {step}; run the same command again to continue")

    def _step(self, step: int) -> dict[str, Any]:
        """Take step number `step` (from 1) and return its metrics."""
        config, kinds = self._config, self._data.kinds
        began = time.perf_counter()
        rate, first = learning_rate(config, step), self._first_sequence(step)
        batches = self._ahead.take(first, config.progress.batch(step))
        data_seconds = time.perf_counter() - began
        if step < config.last_step:
            self._ahead.begin(self._first_sequence(step + 1), config.progress.batch(step + 1))
        result = self._engine.train_step(batches, rate, self._guard.accept)
        seconds, tokens = time.perf_counter() - began, kinds.tokens(result.losses)
        self._position.step = step
        self._position.tokens_seen += tokens
        line: dict[str, Any] = {
            "step": step,
            "first_sequence": first,
            "tokens_seen": self._position.tokens_seen,
            "loss": result.losses.loss,
            **(kinds.by_part(result.losses) if self._data.has_parts else {}),
            **({"loss_by_source": kinds.by_source(result.losses)} if len(kinds.sources) > 1 else {}),
            "gradient_norm": result.gradient_norm,
            "learning_rate": rate,
            **self._speed.metrics(tokens, config.progress.batch(step) * config.data.sequence_length, seconds),
            "step_time_s": seconds,
            "data_time_s": data_seconds,
            "checkpoint_time_s": self._saved_in_s,
            **({"mirror_time_s": mirrored_in_s} if (mirrored_in_s := self._saving.take_mirror_time()) else {}),
        }
        self._saved_in_s = 0.0
        if not result.updated:
            line["skipped"] = self._guard.reason
            self._record_skip(line, range(first, first + config.progress.batch(step)))
        return line

    def _first_sequence(self, step: int) -> int:
        """Return the number of the first training sequence of a step."""
        return self._config.progress.sequences_before(step) + self._position.passed_over

    def _continue_from(self, position: Position) -> None:
        if position.passed_over:
            self._data.check_passed_over(position.passed_over)
        self._position = position
        self._guard = StepGuard(self._config.faults, position.norms, position.skips_in_a_row)

    def _save(self, line: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        self._position.norms, self._position.skips_in_a_row = self._guard.norms, self._guard.skips_in_a_row
        self._saving.save(self._position, line.get("validation_loss"))
        self._saved_in_s = time.perf_counter() - began

    def _go_back(self, metrics: MetricsFile, trackers: Trackers, bar: Bar) -> None:
        """Go back to the last checkpoint of before, and on with the data that comes after what was not learned from. DataError where that is not allowed."""
        lost, config = self._position, self._config
        reason = f"{config.run_dir}: step {lost.step}, the last of {self._guard.skips_in_a_row} in a row, has {self._guard.reason}"
        advice = "lower optimizer.learning_rate, or look at the documents in skipped.jsonl; the last checkpoint is untouched"
        if self._rollbacks >= config.faults.rollbacks:
            after = f" after {self._rollbacks} rollback(s)" if self._rollbacks else ""
            raise DataError(f"{reason}{after}; {advice}")
        if not lost.sound:
            raise DataError(f"{reason}, and there is no checkpoint of before to go back to; {advice}")
        self._saving.wait()
        self._ahead.wait()
        back = self._saving.go_back(lost.sound)
        self._rollbacks += 1
        back.passed_over = self._first_sequence(lost.step + 1) - config.progress.sequences_before(back.step + 1)
        self._continue_from(back)
        metrics.take_back(back.step)
        trackers.take_back(back.step)
        bar.advance(back.step - lost.step)
        log.warning("%s: back to step %d, and on with the data after step %d", reason, back.step, lost.step)

    def _record_skip(self, line: Mapping[str, Any], sequences: range) -> None:
        """Say it, and keep in skipped.jsonl what the step saw: one JSON object a step."""
        if self._layout.rank != 0:
            return
        log.warning("step %d is not learned from: %s; its documents are in %s", line["step"], line["skipped"], self._config.run_dir / SKIPPED)
        self._ahead.wait()
        documents = [asdict(seen) for seen in self._data.train.stream.documents(sequences)]
        record = {"step": line["step"], "reason": line["skipped"], "sequences": [sequences.start, sequences.stop], "documents": documents}
        with open(self._config.run_dir / SKIPPED, "ab") as file:
            file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def _say(self, line: Mapping[str, Any], bar: Bar) -> None:
        step, last = line["step"], self._config.last_step
        bar.say(f"loss {line['loss']:.4f}, {line['tokens_per_second']:,.0f} tokens/s")
        bar.advance()
        if step % self._config.watch.log_every_steps == 0 or step == last:
            losses = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in line.items() if name.startswith("validation_loss"))
            speed = f"{line['tokens_per_second']:,.0f} tokens/s, {line['step_time_s']:.3g} s"
            log.info("step %d of %d: loss %.4f%s, gradient norm %.3g, %s", step, last, line["loss"], losses, line["gradient_norm"], speed)

    def _batches(self, source: Batches, first_sequence: int, count: int) -> list[MicroBatch]:
        config, layout = self._config, self._layout
        return step_batches(
            source,
            first_sequence,
            global_batch=count,
            micro_batch=config.micro_batch_sequences,
            rank=layout.data_parallel_rank,
            ranks=layout.data_parallel_size,
        )

    def _validate(self, still_at_it: Callable[[], None]) -> dict[str, float]:
        """Return the loss of each validation set, and of its parts: `validation_loss`, or `validation_loss/NAME` of named sets.

        `still_at_it` is called before each batch: a validation may take longer than a rank may stall.
        """
        config = self._config
        losses: dict[str, float] = {}
        for name, source in self._data.validation.items():
            batch = config.global_batch_sequences
            sums = []
            for number in range(config.validation_batches):
                still_at_it()
                sums.append(self._engine.evaluate(self._batches(source, number * batch, batch)))
            total = sum(sums[1:], sums[0])
            found = {"validation_loss": total.loss}
            if self._data.with_parts[name]:
                found |= self._data.kinds.by_part(total, "validation_loss")
            losses |= {f"{key}/{name}" if name else key: value for key, value in found.items()}
        return losses

    def _begin_records(self) -> dict[str, Any]:
        """Take back what skipped.jsonl has of steps that come again; write run.json, to which each session of a run is added, and return what is in it."""
        config, path, skipped = self._config, self._config.run_dir / "run.json", self._config.run_dir / SKIPPED
        if skipped.exists():
            cut_after(skipped, self._position.step)
        described = read_json(path) if path.exists() else {"sessions": []}
        if not isinstance(described, dict) or not isinstance(described.get("sessions"), list):
            raise DataError(f"{path}: not a run's description; it was damaged, move it away")
        session: dict[str, Any] = {
            "first_step": self._position.step + 1,
            "config": config.model_dump(mode="json"),
            "world_size": self._layout.world_size,
            "versions": versions(),
            "git_revision": git_revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        if described["sessions"] and (changes := list(_changes(described.get("config", {}), session["config"]))):
            log.warning("%s: the config is not the last session's: %s", config.run_dir, ", ".join(changes))
        description = {
            "arm": arm_of(self._data.datasets),
            "config": session["config"],
            **({} if self._epochs is None else {"epochs": self._epochs}),
            "parameters": count_parameters(config.model),
            "data": {path: dataset.details for path, dataset in self._data.datasets.items()},
            "sequences": self._data.train.stream.fingerprint(),
            "sessions": [*described["sessions"], session],
        }
        write_json(path, description)
        return description


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Leave what there is now out of Python's garbage collections: it is half a million objects, whose every visit takes a rank tenths of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _changes(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Say which values of a config are others than before."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in {**before, **after}:
            yield from _changes(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif before != after:
        yield f"{key} {orjson.dumps(before).decode()} -> {orjson.dumps(after).decode()}"


def _say_what_cannot_be_exported(config: TrainConfig) -> None:
    """Warn of a model that has no Hugging Face format, which `tpt convert export` would say only when it is trained."""
    try:
        family_of(config.model)
    except ConversionError as error:
        log.warning("this model can be trained and continued, but not exported: %s", error)
