"""Running a generator over all inputs: a shard of output for each input file, each finished or absent.

    OUTPUT/shards/00000.jsonl           augmented documents of the first input file
    OUTPUT/shards/00000.manifest.json   written after the shard: which input, which settings, counts, checksums
    OUTPUT/bad/00000.jsonl              its records that could not be used, if any
    OUTPUT/manifest.json                written last: the output is complete

A run that was cut off is run again: shards whose manifest still holds are kept as they are.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson

from tpt_megatron.augment.generators import Generator, make_generator
from tpt_megatron.bad_records import BadRecords, LineCounts, read_records
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import ConfigError, DataError, RecordError
from tpt_megatron.files import (
    AUGMENTED,
    Manifest,
    check_outputs,
    describe_file,
    expand_inputs,
    open_atomic,
    read_manifest,
    refuse_inputs_in_output,
    remove_leftovers,
)
from tpt_megatron.log import Bar, progress_bar
from tpt_megatron.records import AugmentedDocument, augmented_to_record, read_augmented

logger = logging.getLogger(__name__)
SHARD_KIND = "augmented_shard"


def run_augment(config: AugmentConfig) -> Manifest:
    """Write the augmented documents of all inputs to `config.output` and return the manifest.

    An input whose content has changed since is augmented again. Raises ConfigError when the output holds results of other
    settings or of inputs of other names, or when an input lies in it; DataError for an input that cannot be read, and when
    not one record could be used; and under on_bad_record=fail RecordError for the first bad record.
    """
    refuse_inputs_in_output(config.input, config.output)
    inputs = expand_inputs(config.input)
    settings = config.model_dump(mode="json", exclude={"input", "output"})
    _check_output(config.output, settings, len(inputs))
    generator, bad = make_generator(config.generator), BadRecords(config.on_bad_record)
    shards = []
    with progress_bar("augment", sum(path.stat().st_size for path in inputs)) as bar:
        for number, path in enumerate(inputs):
            manifest = _finished_shard(config.output, number, path)
            if manifest is not None:
                logger.info("%s: finished before, kept", config.output / _shard_name(number))
                bar.advance(path.stat().st_size)
            else:
                (config.output / "manifest.json").unlink(missing_ok=True)  # not complete any more
                manifest = _write_shard(config, settings, generator, bad, number, path, bar)
            shards.append(manifest)
    bad.summarise(config.output / "bad")
    manifest = Manifest(
        kind=AUGMENTED,
        settings=settings,
        inputs=tuple(entry for shard in shards for entry in shard.inputs),
        outputs=tuple(entry for shard in shards for entry in shard.outputs),
        counts={name: sum(shard.counts[name] for shard in shards) for name in shards[0].counts},
    )
    counts = manifest.counts
    if counts["bad_records"] and not counts["documents"]:
        raise DataError(f"{config.output}: none of the {counts['lines_read']} lines of {', '.join(config.input)} gave a document; the reasons are above")
    assert counts["lines_read"] == counts["documents"] + counts["bad_records"] + counts["blank_lines"]
    manifest.write(config.output / "manifest.json")
    return manifest


def _shard_name(number: int) -> str:
    return f"shards/{number:05d}.jsonl"


def _shard_manifest(output: Path, number: int) -> Path:
    return output / f"shards/{number:05d}.manifest.json"


def _check_output(output: Path, settings: dict[str, Any], shards: int) -> None:
    """Refuse an output folder whose shards another config made; clear what a killed run left under temporary names."""
    for folder in ("shards", "bad"):
        remove_leftovers(output / folder)
    finished = sorted((output / "shards").glob("*.manifest.json"))
    for path in finished:
        if read_manifest(path, SHARD_KIND).settings != settings:
            raise ConfigError(f"output={output}: holds results of other settings ({path.name}); give another output, or remove the folder")
    known = {_shard_manifest(output, number) for number in range(shards)}
    if any(path not in known for path in finished):
        raise ConfigError(f"output={output}: holds shards of more inputs than the {shards} given now; give another output, or remove the folder")


def _finished_shard(output: Path, number: int, path: Path) -> Manifest | None:
    """Return the manifest of a shard that is finished, undamaged, and made from this very input; None otherwise."""
    manifest_path = _shard_manifest(output, number)
    if not manifest_path.is_file():
        return None
    manifest = read_manifest(manifest_path, SHARD_KIND)
    if manifest.inputs[0].name != str(path):
        raise ConfigError(
            f"output={output}: {_shard_name(number)} was made from {manifest.inputs[0].name}, not {path}; give another output, or remove the folder"
        )
    if manifest.inputs != (describe_file(path, str(path)),):
        logger.info("%s: its input is not the one it was made from; made again", output / _shard_name(number))
        return None
    try:
        check_outputs(manifest, output, checksums=True)
    except DataError as error:
        logger.warning("%s", error)
        return None
    return manifest


def _write_shard(config: AugmentConfig, settings: dict[str, Any], generator: Generator, bad: BadRecords, number: int, path: Path, bar: Bar) -> Manifest:
    """Write one shard, its bad records and, last, its manifest."""

    def augment(value: Any, where: str) -> tuple[bytes, int]:
        """Return the line to write, and its number of thoughts; those that the record brought along stay."""
        given = read_augmented(value, where, config.fields.names())
        augmented = AugmentedDocument(given.document, given.thoughts + generator.think(given.document, where))
        try:
            return orjson.dumps(augmented_to_record(augmented), option=orjson.OPT_APPEND_NEWLINE), len(augmented.thoughts)
        except orjson.JSONEncodeError as error:
            raise RecordError(where, f"cannot be written as JSON: {error}") from None

    shard, aside = config.output / _shard_name(number), config.output / f"bad/{number:05d}.jsonl"
    _shard_manifest(config.output, number).unlink(missing_ok=True)
    lines, thoughts = LineCounts(), 0
    with ExitStack() as stack:
        file = stack.enter_context(open_atomic(shard))
        stack.enter_context(bad.kept_in(aside))
        for line, count in read_records(path, augment, bad, lines, bar.advance):
            thoughts += count
            file.write(line)
    written = [shard, aside] if lines.bad_records else [shard]
    manifest = Manifest(
        kind=SHARD_KIND,
        settings=settings,
        inputs=(describe_file(path, str(path)),),
        outputs=tuple(describe_file(made, str(made.relative_to(config.output))) for made in written),
        counts={
            "documents": lines.records,
            "thoughts": thoughts,
            "bad_records": lines.bad_records,
            "blank_lines": lines.blank_lines,
            "lines_read": lines.lines_read,
        },
    )
    manifest.write(_shard_manifest(config.output, number))
    return manifest
