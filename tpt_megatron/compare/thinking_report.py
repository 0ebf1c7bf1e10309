"""Thinking length for people: tables for the report and the terminal, and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

SOURCES_SHOWN = 12
ALL = "all"


def thinking_section(thinking: dict[str, Any], share: float, colours: Mapping[str, str]) -> dict[str, Any]:
    """Return what the report's template shows of report.json's `thinking`. share: of the intervals."""
    arms = thinking["arms"]
    held = _held_against_difficulty(thinking)
    by_arm = {arm: of for arm, of in held.items() if of["groups"]}
    return {
        "rows": [row for arm, of in arms.items() for row in _rows(arm, of)],
        "sampled": max((of["sampled"] or 0 for of in arms.values()), default=0),
        "by_source": _source_figure(arms, colours),
        "difficulty": thinking["difficulty"],
        "correlations": [f"{arm}: {correlation_text(of, share)}" for arm, of in held.items()],
        "groups": [{"arm": arm, "name": name, **_group_row(group)} for arm, of in by_arm.items() for name, group in of["groups"].items()],
        "by_difficulty": _difficulty_figure(by_arm, thinking["difficulty"]["what"], colours) if by_arm else None,
        "missing": thinking["missing"],
    }


def thinking_table(thinking: dict[str, Any], share: float) -> Table:
    """Return lengths by arm and source for the terminal, with the correlation with difficulty under it."""
    caption = [f"{arm}: {correlation_text(of, share)}" for arm, of in _held_against_difficulty(thinking).items()]
    about = thinking["difficulty"]
    said = f"length and {about['what']}, rank correlation: {'; '.join(caption)}" if caption else None
    table = Table(title="thinking tokens", title_justify="left", caption=None if said is None else escape(said), caption_justify="left")
    for column in ("arm", "source", "documents", "with thinking", "mean", "median", "expansion"):
        table.add_column(column, justify="left" if column in ("arm", "source") else "right")
    for arm, of in thinking["arms"].items():
        for row in _rows(arm, of):
            table.add_row(*(escape(row[name]) for name in ("arm", "source", "documents", "with_thinking", "mean", "median", "expansion")))
    return table


def _held_against_difficulty(thinking: dict[str, Any]) -> dict[str, Any]:
    """Return what is known by difficulty of the arms that think."""
    return {arm: of["difficulty"] for arm, of in thinking["arms"].items() if of["difficulty"] is not None and of["all"]["with_thinking"]}


def correlation_text(found: dict[str, Any], share: float) -> str:
    """Return a rank correlation in words."""
    of = f"{found['documents']:,} documents"
    if found["rho"] is None:
        return f"not defined ({found['why_not']}; {of})"
    interval = found["interval"]
    lies = "" if interval is None else f", {share:.0%} interval {interval[0]:+.2f} to {interval[1]:+.2f}"
    return f"Spearman's ρ {found['rho']:+.2f} ({of}{lies})"


def _rows(arm: str, of: dict[str, Any]) -> list[dict[str, str]]:
    """Return an arm's rows: all of it, then its largest sources where it has several."""
    sources = list(of["by_source"].items())
    shown = sources[:SOURCES_SHOWN] if len(sources) > 1 and of["all"]["with_thinking"] else []
    rows = [_row(arm, ALL, of["all"]), *(_row(arm, name, lengths) for name, lengths in shown)]
    if len(sources) > len(shown) and len(sources) > 1:
        rows[0]["source"] = f"{ALL}, of {len(sources)} sources"
    return rows


def _row(arm: str, source: str, lengths: dict[str, Any]) -> dict[str, str]:
    quantiles = lengths["quantiles"]
    return {
        "arm": arm,
        "source": source,
        "documents": f"{lengths['sequences']:,}",
        "with_thinking": f"{lengths['with_thinking']:,}",
        "mean": _tokens(lengths["mean"]),
        "median": _tokens(quantiles and quantiles["0.5"]),
        "spread": "–" if quantiles is None else f"{quantiles['0.05']:,.0f} – {quantiles['0.95']:,.0f}",
        "expansion": "–" if lengths["expansion"] is None else f"{lengths['expansion']:.2f}×",
    }


def _group_row(group: dict[str, Any]) -> dict[str, str]:
    difficulty = group["difficulty"]
    return {
        "documents": f"{group['documents']:,}",
        "difficulty": "–" if difficulty is None else f"{difficulty:.3g}",
        "mean": _tokens(group["mean"]),
        "median": _tokens(group["median"]),
    }


def _tokens(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _source_figure(arms: Mapping[str, Any], colours: Mapping[str, str]) -> str | None:
    """Return an SVG of mean lengths by source, a bar an arm; None where no arm thinks."""
    thinking = {arm: of["by_source"] for arm, of in arms.items() if of["all"]["with_thinking"]}
    if not thinking:
        return None
    names = list(dict.fromkeys(name for by_source in thinking.values() for name in list(by_source)[:SOURCES_SHOWN]))[:SOURCES_SHOWN]
    figure, axes = _axes(max(2.4, 0.5 + 0.36 * len(names) * len(thinking)))
    height = 0.8 / len(thinking)
    for number, (arm, by_source) in enumerate(thinking.items()):
        means = [by_source[name]["mean"] or 0.0 if name in by_source else 0.0 for name in names]
        places = [place + (number - (len(thinking) - 1) / 2) * height for place in range(len(names))]
        axes.barh(places, means, height, color=colours[arm], label=arm)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("mean thinking tokens")
    _legend(axes)
    return _svg(figure)


def _difficulty_figure(by_arm: Mapping[str, Any], what: str, colours: Mapping[str, str]) -> str:
    """Return an SVG of mean lengths by group of difficulty, a line an arm."""
    names = list(dict.fromkeys(name for of in by_arm.values() for name in of["groups"]))
    figure, axes = _axes(3.2)
    for arm, of in by_arm.items():
        there = [name for name in names if name in of["groups"]]
        axes.plot([names.index(name) for name in there], [of["groups"][name]["mean"] for name in there], color=colours[arm], marker="o", label=arm)
    axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=0 if max(map(len, names)) <= 5 else 30)
    axes.set_xlabel(_short(what, 70))
    axes.set_ylabel("mean thinking tokens")
    axes.set_ylim(0, 1.1 * max(group["mean"] for of in by_arm.values() for group in of["groups"].values()))
    _legend(axes)
    return _svg(figure)


def _axes(height: float) -> tuple[Figure, Axes]:
    # Figures of texts that are left as such: the fonts are the browser's, in the report's other figures, too.
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Name the arms above the picture, where they hide nothing."""
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tpt", "font.family": "sans-serif", "font.size": 10}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _short(name: str, most: int = 24) -> str:
    # Matplotlib reads what stands between dollars as mathematics.
    return (name if len(name) <= most else f"{name[: most - 1]}…").replace("$", r"\$")
