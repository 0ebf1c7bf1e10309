"""Curves as SVG: one colour an arm, a thin line a seed, a thick line their mean."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

COLOURS = ("#4c566a", "#d1495b", "#2a7fb8", "#3a8f5c", "#b07a1e", "#7b5ea7", "#2b9c9c", "#a14f8f")
"""The baseline is grey; the arms that are measured against it have colour. They repeat after the eighth arm."""

Line = Sequence[Sequence[float]]  # [tokens, value] pairs


def arm_colours(arms: Iterable[str]) -> dict[str, str]:
    """Give every arm its colour, the same in all figures."""
    return dict(zip(arms, itertools.cycle(COLOURS), strict=False))


def curve_figure(
    arms: Mapping[str, tuple[Sequence[Line], Line]],
    label: str,
    colours: Mapping[str, str],
    *,
    whole_range: bool,
    bands: Mapping[str, Line] | None = None,
    along: str = "training tokens",
) -> str:
    """Return an SVG of each arm's seeds and mean over tokens, or what `along` says.

    `whole_range` shows values from 0 to 1, for accuracies. bands: [low, high] along each mean.
    """
    # svg.hashsalt and no date: the same runs give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tpt", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for arm, (seeds, mean) in arms.items():
            colour = colours[arm]
            for seed in seeds:
                axes.plot(*_columns(seed), color=colour, linewidth=0.8, alpha=0.35)
            if bands is not None:
                axes.fill_between([point[0] for point in mean], *_columns(bands[arm]), color=colour, alpha=0.12, linewidth=0)
            marker = "o" if len(mean) <= 30 else None
            axes.plot(*_columns(mean), color=colour, linewidth=2.2, label=arm, marker=marker, markersize=3.5)
        axes.set_xlabel(along)
        axes.set_ylabel(label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if whole_range:
            axes.set_ylim(-0.02, 1.02)
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # inside HTML the XML prologue is an error


def _columns(line: Line) -> tuple[list[float], list[float]]:
    return [point[0] for point in line], [point[1] for point in line]


def smooth(line: Line, points: int = 200) -> list[list[float]]:
    """Average a long curve in at most `points` even pieces, so that noise of single steps does not hide it."""
    size = -(-len(line) // points)
    pieces = [line[start : start + size] for start in range(0, len(line), size)] if line else []
    return [[sum(point[axis] for point in piece) / len(piece) for axis in (0, 1)] for piece in pieces]


def as_text(value: Any) -> str:
    """Return a token count as people say it, such as 1.25M."""
    text = str(EngFormatter(places=2, sep="")(value))
    return text.replace(".00", "")
