"""Running augmentation: plan once, work until every shard is there, then say that the output is complete.

    OUTPUT/plan.json            what the shards are; made first
    OUTPUT/shards/, bad/, rejected/, journal/, claims/    see `shards.py` and `claims.py`
    OUTPUT/report.html          statistics and pictures, where the package's `report` extra is installed
    OUTPUT/manifest.json        written last: every shard is there; what is in them, what was set aside, what was refused

The same command runs as one worker or many, on one machine or many, for the first time or the tenth: every worker does
what is left and nobody holds, and whoever finds everything finished completes the output.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from tpt_megatron.augment.claims import Claims
from tpt_megatron.augment.generators import Ingredients
from tpt_megatron.augment.plan import Plan, make_or_read_plan
from tpt_megatron.augment.reporting import summarise, write_report
from tpt_megatron.augment.shards import finished_shards, manifest_place, read_shard_manifests
from tpt_megatron.augment.worker import Worker
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import ConfigError, DataError, MachineError, Stopped, TptError
from tpt_megatron.files import AUGMENTED, FileEntry, Manifest, read_manifest
from tpt_megatron.log import progress_bar, set_up_logging
from tpt_megatron.processes import WorkerProcesses
from tpt_megatron.record_files import refuse_inputs_in_output
from tpt_megatron.storage import LocalLocation, Location, explain, locate, remove_unfinished

logger = logging.getLogger(__name__)
COUNTS = ("documents", "thoughts", "rejected_thoughts", "documents_without_thoughts", "bad_records", "blank_lines", "lines_read")


def run_augment(config: AugmentConfig, position: float = 0.0) -> Manifest | None:
    """Augment all inputs into `config.output`; return its manifest, or None while other workers still hold shards.

    Raises ConfigError when the output holds results of other settings or inputs, or when an input lies in it; DataError for
    an input that cannot be read or has changed, and when not one record could be used; under on_bad_record=fail RecordError
    for the first bad record; MachineError when a server or model is gone; Stopped after a signal. What was finished is
    kept in every case, and the same command goes on from there.
    """
    output = locate(config.output)
    refuse_inputs_in_output(config.input, output)
    ingredients = Ingredients.of(config)
    plan = make_or_read_plan(config, ingredients.settings(), output)
    complete = complete_output(output)
    if complete is not None:
        logger.info("%s: finished before, kept", output)
        return complete
    (output / "manifest.json").remove()
    done = _drop_damaged_shards(plan, output)
    if done:
        logger.info("%s: %d of %d shards finished before, kept", output, len(done), len(plan.shards))
    try:
        if config.workers > 1:
            _run_processes(config, plan, output, done, position)
        else:
            _run_here(config, ingredients, plan, output, done, position)
    except Stopped:  # with nothing left to do there is nothing to continue, and perhaps no other worker to complete the output
        if len(finished_shards(output)) < len(plan.shards):
            raise
    return _finish(config, plan, output)


def complete_output(output: Location) -> Manifest | None:
    """Return the manifest of an output that is complete; None where there is none, or where shards that it names are missing or cut off."""
    if not (output / "manifest.json").is_file():
        return None
    manifest = read_manifest(output / "manifest.json", AUGMENTED)
    return None if _damaged((entry for entry in manifest.outputs), output) else manifest


def _damaged(entries: Iterable[FileEntry], output: Location) -> set[str]:
    """Return the names of shards' data files that are missing or cut off. What lies in `bad/` and `rejected/` is for people, who may clear it."""
    sizes = (output / "shards").sizes()
    ours = (entry for entry in entries if entry.name.startswith("shards/"))
    return {entry.name for entry in ours if sizes.get(entry.name.removeprefix("shards/")) != entry.bytes}


def _drop_damaged_shards(plan: Plan, output: Location) -> set[int]:
    """Return the finished shards; forget those whose manifest or data is damaged, so that they are made again."""
    finished = finished_shards(output)
    if finished and max(finished) >= len(plan.shards):
        raise ConfigError(f"output={output}: holds shard {max(finished)}, and the plan has {len(plan.shards)}; give another output, or remove the folder")
    manifests = read_shard_manifests(output, [plan.shards[number] for number in sorted(finished)])
    damaged = _damaged((entry for manifest in manifests.values() for entry in manifest.outputs), output)
    for number in sorted(finished):
        manifest = manifests.get(number)
        if manifest is None or damaged & {entry.name for entry in manifest.outputs}:
            logger.warning("shard %s: its manifest or its data is missing or damaged; it is made again", plan.shards[number].name)
            manifest_place(output, plan.shards[number]).remove()
            finished.discard(number)
    _refuse_other_plans(plan, output, manifests)
    return finished


def _refuse_other_plans(plan: Plan, output: Location, manifests: Mapping[int, Manifest]) -> None:
    fingerprint = plan.fingerprint()
    others = [number for number, manifest in manifests.items() if manifest.details.get("plan") != fingerprint]
    if others:
        raise DataError(
            f"{output}: shard {plan.shards[others[0]].name} and {len(others) - 1} more were made by another plan than plan.json; give another output"
        )


def _run_here(config: AugmentConfig, ingredients: Ingredients, plan: Plan, output: Location, done: set[int], position: float) -> None:
    rows = sum(shard.count for shard in plan.shards)
    completed = sum(plan.shards[number].count for number in done)
    logs = output.path / "logs" if isinstance(output, LocalLocation) else Path("logs")
    log = logs / f"server-{socket.gethostname()}-{os.getpid()}.log"
    with progress_bar("augment", rows, completed=completed) as bar:
        worker = Worker(config, plan, output, ingredients.generators(log), bar, position)
        try:
            asyncio.run(worker.run())
        finally:
            progress = worker.progress
            if progress.restored:
                logger.info("%d documents of unfinished shards had been saved by earlier workers, kept", progress.restored)
            if progress.bad_records:
                logger.warning("%d bad records were set aside, see %s", progress.bad_records, output / "bad")
            if progress.rejected:
                reasons = ", ".join(f"{count} {reason}" for reason, count in progress.rejected.most_common())
                logger.warning("%d thoughts were rejected: %s", progress.rejected.total(), reasons)


def _run_processes(config: AugmentConfig, plan: Plan, output: Location, done: set[int], position: float) -> None:
    """Run workers as processes of this machine, and show how many shards are finished."""
    shown = len(done)
    with WorkerProcesses(partial(_work, config, position), config.workers) as processes, progress_bar("augment", len(plan.shards), completed=shown) as bar:
        while processes.are_at_work():
            finished = len(finished_shards(output))
            bar.advance(finished - shown)
            shown = finished
    processes.check()


def _work(config: AugmentConfig, position: float, number: int) -> None:
    """Be one worker process of an output that is planned."""
    set_up_logging()
    position = (position + number / config.workers) % 1
    name = multiprocessing.current_process().name
    output = locate(config.output)
    try:
        _run_here(config, Ingredients.of(config), Plan.read(output / "plan.json"), output, set(), position)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if not isinstance(error, Stopped):
            logger.error("%s: %s", name, line)
        raise SystemExit(error.exit_code if isinstance(error, TptError) else 1) from None


def _unfinished(config: AugmentConfig, plan: Plan, output: Location) -> Counter[str | None]:
    """Return how many shards are not finished, by who holds them (None: nobody who may be alive)."""
    claims = Claims(output / "claims", config.claim_timeout_s)
    claims.look()
    finished = finished_shards(output)
    holders = {shard.number: claims.holder(shard.number) for shard in plan.shards if shard.number not in finished}
    if holders:  # one that was finished meanwhile has no claim any more
        finished = finished_shards(output)
    return Counter(holder for number, holder in holders.items() if number not in finished)


def _finish(config: AugmentConfig, plan: Plan, output: Location) -> Manifest | None:
    """Complete an output of which every shard is there; None, with a line that says who holds the rest, otherwise."""
    holders = _unfinished(config, plan, output)
    if holders[None]:
        raise TptError(f"{output}: {holders[None]} of {len(plan.shards)} shards are not finished, and no worker holds them; run the same command again")
    if holders:
        held = ", ".join(f"{count} with {holder}" for holder, count in holders.items())
        logger.info(
            "%s: %d of %d shards are still at work elsewhere (%s); the last worker completes the output", output, holders.total(), len(plan.shards), held
        )
        return None
    manifests = read_shard_manifests(output, plan.shards)
    if len(manifests) < len(plan.shards):
        raise DataError(f"{output}: {len(plan.shards) - len(manifests)} manifests of shards cannot be read; run the same command again, it makes them anew")
    _refuse_other_plans(plan, output, manifests)
    shards = [manifests[shard.number] for shard in plan.shards]
    counts = {name: sum(shard.counts[name] for shard in shards) for name in COUNTS}
    if not counts["documents"]:
        reasons = "; the reasons are above and in bad/" if counts["bad_records"] else ""
        raise DataError(f"{output}: none of the {counts['lines_read']} lines of {', '.join(config.input)} gave a document{reasons}")
    assert counts["lines_read"] == counts["documents"] + counts["bad_records"] + counts["blank_lines"]
    summary = summarise(shards)
    manifest = Manifest(
        kind=AUGMENTED,
        settings=plan.settings,
        inputs=plan.inputs,
        outputs=tuple(entry for shard in shards for entry in shard.outputs),
        counts=counts,
        details={"shards": len(shards), "elapsed_s": round(summary.elapsed_s, 3), "statistics": summary.statistics.to_json()},
    )
    _sweep(output, manifest)
    try:
        write_report(config, plan, output, summary)
    except MachineError as error:
        logger.warning("no report.html: %s", error)
    manifest.write(output / "manifest.json")
    return manifest


def _sweep(output: Location, manifest: Manifest) -> None:
    """Remove what only a run at work needs, and data files of workers that another was faster than."""
    kept = {entry.name for entry in manifest.outputs}
    for folder in ("shards", "bad", "rejected"):
        for name in (output / folder).names():
            if f"{folder}/{name}" not in kept and not name.endswith(".manifest.json"):
                (output / folder / name).remove()
        remove_unfinished(output / folder)
    for folder in ("journal", "claims"):
        (output / folder).remove()
