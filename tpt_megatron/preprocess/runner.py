"""Preprocessing: one pass over the documents writes every arm, so that all arms hold the very same documents.

    OUTPUT/ARM/train.{bin,idx,...}         see `tpt_megatron.datasets`
    OUTPUT/ARM/validation.{bin,idx,...}    where validation_fraction > 0
    OUTPUT/bad_records.jsonl               the records that could not be used, if any

An arm is finished when its manifests are there. Running again keeps finished arms and writes the others.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tpt_megatron.bad_records import BadRecords, LineCounts, read_records
from tpt_megatron.config.preprocess import Arm, PreprocessConfig
from tpt_megatron.datasets import MANIFEST_KIND, sidecar
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.files import FileEntry, Manifest, check_outputs, describe_file, read_manifest, remove_leftovers
from tpt_megatron.log import progress_bar
from tpt_megatron.preprocess.compose import compose
from tpt_megatron.preprocess.dataset import DatasetWriter
from tpt_megatron.record_files import expand_inputs, refuse_inputs_in_output
from tpt_megatron.records import AugmentedDocument, read_augmented
from tpt_megatron.storage import LocalLocation, Location
from tpt_megatron.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)
DOCUMENTS_PER_BATCH = 1000
CHARACTERS_PER_BATCH = 8_000_000

Writers = dict[tuple[Arm, str], DatasetWriter]


def run_preprocess(config: PreprocessConfig) -> dict[str, Manifest]:
    """Write each arm's datasets and return their manifests by `ARM/SPLIT`.

    Raises ConfigError when the tokenizer cannot express a delimiter, or when the output holds datasets of other settings
    or inputs; DataError for an input that cannot be read and for a split without documents; and under on_bad_record=fail
    RecordError for the first bad record.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    _check_delimiters(config, tokenizer)
    refuse_inputs_in_output(config.input, LocalLocation(config.output))
    inputs = expand_inputs(config.input)
    entries = tuple(describe_file(path, str(path)) for path in inputs)
    finished: dict[str, Manifest] = {}
    pending: list[Arm] = []
    for arm in config.arms:
        manifests = _finished_arm(config, arm, _settings(config, arm, tokenizer), entries)
        finished.update(manifests)
        if manifests:
            logger.info("%s: finished before, kept", config.output / arm)
        else:
            pending.append(arm)
    if pending:
        finished.update(_write_arms(config, tokenizer, pending, inputs, entries))
    return {name: finished[name] for arm in config.arms for name in (f"{arm}/{split}" for split in _splits(config))}


def in_validation(identity: str, fraction: float) -> bool:
    """Say whether the document of this id belongs to the validation split: its id's SHA-256 decides, in every arm alike."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") < fraction * 2**64


def _splits(config: PreprocessConfig) -> tuple[str, ...]:
    return ("train", "validation") if config.validation_fraction > 0 else ("train",)


def _settings(config: PreprocessConfig, arm: Arm, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what an arm's datasets depend on besides the inputs; the tokenizer by what it is, not where it lies."""
    return {
        **config.model_dump(mode="json", exclude={"input", "output", "arms", "tokenizer"}),
        "arm": arm,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }


def _check_delimiters(config: PreprocessConfig, tokenizer: Tokenizer) -> None:
    unknown = tokenizer.unknown_id
    if unknown is None or set(config.arms) == {"vanilla"}:
        return
    for name, text in config.delimiters.model_dump().items():
        if unknown in tokenizer.encode(text):
            raise ConfigError(f"delimiters.{name}={text!r} is unknown to the tokenizer {config.tokenizer}; give a text that its vocabulary holds")


def _finished_arm(config: PreprocessConfig, arm: Arm, settings: dict[str, Any], inputs: tuple[FileEntry, ...]) -> dict[str, Manifest]:
    """Return an arm's manifests by ARM/SPLIT when all its datasets are there and undamaged; nothing otherwise."""
    folder, manifests = config.output / arm, {}
    remove_leftovers(folder)
    for path in sorted(folder.glob("*.manifest.json")):
        manifest = read_manifest(path, MANIFEST_KIND)
        if manifest.settings != settings or manifest.inputs != inputs:
            what = "settings" if manifest.settings != settings else "inputs"
            raise ConfigError(f"output={config.output}: {path} was made from other {what}; give another output, or remove the folder")
        try:
            check_outputs(manifest, folder, checksums=True)
        except DataError as error:
            logger.warning("%s", error)
            return {}
        manifests[f"{arm}/{path.name.removesuffix('.manifest.json')}"] = manifest
    return manifests if set(manifests) == {f"{arm}/{split}" for split in _splits(config)} else {}


def _write_arms(config: PreprocessConfig, tokenizer: Tokenizer, arms: list[Arm], inputs: list[Location], entries: tuple[FileEntry, ...]) -> dict[str, Manifest]:
    lines, bad, without_thoughts = LineCounts(), BadRecords(config.on_bad_record), dict.fromkeys(_splits(config), 0)
    with ExitStack() as stack:
        stack.enter_context(bad.kept_in(config.output / "bad_records.jsonl"))
        writers: Writers = {}
        for arm in arms:
            for split in _splits(config):
                writer = DatasetWriter(config.output / arm / split, tokenizer)
                writers[arm, split] = stack.enter_context(writer)
        for batch in _batches(_read(config, inputs, bad, lines)):
            splits = ["validation" if in_validation(augmented.document.id, config.validation_fraction) else "train" for augmented in batch]
            for augmented, split in zip(batch, splits, strict=True):
                without_thoughts[split] += not augmented.thoughts
            _write_batch(config, tokenizer, batch, splits, arms, writers)
        _check_not_empty(config, writers, lines)
        manifests = {}
        for (arm, split), writer in writers.items():
            sidecar(writer.prefix, "manifest.json").unlink(missing_ok=True)  # of a dataset found damaged
            manifests[f"{arm}/{split}"] = _describe(config, arm, tokenizer, writer, writer.finish(), entries, lines, without_thoughts[split])
    bad.summarise(config.output / "bad_records.jsonl")
    assert lines.lines_read == lines.records + lines.bad_records + lines.blank_lines
    assert all(lines.records == sum(writers[arm, split].counts.documents for split in _splits(config)) for arm in arms)
    for name, manifest in manifests.items():
        manifest.write(sidecar(config.output / name, "manifest.json"))
    return manifests


def _read(config: PreprocessConfig, inputs: list[Location], bad: BadRecords, lines: LineCounts) -> Iterator[AugmentedDocument]:
    names = config.fields.names()
    with progress_bar("preprocess", sum(place.size() for place in inputs)) as bar:
        for path in inputs:
            yield from read_records(path, lambda value, where: read_augmented(value, where, names), bad, lines, bar.advance)


def _batches(documents: Iterable[AugmentedDocument]) -> Iterator[list[AugmentedDocument]]:
    """Group documents so that a batch keeps the tokenizer's threads busy and stays small in memory."""
    batch: list[AugmentedDocument] = []
    characters = 0
    for augmented in documents:
        batch.append(augmented)
        characters += len(augmented.document.text) + sum(len(thought.text) for thought in augmented.thoughts)
        if len(batch) >= DOCUMENTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_batch(config: PreprocessConfig, tokenizer: Tokenizer, batch: list[AugmentedDocument], splits: list[str], arms: list[Arm], writers: Writers) -> None:
    """Tokenise each different segment of the batch once, whichever arms hold it, and append every arm's documents."""
    composed = {arm: [compose(augmented, arm, config.delimiters) for augmented in batch] for arm in arms}
    texts = list({text: None for documents in composed.values() for segments in documents for _, text in segments})
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    for arm, documents in composed.items():
        for augmented, split, segments in zip(batch, splits, documents, strict=True):
            generators = dict.fromkeys(thought.generator for thought in augmented.thoughts) if arm != "vanilla" else {}
            document = augmented.document
            writers[arm, split].add([(part, ids[text]) for part, text in segments], document.id, document.source, "+".join(generators) or None)


def _check_not_empty(config: PreprocessConfig, writers: Writers, lines: LineCounts) -> None:
    for (_, split), writer in writers.items():
        if writer.counts.documents == 0:
            read = f"{lines.lines_read} lines read, {lines.bad_records} bad, {lines.blank_lines} blank"
            hint = f"; change validation_fraction={config.validation_fraction}" if lines.records else ""
            raise DataError(f"{config.output}: no document for {split} ({read}){hint}")


def _describe(
    config: PreprocessConfig,
    arm: Arm,
    tokenizer: Tokenizer,
    writer: DatasetWriter,
    files: list[Path],
    inputs: tuple[FileEntry, ...],
    lines: LineCounts,
    without_thoughts: int,
) -> Manifest:
    """Return the dataset's manifest, which is written last."""
    outputs = tuple(describe_file(path) for path in files)
    counts = writer.counts
    return Manifest(
        kind=MANIFEST_KIND,
        settings=_settings(config, arm, tokenizer),
        inputs=inputs,
        outputs=outputs,
        counts={
            "documents": counts.documents,
            "tokens": counts.tokens,
            "tokens_document": counts.tokens_document,
            "tokens_thinking": counts.tokens_thinking,
            "documents_without_thoughts": without_thoughts,
            "bad_records": lines.bad_records,
            "blank_lines": lines.blank_lines,
        },
        details={
            "arm": arm,
            "dtype": writer.dtype.name,
            "vocabulary_size": tokenizer.vocabulary_size,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "end_of_document": tokenizer.end_of_document,
            "eod_id": tokenizer.eod_id,
            "sha256": next(entry.sha256 for entry in outputs if entry.name == f"{writer.prefix.name}.bin"),
        },
    )
