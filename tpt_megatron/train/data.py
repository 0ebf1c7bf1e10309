"""What every step reads: a run's sequences, with what each token is, as arrays for the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from tpt_megatron.config.data import DataConfig, Share, Stage
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import PART_DOCUMENT, PART_NAMES, TokenDataset, open_dataset, open_sources
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.mcore.engine import LossSums, MicroBatch
from tpt_megatron.sequences.stream import Stream

log = logging.getLogger(__name__)
PADDING = "padding"


class Kinds:
    """What labels can be: a source and a part each. Sources of one name are one, whatever dataset they are in; padding is the last kind."""

    def __init__(self, datasets: Mapping[str, TokenDataset]) -> None:
        self._of_documents: dict[str, npt.NDArray[np.uint16] | None] = {}
        self._numbers: dict[str, npt.NDArray[np.int32]] = {}
        self.sources: list[str | None] = []
        for path, dataset in datasets.items():
            names, self._of_documents[path] = open_sources(dataset)
            self.sources += [name for name in names if name not in self.sources]
            self._numbers[path] = np.array([self.sources.index(name) for name in names], np.int32)
        codes = sorted({code for dataset in datasets.values() for code in dataset.part_codes})
        self.parts = [PART_NAMES[code] for code in codes]
        self._of_parts = np.full(len(PART_NAMES), -1, np.int32)
        self._of_parts[codes] = range(len(codes))
        self.table: list[tuple[str | None, str]] = [(source, part) for source in self.sources for part in self.parts] + [(None, PADDING)]
        self.padding = len(self.table) - 1

    def of(self, path: str, document: int, parts: npt.NDArray[np.uint8] | int) -> npt.NDArray[np.int32] | np.int32:
        """Return the kinds of a document's tokens, which are of these parts (PART_*)."""
        numbers = self._of_documents[path]
        source = self._numbers[path][0 if numbers is None else numbers[document]]
        return np.int32(len(self.parts)) * source + self._of_parts[parts]  # type: ignore[no-any-return]

    def tokens(self, losses: LossSums) -> int:
        """Return how many labels there were, padding apart."""
        return int(losses.tokens[: self.padding].sum())

    def by_part(self, losses: LossSums, name: str = "loss") -> dict[str, float]:
        """Return the mean loss of each part that has tokens, by metric name."""
        means = {part: losses.mean([kind for kind, (_, other) in enumerate(self.table) if other == part]) for part in self.parts}
        return {f"{name}_{part}": mean for part, mean in means.items() if mean is not None}

    def by_source(self, losses: LossSums) -> dict[str, float]:
        """Return the mean loss of each source that has tokens; what has no source is `(none)`."""
        width = len(self.parts)
        means = {source: losses.mean(range(width * number, width * (number + 1))) for number, source in enumerate(self.sources)}
        return {"(none)" if source is None else source: mean for source, mean in means.items() if mean is not None}


class Batches:
    """A stream's sequences as micro-batches."""

    def __init__(self, config: DataConfig, stream: Stream, datasets: Mapping[str, TokenDataset], kinds: Kinds) -> None:
        self._config, self.stream, self._datasets, self._kinds = config, stream, datasets, kinds
        weights = [getattr(config.loss_weights, part) for part in kinds.parts]
        self._weights = np.array(weights * len(kinds.sources) + [0.0], np.float32)  # [kinds]

    def micro_batch(self, sequences: range) -> MicroBatch:
        """Return the sequences of these numbers (counted from the run's start) as one batch."""
        shape = (len(sequences), self._config.sequence_length + 1)
        tokens, kinds, documents = np.zeros(shape, np.int64), np.full(shape, self._kinds.padding, np.int32), np.zeros(shape, np.int32)
        for row, number in enumerate(sequences):
            self._fill(number, tokens[row], kinds[row], documents[row])
        labels = np.ascontiguousarray(kinds[:, 1:])
        return MicroBatch(
            tokens=np.ascontiguousarray(tokens[:, :-1]),
            labels=np.ascontiguousarray(tokens[:, 1:]),
            weights=self._weights[labels],
            kinds=labels,
            documents=np.ascontiguousarray(documents[:, :-1]) if self._config.attention == "document" else None,
        )

    def _fill(self, number: int, tokens: npt.NDArray[np.int64], kinds: npt.NDArray[np.int32], documents: npt.NDArray[np.int32]) -> None:
        """Write one sequence into its rows, each [s + 1]. Padding is the end-of-document token, or 0, and a document of its own."""
        path, spans = self.stream.spans(number)
        dataset = self._datasets[path]
        at = 0
        for place, span in enumerate(spans):
            source = dataset.begin(span.document) + span.first
            here = slice(at, at + span.tokens)
            tokens[here] = dataset.tokens[source : source + span.tokens]
            parts = PART_DOCUMENT if dataset.parts is None else dataset.parts[source : source + span.tokens]
            kinds[here] = self._kinds.of(path, span.document, parts)
            documents[here] = place
            at += span.tokens
        tokens[at:] = (dataset.details or {}).get("eod_id", 0)
        documents[at:] = len(spans)


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything a run reads. datasets: the training ones, by path; opened: validation's, too; validation: by name, "" for the one that has none.

    config: the run's, its length in steps, which a length in epochs has only now that the datasets are open
    """

    config: TrainConfig
    datasets: dict[str, TokenDataset]
    opened: dict[str, TokenDataset]
    train: Batches
    validation: dict[str, Batches]
    with_parts: dict[str, bool]
    """Of each validation set, whether its tokens' parts are known."""
    kinds: Kinds

    def check_passed_over(self, sequences: int) -> None:
        """Raise ConfigError where a run that passes over so many sequences reads beyond its token budgets or max_epochs."""
        reads = self.config.progress.sequences_before(self.config.last_step + 1) + sequences
        try:
            self.config.data.check_lengths(reads)
            self.train.stream.check_epochs(reads)
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"with the {sequences} sequences that are passed over since the run went back: {error}") from None

    @property
    def has_parts(self) -> bool:
        """Say whether any training dataset tells what its tokens are."""
        return any(dataset.parts is not None for dataset in self.datasets.values())


def open_run_data(config: TrainConfig) -> RunData:
    """Open a run's datasets, and refuse, before any step, what cannot be read as the config says: ConfigError or DataError."""
    data = config.data
    sets = data.validation_sets if config.validate_every_steps else {}
    datasets = {path: open_dataset(path) for path in dict.fromkeys([*data.train_paths, *sets.values()])}
    _check_tokenizers(datasets)
    _check_weights(data, datasets)
    kinds = Kinds(datasets)

    def batches(stages: Sequence[Stage]) -> Batches:
        return Batches(data, Stream(data, stages, datasets, config.seed), datasets, kinds)

    train = batches(data.blends)
    config = _in_steps(config, train.stream)
    train.stream.check_epochs(config.progress.sequences_before(config.last_step + 1))
    validation = {name: batches([Stage(train=(Share(path=path),))]) for name, path in sets.items()}
    wanted = config.validation_batches * config.global_batch_sequences
    for name, path in sets.items():
        held = validation[name].stream.sequences_per_epoch(path)
        if wanted > held:
            raise ConfigError(
                f"validation_batches={config.validation_batches} x global_batch_sequences={config.global_batch_sequences} = {wanted} sequences, "
                f"but {path} holds {held}; lower validation_batches or give more validation data"
            )
    with_parts = {name: datasets[path].parts is not None for name, path in sets.items()}
    return RunData(config, {path: datasets[path] for path in data.train_paths}, datasets, train, validation, with_parts, kinds)


def resolve_vocabulary(config: TrainConfig, datasets: Mapping[str, TokenDataset]) -> TrainConfig:
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


def _in_steps(config: TrainConfig, stream: Stream) -> TrainConfig:
    """Return the config with its length in steps, where it is given in epochs."""
    if config.epochs is None:
        return config
    (path,) = config.data.train_paths
    sequences = stream.sequences_per_epoch(path)
    try:
        found = config.in_steps(sequences)
    except ValidationError as error:
        raise ConfigError(f"epochs={config.epochs:g} of {path}, {sequences:,} sequences: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    log.info("%s: %s sequences; %g epochs of it are %d steps", path, f"{sequences:,}", config.epochs, found.last_step)
    return found


def _check_weights(config: DataConfig, datasets: Mapping[str, TokenDataset]) -> None:
    """Raise ConfigError for a dataset that no token counts of."""
    for path, dataset in datasets.items():
        weights = {PART_NAMES[part]: getattr(config.loss_weights, PART_NAMES[part]) for part in dataset.part_codes}
        if not any(weights.values()):
            raise ConfigError(f"data.loss_weights: {' and '.join(weights)} weigh 0, and {path} has nothing else: there is nothing to learn from it")


def _check_tokenizers(datasets: Mapping[str, TokenDataset]) -> None:
    known = [(path, dataset.details["tokenizer_fingerprint"]) for path, dataset in datasets.items() if dataset.details is not None]
    for path, fingerprint in known[1:]:
        if fingerprint != known[0][1]:
            raise DataError(f"{path} was made with another tokenizer than {known[0][0]}; preprocess both with one")


def step_batches(batches: Batches, first_sequence: int, *, global_batch: int, micro_batch: int, rank: int, ranks: int) -> list[MicroBatch]:
    """Return data-parallel rank `rank`'s micro-batches of the step whose sequences start at `first_sequence`.

    The step's sequences are dealt so that which ones it sees does not depend on the number of ranks.
    """
    per_rank = global_batch // ranks
    start = first_sequence + rank * per_rank
    return [batches.micro_batch(range(at, at + micro_batch)) for at in range(start, start + per_rank, micro_batch)]
