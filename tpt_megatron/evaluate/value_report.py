"""What `tpt value` says of all its thoughts: summary.json, and a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from tpt_megatron.config.value import ValueConfig
from tpt_megatron.evaluate.value_statistics import QUANTILES, ValueStatistics
from tpt_megatron.files import Manifest

SOURCES_SHOWN = 30
WHY_NOT = {
    "nothing_follows": "nothing of the document follows what they saw",
    "no_answer": "their document has no answer",
    "too_long": "they leave too little room for context and target in what the model reads",
    "not_finite": "the model gave no finite number",
}


def summarise(config: ValueConfig, manifest: Manifest) -> dict[str, Any]:
    """Return what summary.json holds."""
    statistics = ValueStatistics.from_json(manifest.details["values"])
    return {
        "format": 1,
        "model": str(config.model),
        "settings": manifest.settings,
        "counts": manifest.counts,
        "without_value": dict(statistics.without),
        "all": statistics.all.summary(),
        "by_source": {name: values.summary() for name, values in sorted(statistics.by_source.items())},
    }


def value_tables(summary: dict[str, Any]) -> list[Table | str]:
    """Return the summary for the terminal: a table of values by source, and lines on what has none or needs a caution."""
    target, counts = summary["settings"]["target"], summary["counts"]
    table = Table(title=f"what thoughts add to the log-likelihood of the {target}, in nats a token", title_justify="left")
    for column in ("source", "thoughts", "that help", "mean", *(f"{share:.0%}" for share in QUANTILES), "nats a thought"):
        table.add_column(column, justify="left" if column == "source" else "right")
    largest = sorted(summary["by_source"].items(), key=lambda item: -item[1]["thoughts"])
    for name, of in [("all", summary["all"]), *largest[:SOURCES_SHOWN]]:
        if of["thoughts"]:
            quantiles = (f"{value:+.4f}" for value in of["quantiles_nats_per_token"].values())
            means = f"{of['mean_nats_per_token']:+.4f}", *quantiles, f"{of['mean_nats']:+.2f}"
            table.add_row(escape(name), f"{of['thoughts']:,}", f"{of['helping']:.1%}", *means)
    notes = [f"{count:,} without a value: {WHY_NOT[reason]}" for reason, count in summary["without_value"].items()]
    for name, what in (("targets_cut", "target's end"), ("contexts_cut", "context's beginning")):
        if counts[name]:
            notes.append(f"{counts[name]:,} whose {what} was left out, to fit what the model reads or target_tokens")
    if counts["saw_target"]:
        notes.append(f"{counts['saw_target']:,} had seen what they are valued on: some of their value may be repeating it")
    if len(largest) > SOURCES_SHOWN:
        notes.append(f"{len(largest) - SOURCES_SHOWN:,} more sources are in summary.json")
    return [table, *notes]
