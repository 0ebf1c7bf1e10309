"""The comparison for people: one HTML file that needs nothing beside it, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from rich.table import Table

from tpt_megatron import __version__
from tpt_megatron.compare.curves import THRESHOLDS, Run, group_by_arm, mean_curve
from tpt_megatron.compare.figures import Line, arm_colours, as_text, curve_figure, smooth
from tpt_megatron.compare.thinking_report import thinking_section

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
        thinking=None if comparison["thinking"] is None else thinking_section(comparison["thinking"], comparison["interval"], colours),
        losses=_loss_figures(runs, colours),
        notes=[paragraph.strip() for paragraph in (notes or "").split("\n\n") if paragraph.strip()],
    )


def headlines(comparison: dict[str, Any]) -> list[str]:
    """Return one plain sentence a task and arm: how many tokens it needs for the baseline's final score."""
    baseline, share = comparison["baseline"], f"{comparison['interval']:.0%} interval"
    said = []
    for task, arms in comparison["tasks"].items():
        for arm, about in arms.items():
            found = about["efficiency_at_baseline_final"]
            if found is None:
                continue
            score = f"{baseline}'s final score of {found['target']:.3f} on the fitted curve"
            if found["arm_tokens"]["high"] is None:
                said.append(f"{task}: {arm} did not reach {score} in {as_text(about['tokens'])} tokens.")
                continue
            reached = (
                f"{task}: {arm} reaches {score} after {_tokens_text(found['arm_tokens'])} tokens, {baseline} after {_tokens_text(found['baseline_tokens'])}"
            )
            factor = estimate_text(found["factor"], _times)
            said.append(f"{reached}: a data-efficiency factor of {factor} ({share} {interval_text(found['factor'], _times)}).")
            if (flops := found["factor_of_flops"]) is not None:
                said.append(
                    f"{task}: counted in FLOPs, those that wrote the thoughts included, the factor is {estimate_text(flops, _times)} "
                    f"({share} {interval_text(flops, _times)})."
                )
    return said


def estimate_text(found: dict[str, Any], show: Callable[[float], str]) -> str:
    """Return a number, or the bounds that are known of it."""
    low, high = found["low"], found["high"]
    match found["kind"]:
        case "estimate":
            return show(low)
        case "at_least":
            return f"at least {show(low)}"
        case "at_most":
            return f"at most {show(high)}"
        case "between":
            return f"between {show(low)} and {show(high)}"
    return "unknown size"


def interval_text(found: dict[str, Any], show: Callable[[float], str]) -> str:
    """Return an interval, whose sides may be open."""
    low, high = found["interval"]
    if low is None:
        return "open" if high is None else f"up to {show(high)}"
    return f"{show(low)} and more" if high is None else f"{show(low)} to {show(high)}"


def _times(value: float) -> str:
    return f"{value:.2f}"


def factor_text(found: dict[str, Any] | None, of: str = "factor") -> str:
    """Return an efficiency as a table's cell: the factor, and its interval. of: `factor`, of tokens, or `factor_of_flops`."""
    factor = None if found is None else found[of]
    if factor is None or factor["kind"] == "unknown":
        return "–"
    sign = {"estimate": "", "at_least": "≥ ", "at_most": "≤ "}.get(factor["kind"])
    shown = f"{_times(factor['low'])} – {_times(factor['high'])}×" if sign is None else f"{sign}{_times(factor['low'] or factor['high'])}×"
    low, high = factor["interval"]
    return f"{shown} ({'0' if low is None else _times(low)} – {'∞' if high is None else _times(high)})"


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
            "factor_of_flops": factor_text(about["efficiency_at_baseline_final"], "factor_of_flops"),
            "tokens_to": [(_tokens_text(about["tokens_to"][str(t)]), factor_text((about["efficiency"] or {}).get(str(t)))) for t in THRESHOLDS],
        }
        for arm, about in arms.items()
    ]
    bands = {arm: about["band"] for arm, about in arms.items()}
    scores = curve_figure({arm: (about["seeds"], about["mean"]) for arm, about in arms.items()}, "accuracy", colours, whole_range=True, bands=bands)
    lengths = curve_figure({arm: ([], about["mean_new_tokens"]) for arm, about in arms.items()}, "mean new tokens", colours, whole_range=False)
    costs: dict[str, tuple[Sequence[Line], Line]] = {arm: ([], about["cost"]) for arm, about in arms.items() if about["cost"] is not None}
    spent = curve_figure(costs, "accuracy", colours, whole_range=True, along="FLOPs of training and of writing the thoughts") if costs else None
    return {"name": task, "rows": rows, "scores": scores, "costs": spent, "lengths": lengths}


def _tokens_text(found: dict[str, Any]) -> str:
    if found["high"] is None:
        return NOT_REACHED
    return estimate_text(found, as_text)


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
