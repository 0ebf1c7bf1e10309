"""The comparison for people: one HTML file that needs nothing beside it, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from rich.table import Table

from tpt_megatron import __version__
from tpt_megatron.compare.curves import THRESHOLDS, Run, group_by_arm, mean_curve
from tpt_megatron.compare.figures import arm_colours, as_text, curve_figure, smooth

TERMINAL_THRESHOLDS = (0.5, 0.9)
NOT_REACHED = "not reached"
LOSS_TITLES = {
    "loss": "training loss",
    "validation_loss": "validation loss",
    "loss_document": "loss on document tokens",
    "loss_thinking": "loss on thinking tokens",
}


def render_html(comparison: dict[str, Any], runs: Sequence[Run], notes: str | None) -> str:
    """Return the report. `notes` is plain text; blank lines separate its paragraphs."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((resources.files("tpt_megatron.compare") / "report.html").read_text(encoding="utf-8"))
    colours = arm_colours(comparison["arms"])
    arms = [
        {"name": arm, "runs": len(about["runs"]), "seeds": [seed for seed in about["seeds"] if seed is not None]} for arm, about in comparison["arms"].items()
    ]
    return template.render(
        version=__version__,
        comparison=comparison,
        arms=arms,
        headlines=headlines(comparison),
        thresholds=THRESHOLDS,
        tasks=[_task_section(task, about, comparison["baseline"], colours) for task, about in comparison["tasks"].items()],
        losses=_loss_figures(runs, colours),
        notes=[paragraph.strip() for paragraph in (notes or "").split("\n\n") if paragraph.strip()],
    )


def headlines(comparison: dict[str, Any]) -> list[str]:
    """Return one plain sentence a task and arm: how many tokens it needs for the baseline's final score."""
    said = []
    baseline = comparison["baseline"]
    for task, arms in comparison["tasks"].items():
        for arm, about in arms.items():
            found = about["efficiency_at_baseline_final"]
            if found is None:
                continue
            score = f"{baseline}'s final score of {found['target']:.3f}"
            if found["factor"] is None:
                said.append(f"{task}: {arm} did not reach {score} in {as_text(about['tokens'])} tokens.")
                continue
            least = "at least " if found["is_lower_bound"] else ""
            said.append(
                f"{task}: {arm} reaches {score} after {as_text(found['arm_tokens'])} tokens, {baseline} after {as_text(found['vanilla_tokens'])}: "
                f"a data-efficiency factor of {least}{found['factor']:.2f}."
            )
    return said


def factor_text(found: dict[str, Any] | None) -> str:
    """Return an efficiency as a table's cell."""
    if found is None or found["factor"] is None:
        return "–"
    return f"{'≥ ' if found['is_lower_bound'] else ''}{found['factor']:.2f}×"


def _task_section(task: str, arms: dict[str, Any], baseline: str | None, colours: Mapping[str, str]) -> dict[str, Any]:
    rows = [
        {
            "arm": arm,
            "is_baseline": arm == baseline,
            "seeds": len(about["seeds"]),
            "final": f"{about['final']:.3f}",
            "spread": f"{min(about['final_by_seed']):.3f} – {max(about['final_by_seed']):.3f}" if len(about["seeds"]) > 1 else "–",
            "tokens": as_text(about["tokens"]),
            "factor": factor_text(about["efficiency_at_baseline_final"]),
            "tokens_to": [(_tokens_text(about["tokens_to"][str(t)]), factor_text((about["efficiency"] or {}).get(str(t)))) for t in THRESHOLDS],
        }
        for arm, about in arms.items()
    ]
    scores = curve_figure({arm: (about["seeds"], about["mean"]) for arm, about in arms.items()}, "accuracy", colours, whole_range=True)
    lengths = curve_figure({arm: ([], about["mean_new_tokens"]) for arm, about in arms.items()}, "mean new tokens", colours, whole_range=False)
    return {"name": task, "rows": rows, "scores": scores, "lengths": lengths}


def _tokens_text(tokens: float | None) -> str:
    return NOT_REACHED if tokens is None else as_text(tokens)


def _reached_text(about: dict[str, Any], threshold: str) -> str:
    tokens, factor = _tokens_text(about["tokens_to"][threshold]), factor_text((about["efficiency"] or {}).get(threshold))
    return tokens if factor == "–" else f"{tokens}\n{factor}"


def _loss_figures(runs: Sequence[Run], colours: Mapping[str, str]) -> list[dict[str, str]]:
    figures = []
    for name, title in LOSS_TITLES.items():
        arms = {}
        for arm, members in group_by_arm(runs).items():
            curves = [run.losses[name] for run in members if name in run.losses]
            if curves:
                lines = [[[float(point.tokens), point.value] for point in curve] for curve in [*curves, mean_curve(curves)]]
                *seeds, mean = (smooth(line) for line in lines)
                arms[arm] = (seeds, mean)
        if arms:
            figures.append({"title": title, "figure": curve_figure(arms, title, colours, whole_range=False)})
    return figures


def terminal_table(comparison: dict[str, Any]) -> Table:
    """Return final scores, and the tokens to two scores with the data-efficiency factor, as a table for the terminal."""
    table = Table(title="arms compared", title_justify="left")
    columns = ("task", "arm", "tokens", "final score", *(f"tokens to {threshold}" for threshold in TERMINAL_THRESHOLDS))
    for column, justify in zip(columns, ("left", "left", *["right"] * (len(columns) - 2)), strict=True):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for task, arms in comparison["tasks"].items():
        for arm, about in arms.items():
            reached = [_reached_text(about, str(threshold)) for threshold in TERMINAL_THRESHOLDS]
            table.add_row(task, arm, as_text(about["tokens"]), f"{about['final']:.3f}", *reached)
    return table
