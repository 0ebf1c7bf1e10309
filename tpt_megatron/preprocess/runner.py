"""Preprocessing: one pass over the documents makes every arm, so that all arms hold the very same documents.

    OUTPUT/ARM/train.{bin,idx,...}         see `tpt_megatron.datasets`
    OUTPUT/ARM/validation.{bin,idx,...}    where validation_fraction > 0
    OUTPUT/bad_records.jsonl               the records that could not be used, if any
    OUTPUT/plan.json                       the pieces that the input was cut into
    OUTPUT/pieces/                         what is finished of an unfinished run, see `pieces.py`

An arm is finished when its manifests are there. The same command goes on where the last one ended, however that was: finished
pieces and finished arms are kept. What comes out depends on the inputs and the settings only, not on workers, shards or interruptions.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType
from typing import Any

from tpt_megatron.config.preprocess import Arm, PreprocessConfig
from tpt_megatron.datasets import MANIFEST_KIND
from tpt_megatron.delimiters import check_delimiters
from tpt_megatron.errors import ConfigError, DataError, Stopped, TptError
from tpt_megatron.files import Manifest, check_outputs, read_json, read_manifest, sha256_of, write_json
from tpt_megatron.log import progress_bar, set_up_logging
from tpt_megatron.preprocess.chat import ChatReader, check_chat
from tpt_megatron.preprocess.choosing import check_scored
from tpt_megatron.preprocess.duplicates import NearKeys
from tpt_megatron.preprocess.encoding import Encoder, Engine, choose_engine
from tpt_megatron.preprocess.finish import Joining, finish, forget_pieces
from tpt_megatron.preprocess.pieces import FinishedPiece, PieceWorker, splits
from tpt_megatron.preprocess.plan import Piece, Plan, make_plan, part_of
from tpt_megatron.preprocess.templates import ChatTemplate, load_template
from tpt_megatron.processes import WorkerProcesses, end_with_parent
from tpt_megatron.record_files import Row, expand_inputs, read_rows, refuse_inputs_in_output
from tpt_megatron.records import read_augmented
from tpt_megatron.storage import LocalLocation, Location, explain, remove_unfinished
from tpt_megatron.tokenizer import TokenizerLike, load_tokenizer

logger = logging.getLogger(__name__)
LOOK_AGAIN_S, COUNT_AGAIN_S = 0.1, 2.0
SAMPLE_RECORDS, SAMPLE_CHARACTERS, SAMPLE_FILES = 64, 100_000, 8


def run_preprocess(config: PreprocessConfig) -> dict[str, Manifest]:
    """Make each arm's datasets and return their manifests by `ARM/SPLIT`; with `shard`, do that part of the work and return nothing.

    Raises ConfigError when the tokenizer cannot express a delimiter or a chat template, or when the output holds datasets of other settings
    or inputs; DataError for an input that cannot be read and for a split without documents; under on_bad_record=fail
    RecordError for the first bad record; Stopped after a signal.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.end_of_document)
    template = None
    if config.reads_chats:
        template = load_template(config.chat.template, config.tokenizer, config.chat.variables, config.chat.learn)
        check_chat(template, tokenizer, config.tokenizer)
    elif set(config.arms) != {"vanilla"}:
        check_delimiters(config.delimiters, tokenizer, config.tokenizer)
    if config.deduplicate == "near":
        NearKeys(config.near_duplicates)  # says what is not installed before any work
    refuse_inputs_in_output(config.input, LocalLocation(config.output))
    inputs = expand_inputs(config.input)
    for place in inputs:
        if LocalLocation(config.output).contains(place):
            raise ConfigError(f"input={', '.join(config.input)} takes in {place}, which lies in output={config.output}; give an output folder apart")
    number, count = config.part_of_work()
    with _alone(config.output, number if config.shard else None):
        settings = _settings(config, tokenizer, template)
        finished, pending = _finished_arms(config, settings, inputs)
        if not pending:
            _forget_pieces(config)
            return finished
        plan = _plan(config, inputs, settings, pending)
        part = part_of(plan, number, count)
        _save_run(config, tokenizer, pending)
        kept = _kept_pieces(config, plan, part, pending)
        todo = [piece for piece in part if piece.number not in kept]
        with Joining(config, plan, pending, tokenizer) as joining:
            if todo:
                check_scored(config, inputs)
                sample = _sample(config, inputs, None if template is None else ChatReader(template, tokenizer, config.fields.names(), config.fields.messages))
                encoder = choose_engine(tokenizer, config.engine, sample, verify_all=config.verify == "full", reads_special=template is not None)
                _work(config, plan, pending, tokenizer, encoder, todo, joining, template)
                _check_unchanged(plan, inputs)
            if config.shard is not None:
                logger.info("%s: shard %s is finished; when all are: tpt preprocess merge %s", config.output, config.shard, config.output)
                return {}
            finished.update(finish(config, plan, pending, tokenizer, [config.output], joining))
    return {name: finished[name] for arm in config.arms for name in (f"{arm}/{split}" for split in splits(config))}


def merge(output: Path, folders: Sequence[Path]) -> dict[str, Manifest]:
    """Join what the shards of a run made in `output` and in `folders` (outputs of other machines) into `output`'s datasets.

    Copies bytes; nothing is tokenised again. Raises DataError when shards are missing, or are of other inputs or settings.
    """
    for folder in folders:
        if not (folder / "pieces").is_dir():
            raise DataError(f"{folder}: has no pieces; give the output folders of tpt preprocess runs with shard=NUMBER/COUNT")
    places = [output, *folders]
    begun = next((place for place in places if (place / "pieces/run.json").is_file()), None)
    if begun is None and any(output.glob("*/*.manifest.json")):
        raise DataError(f"{output}: holds finished datasets and no shards any more: they were joined before")
    if begun is None:
        raise DataError(f"{output}: no shards here; give the output of tpt preprocess runs with shard=NUMBER/COUNT, and their folders where they are apart")
    run = read_json(begun / "pieces/run.json")
    config = PreprocessConfig.model_validate(run["config"] | {"output": output, "shard": None})
    tokenizer = load_tokenizer(str(begun / "pieces" / run["tokenizer"]), config.end_of_document)
    plan = Plan.read(LocalLocation(begun / "plan.json"))
    for place in places:
        if (place / "plan.json").is_file() and Plan.read(LocalLocation(place / "plan.json")).fingerprint() != plan.fingerprint():
            raise DataError(f"{place}: made from other inputs or with other settings than {begun}; shards of one run only can be joined")
    with _alone(output, None), Joining(config, plan, run["arms"], tokenizer) as joining:
        return finish(config, plan, run["arms"], tokenizer, places, joining)


@contextmanager
def _alone(output: Path, shard: int | None) -> Iterator[None]:
    """Refuse to work where another run does; the system releases the lock of a killed one. Shards share the folder, each number once."""
    output.mkdir(parents=True, exist_ok=True)
    locks = [os.open(output, os.O_RDONLY)]
    try:
        if shard is not None:
            (output / "pieces").mkdir(exist_ok=True)
            locks.append(os.open(output / f"pieces/.shard-{shard}.lock", os.O_RDWR | os.O_CREAT, 0o666))
        for lock, how in zip(locks, (fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH, fcntl.LOCK_EX), strict=False):
            fcntl.flock(lock, how | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ConfigError(f"output={output}: another tpt preprocess is at work there; wait for it, or give another output") from None
    finally:
        for lock in locks:
            os.close(lock)


def _settings(config: PreprocessConfig, tokenizer: TokenizerLike, template: ChatTemplate | None) -> dict[str, Any]:
    """Return what datasets depend on besides the inputs and the arm; tokenizer and template by what they are, not where they lie."""
    without = {"input", "output", "arms", "tokenizer", "workers", "shard", "engine", "verify", "piece_megabytes", "on_bad_record", "chat"}
    uses = (
        ("mixed", "mixed" in config.arms),
        ("near_duplicates", config.deduplicate == "near"),
        ("keep_thoughts", config.keep_thoughts is not None),  # so that datasets of releases without it are kept
    )
    unused = {name for name, used in uses if not used}
    settings = {**config.model_dump(mode="json", exclude=without | unused), "tokenizer_fingerprint": tokenizer.fingerprint}
    if template is None:
        del settings["fields"]["messages"]
        return settings
    chat = {"template": template.source, "variables": dict(template.variables), "learn": template.learn}
    return {name: value for name, value in settings.items() if name not in ("thoughts", "delimiters")} | {"chat": chat}


def _finished_arms(config: PreprocessConfig, settings: dict[str, Any], inputs: list[Location]) -> tuple[dict[str, Manifest], list[Arm]]:
    """Return the manifests of finished arms by ARM/SPLIT, and the arms that are still to be made."""
    finished: dict[str, Manifest] = {}
    pending: list[Arm] = []
    for arm in config.arms:
        manifests = _finished_arm(config, arm, settings, inputs)
        finished.update(manifests)
        if manifests:
            logger.info("%s: finished before, kept", config.output / arm)
        else:
            pending.append(arm)
    return finished, pending


def _finished_arm(config: PreprocessConfig, arm: Arm, settings: dict[str, Any], inputs: list[Location]) -> dict[str, Manifest]:
    folder, manifests = config.output / arm, {}
    remove_unfinished(LocalLocation(folder))
    for path in sorted(folder.glob("*.manifest.json")):
        manifest = read_manifest(path, MANIFEST_KIND)
        same_settings = manifest.details.get("arm") == arm and {**settings, "mixed": None} == {**manifest.settings, "mixed": None}
        same_settings = same_settings and (arm != "mixed" or settings["mixed"] == manifest.settings["mixed"])
        if not same_settings or not _same_inputs(config.output, manifest, inputs):
            what = "inputs" if same_settings else "settings"
            raise ConfigError(f"output={config.output}: {path} was made from other {what}; give another output, or remove the folder")
        if config.on_bad_record == "fail" and manifest.counts["bad_records"]:
            aside = config.output / "bad_records.jsonl"
            raise DataError(
                f"{path}: made with {manifest.counts['bad_records']} bad records set aside (see {aside}); give another output for on_bad_record=fail"
            )
        try:
            check_outputs(manifest, folder, checksums=False)
        except DataError as error:
            logger.warning("%s", error)
            return {}
        manifests[f"{arm}/{path.name.removesuffix('.manifest.json')}"] = manifest
    return manifests if set(manifests) == {f"{arm}/{split}" for split in splits(config)} else {}


def _same_inputs(output: Path, manifest: Manifest, inputs: list[Location]) -> bool:
    """Say whether the inputs are those of a manifest: by name, size and stamp where the plan knows them, by checksum otherwise."""
    if [(entry.name, entry.bytes) for entry in manifest.inputs] != [(str(place), place.size()) for place in inputs]:
        return False
    plan = _plan_before(output)
    known = {} if plan is None else dict(zip((name for name, _ in plan.inputs), plan.stamps, strict=True))
    return all(known.get(entry.name) == place.stamp() or sha256_of(place) == entry.sha256 for entry, place in zip(manifest.inputs, inputs, strict=True))


def _plan_before(output: Path) -> Plan | None:
    """Return the plan of the run that was here before; None where there is none that this release can read."""
    try:
        return Plan.read(LocalLocation(output / "plan.json"))
    except DataError:
        return None


def _plan(config: PreprocessConfig, inputs: list[Location], settings: dict[str, Any], arms: Sequence[Arm]) -> Plan:
    """Return the plan of this run, and put it into the output. Pieces of another plan are removed, but not while shards may be at work."""
    place, pieces = LocalLocation(config.output / "plan.json"), config.output / "pieces"
    plan = make_plan(inputs, settings, config.piece_megabytes, is_shared=config.workers > 1 or config.shard is not None)
    part_of(plan, *config.part_of_work())  # refuses more shards than pieces before anything is written
    if place.is_file() and any(pieces.glob("[0-9]*")):
        before = _plan_before(config.output)
        if config.shard is not None and set(read_json(pieces / "run.json")["arms"]) != set(arms):
            raise ConfigError(f"output={config.output}: holds shards of other arms; give another output, or remove the folder")
        if before is not None and before.is_of(plan):
            return before
        if config.shard is not None and (before is None or before.fingerprint() != plan.fingerprint()):
            raise ConfigError(f"output={config.output}: holds shards of other inputs or settings; give another output, or remove the folder")
        if config.shard is None:
            logger.warning("%s: the inputs or the settings have changed since; what was finished of the last run is made anew", config.output)
            shutil.rmtree(pieces)
    place.write(plan.to_bytes())
    return plan


def _save_run(config: PreprocessConfig, tokenizer: TokenizerLike, arms: Sequence[Arm]) -> None:
    """Keep beside the pieces what `merge` needs to know: the config and the tokenizer."""
    folder = config.output / "pieces"
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder / tokenizer.file_name)
    settings = config.model_dump(mode="json", exclude={"shard", "output"})
    write_json(folder / "run.json", {"config": settings, "arms": arms, "tokenizer": tokenizer.file_name})


def _kept_pieces(config: PreprocessConfig, plan: Plan, part: Sequence[Piece], arms: Sequence[Arm]) -> set[int]:
    """Return which pieces of this part of the work are finished; remove those that are damaged or lack an arm, and what killed workers left of them."""
    fingerprint, kept, pieces = plan.fingerprint(), set(), config.output / "pieces"
    for piece in part:
        for unfinished in pieces.glob(f".{piece.name}.*.tmp"):
            shutil.rmtree(unfinished, ignore_errors=True)
        folder = pieces / piece.name
        if not folder.is_dir():
            continue
        try:
            finished = FinishedPiece.read(folder)
        except DataError as error:
            logger.warning("piece %s is made anew: %s", piece.name, error)
        else:
            is_ours = finished.plan == fingerprint and set(arms) <= set(finished.arms) and finished.input_stamp == plan.stamps[piece.file]
            if is_ours and not (config.on_bad_record == "fail" and finished.counts["bad_records"]):
                kept.add(piece.number)
                continue
        shutil.rmtree(folder)
    if kept:
        logger.info("%s: %d of %d pieces were finished before, kept", config.output, len(kept), len(part))
    return kept


def _forget_pieces(config: PreprocessConfig) -> None:
    """Remove the pieces of a run that was killed between its last manifest and its end."""
    run = config.output / "pieces/run.json"
    if not run.is_file() or set(read_json(run)["arms"]) <= set(config.arms):
        forget_pieces(config.output)


def _check_unchanged(plan: Plan, inputs: list[Location]) -> None:
    for place, stamp in zip(inputs, plan.stamps, strict=True):
        if place.stamp() != stamp:
            raise DataError(f"{place}: has changed while it was read; run the same command again, it begins anew")


def _sample(config: PreprocessConfig, inputs: list[Location], chats: ChatReader | None) -> list[str]:
    """Return some texts of the input (documents, thoughts, pieces of chats) to try engines on; what cannot be read is left to the run to report."""
    texts: list[str] = []
    characters = 0
    files = inputs[:: max(1, len(inputs) // SAMPLE_FILES)][:SAMPLE_FILES]
    for place in files:
        for row in islice(read_rows(place, longest=SAMPLE_CHARACTERS), SAMPLE_RECORDS):
            try:
                texts += _texts_of(row, config, chats)
            except TptError:
                continue
            characters += len(texts[-1])
            if characters > SAMPLE_CHARACTERS * (1 + files.index(place)) / len(files):
                break
    return texts


def _texts_of(row: Row, config: PreprocessConfig, chats: ChatReader | None) -> list[str]:
    """Return what of a row would be tokenised; RecordError for one that cannot be used."""
    if chats is not None:
        return [text for _, text in chats.read(row.parse(), row.where).segments]
    augmented = read_augmented(row.parse(), row.where, config.fields.names())
    return [augmented.document.text, *(thought.text for thought in augmented.thoughts)]


def _work(
    config: PreprocessConfig,
    plan: Plan,
    arms: list[Arm],
    tokenizer: TokenizerLike,
    encoder: Encoder,
    todo: list[Piece],
    joining: Joining,
    template: ChatTemplate | None,
) -> None:
    """Work the pieces off; with several workers, join those that are finished meanwhile."""
    if config.workers == 1:
        size = sum(_bytes(plan, piece) for piece in todo)
        with progress_bar("preprocess", size) as bar, PieceWorker(config, plan, arms, tokenizer, encoder, template) as worker:
            for piece in todo:
                worker.run(piece, bar.advance)
        return
    taken = multiprocessing.get_context("spawn").Value("q", 0)
    work = partial(_be_worker, config, plan, arms, encoder.engine, template, todo, taken)
    shown = 0
    with WorkerProcesses(work, min(config.workers, len(todo))) as processes, progress_bar("preprocess", len(todo)) as bar:
        names, joined, looked = {piece.name for piece in todo}, False, 0.0
        while processes.are_at_work(0 if joined else LOOK_AGAIN_S):
            joined = config.shard is None and not processes.are_ending() and joining.add_next_finished()
            if time.monotonic() - looked >= COUNT_AGAIN_S:
                looked, finished = time.monotonic(), len(names.intersection(os.listdir(config.output / "pieces")))
                bar.advance(finished - shown)
                shown = finished
    processes.check()


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _bytes(plan: Plan, piece: Piece) -> int:
    name, size = plan.inputs[piece.file]
    return size if name.endswith(".parquet") else piece.stop - piece.start


def _be_worker(
    config: PreprocessConfig,
    plan: Plan,
    arms: list[Arm],
    engine: Engine,
    template: ChatTemplate | None,
    todo: list[Piece],
    taken: Synchronized[int],
    number: int,
) -> None:
    """Be one worker process: take the next piece that nobody has taken, until there is none."""
    set_up_logging()
    end_with_parent()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, _stop)
    try:
        tokenizer = load_tokenizer(str(config.output / "pieces" / read_json(config.output / "pieces/run.json")["tokenizer"]), config.end_of_document)
        encoder = Encoder(tokenizer, engine, verify_all=config.verify == "full", reads_special=template is not None)
        with PieceWorker(config, plan, arms, tokenizer, encoder, template) as worker:
            while True:
                with taken.get_lock():
                    mine = taken.value
                    taken.value += 1
                if mine >= len(todo):
                    return
                worker.run(todo[mine])
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if not isinstance(error, Stopped):
            logger.error("worker %d: %s", number, line)
        raise SystemExit(error.exit_code if isinstance(error, TptError) else 1) from None
