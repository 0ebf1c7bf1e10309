"""The picture of `tpt inspect --plot`: how long sequences and their parts are, and what they come from. Needs the extra `report`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tpt_megatron.errors import MachineError, UsageError
from tpt_megatron.inspection.printing import one_line, table_name
from tpt_megatron.inspection.summary import Summary, count_in, log_edges, shown_kinds

SOURCES_DRAWN = 15
ENDINGS = (".png", ".svg", ".pdf")
_COLOURS = {"whole": "#4c566a", "document": "#2a7fb8", "thinking": "#d1495b", "prompt": "#2a7fb8", "assistant": "#d1495b"}
# Above the axes, where it lies over no data.
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0.2}
_LEGEND |= {"columnspacing": 1.2, "handlelength": 1.4}
_STYLE = {"font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "tpt", "text.parse_math": False}


def check_plot(path: Path) -> None:
    """Raise UsageError for a kind of file that is not drawn, MachineError where matplotlib is not installed."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--plot {path}: the ending tells the kind of picture; give one of {', '.join(ENDINGS)}")
    if find_spec("matplotlib") is None:
        raise MachineError("--plot needs matplotlib, which is not installed; run: pip install 'tpt-megatron[report]'")


def plot_summary(summary: Summary, path: Path, title: str) -> None:
    """Write a picture of the kind that the file's ending names; missing folders are made."""
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    with_sources = summary.by_source is not None and len(summary.by_source) > 1
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12 if with_sources else 6.4, 4.2), layout="constrained")
        axes = figure.subplots(1, 2 if with_sources else 1, squeeze=False)[0]
        _draw_lengths(axes[0], summary)
        if with_sources:
            _draw_sources(axes[1], summary)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
        shown = one_line(title)
        shown = shown if len(shown) <= 70 else f"…{shown[-69:]}"
        figure.suptitle(f"{shown}: {len(summary.lengths):,} sequences, {summary.tokens:,} tokens", fontsize=11)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {".svg": {"Date": None, "Creator": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw_lengths(axis: Any, summary: Summary) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    kinds = shown_kinds(summary)
    shortest = min(int(values[values > 0].min()) for values in kinds.values() if (values > 0).any())
    edges = log_edges(shortest, int(summary.lengths.max()), 36)
    for name, values in kinds.items():
        counts = count_in(values, edges)
        having = int((values > 0).sum())
        label = name if having == len(values) else f"{name} (in {having:,} sequences)"
        axis.stairs(counts, edges, color=_COLOURS[name], linewidth=1.8, label=label)
        axis.stairs(counts, edges, color=_COLOURS[name], fill=True, alpha=0.12)
    axis.set(xscale="log", xlabel="tokens a sequence", ylabel="sequences")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.xaxis.set_minor_formatter(NullFormatter())
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(EngFormatter(sep=""))
    axis.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    if len(kinds) > 1:
        axis.legend(**_LEGEND)


def _draw_sources(axis: Any, summary: Summary) -> None:
    from matplotlib.ticker import EngFormatter

    assert summary.by_source is not None
    rows = summary.by_source[:SOURCES_DRAWN][::-1]
    names = [name if len(name := table_name(row.name)) <= 30 else f"{name[:29]}…" for row in rows]
    places = range(len(rows))  # not the names themselves: two that are cut alike must not share a bar
    drawn = [0] * len(rows)
    for name in summary.parts or ():
        counts = [row.by_part[name] for row in rows]
        if any(counts):
            axis.barh(places, counts, height=0.65, left=drawn, color=_COLOURS[name], label=name)
            drawn = [before + count for before, count in zip(drawn, counts, strict=True)]
    if len(axis.containers) > 1:
        axis.legend(**_LEGEND)
    axis.set_yticks(places, names)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-0.7, max(4, len(rows)) - 0.3)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    left_out = len(summary.by_source) - len(rows)
    axis.set(xlabel="tokens by source" + (f" ({left_out} smaller ones not drawn)" if left_out else ""))
