"""The files of a `tpt value` output: a shard for each input file, which exists when its manifest does.

OUTPUT/plan.json                 settings and inputs that the output is made of; made first
OUTPUT/shards/00012.parquet      the input's documents in their order, in the input's format (gzip becomes zstd)
OUTPUT/shards/00012.manifest.json
OUTPUT/bad/00012.jsonl           records that could not be used, if any
OUTPUT/summary.json              what the values say
OUTPUT/manifest.json             written last: every shard is there. Of the same kind as that of `tpt augment`, so that whatever reads that reads this
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tpt_megatron.bad_records import WARNINGS_SHOWN, describe_bad_record
from tpt_megatron.config.value import ValueConfig
from tpt_megatron.errors import ConfigError, DataError, RecordError
from tpt_megatron.evaluate.value_statistics import ValueStatistics
from tpt_megatron.files import AUGMENTED, FileEntry, Manifest, check_outputs, describe_file, read_json, read_manifest, sha256_of
from tpt_megatron.record_files import Format, RecordWriter, encode_json, read_rows
from tpt_megatron.records import AugmentedDocument, check_thoughts, read_augmented, thought_to_record
from tpt_megatron.storage import Location, remove_unfinished

logger = logging.getLogger(__name__)
SHARD_KIND = "valued_shard"
PLAN_VERSION = 1
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 4_000_000
"""Documents that are valued together: so many that batches of like length are found among their sequences. It decides the batches, so it does not vary."""

Valued = Callable[[Sequence[AugmentedDocument], ValueStatistics, Counter[str]], list[AugmentedDocument]]
"""Gives documents back with their thoughts' values, and counts them."""


@dataclass(frozen=True, slots=True)
class ValuePlan:
    """What an output is made of. settings: all that its values depend on, models and tokenizers by what they are, not where they lie."""

    settings: dict[str, Any]
    inputs: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Return the plan as JSON."""
        return orjson.dumps(
            {"value_plan_version": PLAN_VERSION, "settings": self.settings, "inputs": self.inputs}, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SORT_KEYS
        )

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with the plan."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:16]

    def claim(self, output: Location) -> None:
        """Put the plan into the output; ConfigError where it holds what was made of other settings or inputs, or another stage's output."""
        place = output / "plan.json"
        if not place.is_file() and (output / "manifest.json").is_file():
            raise ConfigError(f"output={output}: holds something else (manifest.json, and no plan.json of tpt value); give another output")
        if not place.is_file() and place.create(self.to_bytes()):
            return
        found = read_json(place)
        if not isinstance(found, dict) or found.get("value_plan_version") != PLAN_VERSION:
            raise ConfigError(f"output={output}: holds an output of another stage or release; give another output")
        if found["settings"] != self.settings:
            key = next(key for key in sorted({*found["settings"], *self.settings}) if found["settings"].get(key) != self.settings.get(key))
            before, now = (orjson.dumps(settings.get(key)).decode()[:100] for settings in (found["settings"], self.settings))
            raise ConfigError(f"output={output}: holds values of other settings ({key}: {before}, now {now}); give another output, or remove the folder")
        if tuple(found["inputs"]) != self.inputs:
            raise ConfigError(f"output={output}: was begun with other inputs ({len(found['inputs'])}, now {len(self.inputs)}); give another output")


class ValueShards:
    """The shards of one output. scratch: a folder of this machine for what is not finished."""

    def __init__(self, config: ValueConfig, plan: ValuePlan, inputs: Sequence[Location], output: Location, scratch: Path) -> None:
        self._config, self._plan, self._inputs, self._output, self._scratch = config, plan.fingerprint(), inputs, output, scratch
        self._warnings = 0

    def finished(self) -> dict[int, Manifest]:
        """Return the manifests of the shards that are there, by number.

        Raises DataError where an input has changed since, and under on_bad_record=fail where one has bad records.
        """
        found = ((number, self._finished(number)) for number in range(len(self._inputs)))
        return {number: manifest for number, manifest in found if manifest is not None}

    def _finished(self, number: int) -> Manifest | None:
        """Return the manifest of a shard that is there; None where it is to be made, again if it is damaged or of another plan."""
        place, source = self._manifest(number), self._inputs[number]
        if not place.is_file():
            return None
        try:
            manifest = read_manifest(place, SHARD_KIND)
            check_outputs(manifest.model_copy(update={"outputs": _documents_of(manifest)}), self._output, checksums=False)
        except DataError as error:
            logger.warning("%s; the shard is made again", error)
            return None
        if manifest.details.get("plan") != self._plan:
            return None
        if manifest.details.get("input_stamp") != source.stamp() and sha256_of(source) != manifest.inputs[0].sha256:
            raise DataError(f"{source}: has changed since output={self._output} was begun; give another output, or restore the file")
        if self._config.on_bad_record == "fail" and manifest.counts["bad_records"]:
            raise DataError(f"{source}: {manifest.counts['bad_records']} bad records of it were set aside (see {self._output / 'bad'}); give another output")
        return manifest

    def make(self, number: int, valued: Valued, progress: Callable[[int], object]) -> None:
        """Read an input, have its documents valued, and write its shard, its manifest last. DataError for a file that cannot be read or changes meanwhile."""
        source, kind = self._inputs[number], _format(self._inputs[number].name)
        names = (f"shards/{number:05d}.{kind}", f"bad/{number:05d}.jsonl")
        made, bad = self._scratch / "documents", self._scratch / "bad"
        statistics, counts, stamp = ValueStatistics(), Counter[str](), source.stamp()
        with RecordWriter(made, kind) as writer, ExitStack() as stack:
            bad_file = None
            for chunk in _chunks(self._read(source, counts, progress)):
                documents = [given for given in chunk if isinstance(given, AugmentedDocument)]
                for refused in chunk:
                    if not isinstance(refused, AugmentedDocument):
                        bad_file = bad_file or stack.enter_context(open(bad, "wb"))
                        bad_file.write(describe_bad_record(*refused))
                if documents:
                    writer.write(valued(documents, statistics, counts))
        entry = FileEntry(name=str(source), bytes=source.size(), sha256=sha256_of(source))
        if source.stamp() != stamp:
            raise DataError(f"{source}: has changed while it was read; run the same command again")
        outputs = []
        for name, path, is_there in zip(names, (made, bad), (True, bad_file is not None), strict=True):
            place = self._output / name
            if is_there:
                place.upload(path)
                outputs.append(describe_file(path, name))
                path.unlink()
            else:
                place.remove()
        manifest = Manifest(
            kind=SHARD_KIND,
            settings={},
            inputs=(entry,),
            outputs=tuple(outputs),
            counts={name: counts[name] for name in COUNTS},
            details={"plan": self._plan, "input_stamp": stamp, "values": statistics.to_json()},
        )
        manifest.write(self._manifest(number))

    def _manifest(self, number: int) -> Location:
        return self._output / f"shards/{number:05d}.manifest.json"

    def _read(self, source: Location, counts: Counter[str], progress: Callable[[int], object]) -> Iterator[AugmentedDocument | tuple[bytes, RecordError]]:
        for row in read_rows(source, longest=int(self._config.max_record_megabytes * 1e6), progress=progress):
            counts["lines_read"] += 1
            if row.is_blank:
                counts["blank_lines"] += 1
                continue
            try:
                augmented = read_augmented(row.parse(), row.where, self._config.fields.names())
                check_thoughts(augmented, row.where, len(augmented.document.text))
                try:
                    encode_json((augmented.document.extra, [thought_to_record(thought) for thought in augmented.thoughts]))
                except TypeError as error:
                    raise RecordError(row.where, f"cannot be written as JSON: {error}") from None
            except RecordError as error:
                if self._config.on_bad_record == "fail":
                    raise
                counts["bad_records"] += 1
                self._warnings += 1
                if self._warnings <= WARNINGS_SHOWN:
                    logger.warning("%s; set aside", error)
                yield row.line(), error
                continue
            if any(self._config.field in thought.extra for thought in augmented.thoughts):
                raise DataError(f"{row.where}: a thought has a field {self._config.field!r} already; name another with field=NAME")
            yield augmented


COUNTS = (
    *("lines_read", "blank_lines", "bad_records", "documents", "documents_without_thoughts", "thoughts", "thoughts_with_value", "thoughts_without_value"),
    *("targets_cut", "contexts_cut", "saw_target"),
)
"""Of manifests. targets_cut, contexts_cut: thoughts whose target or context was too long for the model; saw_target: those that had seen it."""


def describe(output: Location, plan: ValuePlan, shards: Sequence[Manifest]) -> Manifest:
    """Return the manifest of an output of which every shard is there, and remove what killed runs left. DataError where there is no document."""
    counts = {name: sum(shard.counts[name] for shard in shards) for name in COUNTS}
    assert counts["lines_read"] == counts["documents"] + counts["bad_records"] + counts["blank_lines"]
    if not counts["documents"]:
        raise DataError(f"{output}: none of the {counts['lines_read']} lines of the input gave a document; the reasons are above and in bad/")
    statistics = ValueStatistics()
    for shard in shards:
        statistics.merge(ValueStatistics.from_json(shard.details["values"]))
    for name in ("shards", "bad"):
        remove_unfinished(output / name)
    return Manifest(
        kind=AUGMENTED,
        settings=plan.settings,
        inputs=tuple(shard.inputs[0] for shard in shards),
        outputs=tuple(entry for shard in shards for entry in shard.outputs),
        counts=counts,
        details={"shards": len(shards), "values": statistics.to_json()},
    )


def _documents_of(manifest: Manifest) -> tuple[FileEntry, ...]:
    """Return the shard itself; what lies in bad/ is for people, who may clear it."""
    return tuple(entry for entry in manifest.outputs if entry.name.startswith("shards/"))


def _format(name: str) -> Format:
    if name.endswith(".parquet"):
        return "parquet"
    return "jsonl.zst" if name.endswith((".gz", ".zst")) else "jsonl"


def _chunks(
    records: Iterator[AugmentedDocument | tuple[bytes, RecordError]],
) -> Iterator[list[AugmentedDocument | tuple[bytes, RecordError]]]:
    chunk: list[AugmentedDocument | tuple[bytes, RecordError]] = []
    characters = 0
    for record in records:
        chunk.append(record)
        if isinstance(record, AugmentedDocument):
            characters += len(record.document.text) + sum(len(thought.text) for thought in record.thoughts)
        if len(chunk) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
