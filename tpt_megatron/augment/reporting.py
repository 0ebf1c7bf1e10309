"""What is finished of an output, summed up: `report.html` at the end of a run, and on request while it goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpt_megatron.augment.plan import Plan
from tpt_megatron.augment.report import render_report, terminal_summary
from tpt_megatron.augment.shards import finished_shards, read_shard_manifests
from tpt_megatron.augment.statistics import Statistics
from tpt_megatron.config.augment import AugmentConfig, ModelGenerator
from tpt_megatron.files import Manifest
from tpt_megatron.storage import Location, locate

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Summary:
    """Statistics of finished shards, and the seconds in which at least one of them was at work."""

    statistics: Statistics
    shards: int
    elapsed_s: float


def summarise(shards: Sequence[Manifest]) -> Summary:
    """Sum up the manifests of finished shards."""
    statistics = Statistics()
    spans: dict[str, list[tuple[float, float]]] = {}
    for shard in shards:
        statistics.merge(Statistics.from_json(shard.details["statistics"]))
        spans.setdefault(shard.details["worker"], []).append((shard.details["began"], shard.details["ended"]))
    for of_one_worker in spans.values():  # which has several shards at work at once
        statistics.add_seconds(elapsed_s(of_one_worker))
    return Summary(statistics, len(shards), elapsed_s(span for of_one_worker in spans.values() for span in of_one_worker))


def elapsed_s(spans: Iterable[tuple[float, float]]) -> float:
    """Return how many seconds lie in at least one of the spans (begin, end): pauses between runs do not count."""
    total, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def write_report(config: AugmentConfig, plan: Plan, output: Location, summary: Summary) -> Location:
    """Write `OUTPUT/report.html` and return where it is. Raises MachineError without the extra `report`."""
    page = render_report(
        summary.statistics,
        title=f"Augmentation: {output}",
        progress=(summary.shards, len(plan.shards)),
        settings=settings_shown(config),
        cost=config.cost,
        elapsed_s=summary.elapsed_s,
    )
    place = output / "report.html"
    place.write(page.encode())
    return place


def run_report(config: AugmentConfig) -> tuple[Location, Table]:
    """Write the report on what is finished so far; return its place and a summary for the terminal. DataError before a run began."""
    output = locate(config.output)
    plan = Plan.read(output / "plan.json")
    summary = summarise(list(read_shard_manifests(output, [plan.shards[number] for number in sorted(finished_shards(output))]).values()))
    place = write_report(config, plan, output, summary)
    return place, terminal_summary(summary.statistics, config.cost, summary.elapsed_s)


def settings_shown(config: AugmentConfig) -> dict[str, Any]:
    """Return what a reader of a report or a sample should know of the config."""
    shown: dict[str, Any] = {"input": ", ".join(config.input), "output": config.output}
    for generator in config.generator:
        if isinstance(generator, ModelGenerator):
            sampling = generator.sampling
            shown[f"generator {generator.label}"] = (
                f"{generator.kind}, temperature {sampling.temperature}, top_p {sampling.top_p}, at most {sampling.max_tokens} tokens, "
                f"stop {list(sampling.stop)}, thought from {generator.thought_from}"
            )
        else:
            shown[f"generator {generator.kind}"] = getattr(generator, "field", "computed")
    if any(isinstance(generator, ModelGenerator) for generator in config.generator):
        shown |= {"prompts": ", ".join(config.prompts), "samples": config.samples, "document_tokens": config.document_tokens}
        if config.chunks is not None:
            shown["chunks"] = f"{config.chunks.tokens} tokens, {config.chunks.before_tokens} before"
    return shown
