"""The picture of `tpt inspect --plot`: how long sequences and their parts are, and what they come from. Needs the extra `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tpt_megatron.inspection.summary import Summary

SOURCES_DRAWN = 15
_COLOURS = {"whole": "#444444", "document": "#2b6cb0", "thinking": "#d9822b"}


def plot_summary(summary: Summary, path: Path, title: str) -> None:
    """Write a picture of the kind that the file's ending names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_sources = summary.by_source is not None and len(summary.by_source) > 1
    figure = Figure(figsize=(11 if with_sources else 6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if with_sources else 1, squeeze=False)[0]
    _draw_lengths(axes[0], summary)
    if with_sources:
        _draw_sources(axes[1], summary)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: {len(summary.lengths):,} sequences, {summary.tokens:,} tokens", fontsize=10)
    figure.savefig(path, dpi=150)


def _draw_lengths(axis: Any, summary: Summary) -> None:
    kinds = {"whole": summary.lengths, "document": summary.document, "thinking": summary.thinking}
    has_thinking = summary.thinking is not None and bool((summary.thinking != 0).any())
    shortest = min(int(values[values > 0].min()) for values in kinds.values() if values is not None and (values > 0).any())
    edges = np.geomspace(shortest, int(summary.lengths.max()) + 1, 40)
    for name, values in kinds.items():
        if values is not None and (name == "whole" or has_thinking):
            axis.hist(values[values > 0], edges, histtype="step", linewidth=1.6, color=_COLOURS[name], label=name)
    axis.set(xscale="log", xlabel="tokens a sequence", ylabel="sequences")
    if has_thinking:
        axis.legend(frameon=False)


def _draw_sources(axis: Any, summary: Summary) -> None:
    from matplotlib.ticker import EngFormatter

    assert summary.by_source is not None
    rows = summary.by_source[:SOURCES_DRAWN][::-1]
    names = ["(none)" if row.name is None else row.name[:30] for row in rows]
    document = [row.tokens_document for row in rows]
    axis.barh(names, document, height=0.6, color=_COLOURS["document"], label="document")
    axis.barh(names, [row.tokens_thinking for row in rows], height=0.6, left=document, color=_COLOURS["thinking"], label="thinking")
    axis.set_ylim(-1, max(4, len(rows)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    left_out = len(summary.by_source) - len(rows)
    axis.set(xlabel="tokens" + (f" ({left_out} smaller sources not drawn)" if left_out else ""))
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
