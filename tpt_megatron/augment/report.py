"""What an augment run did, for people: one HTML file that needs nothing beside it, and a summary for the terminal."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from datetime import timedelta
from importlib import resources
from typing import TYPE_CHECKING, Any

from tpt_megatron import __version__
from tpt_megatron.augment.statistics import BINS_PER_DOUBLING, Group, Histogram, Statistics, quantity, spent
from tpt_megatron.config.augment import Cost
from tpt_megatron.errors import MachineError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

MAXIMUM_BARS = 24
MAXIMUM_LABEL = 36
BLUE, RED, GREY = "#2a7fb8", "#d1495b", "#4c566a"

Rows = list[tuple[str, str]]


def render_report(
    statistics: Statistics,
    *,
    title: str,
    progress: tuple[int, int],
    settings: Mapping[str, Any],
    cost: Cost,
    elapsed_s: float | None,
) -> str:
    """Return the report as one HTML page.

    progress    (finished shards, all shards)
    settings    what a reader should know of the config, by name
    elapsed_s   wall time of the run, seconds, where known

    Raises MachineError without matplotlib or jinja2.
    """
    lengths = _Lengths(statistics)
    return fill_template(
        "report.html",
        title=title,
        finished=progress[0],
        shards=progress[1],
        facts=_facts(statistics, lengths),
        statistics=statistics,
        unit=lengths.unit,
        uncounted=lengths.uncounted,
        expansion=_expansion_rows(statistics),
        histogram=_histogram_figure(lengths.all, lengths.unit) if lengths.all.count else None,
        groupings=[
            _grouping("source", statistics.by_source, lengths, "no record names a source"),
            _grouping("difficulty", statistics.by_difficulty, lengths, "no record states a difficulty; difficulty_field=NAME tells which field does"),
            _grouping("generator and prompt", statistics.by_maker, lengths, ""),
        ],
        reasons=_rejections(statistics),
        rejections=_bar_figure({reason: sum(counts.values()) for reason, counts in statistics.rejections.items()}) if statistics.rejected else None,
        spending=throughput_rows(statistics, cost, elapsed_s),
        settings={name: "–" if value is None else str(value) for name, value in settings.items()},
        quantity=quantity,
    )


def fill_template(name: str, **values: Any) -> str:
    """Return a page template of this package, filled; MachineError without jinja2."""
    try:
        import jinja2
    except ImportError:
        raise _missing("jinja2") from None
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = (resources.files("tpt_megatron.augment") / name).read_text(encoding="utf-8")
    return environment.from_string(text).render(version=__version__, **values)


def _missing(package: str) -> MachineError:
    return MachineError(f"{package} is not installed; the pages of tpt augment need it: pip install 'tpt-megatron[report]'")


class _Lengths:
    """In which unit thoughts are measured: tokens where an engine told any; else characters, which are no tokens."""

    def __init__(self, statistics: Statistics) -> None:
        self.in_tokens = statistics.all.tokens.count > 0
        self.unit = "tokens" if self.in_tokens else "characters"
        self.all = self.of(statistics.all)
        self.uncounted = statistics.thoughts - self.all.count

    def of(self, group: Group) -> Histogram:
        """Return a group's lengths in that unit."""
        return group.tokens if self.in_tokens else group.characters


def _approximately(value: float | None) -> str:
    return "–" if value is None else quantity(round(value))


def _facts(statistics: Statistics, lengths: _Lengths) -> list[tuple[str, str, str]]:
    """Return (value, name, note) of the page's key figures."""
    without, kept = statistics.documents_without_thoughts, statistics.kept_share
    expansion = statistics.expansion_tokens or statistics.expansion_characters
    facts = [
        (quantity(statistics.documents), "documents", f"{quantity(without)} without a thought" if without else ""),
        (quantity(statistics.thoughts), "thoughts", f"{kept:.1%} kept, {quantity(statistics.rejected)} rejected" if kept is not None else ""),
    ]
    if lengths.all.count:
        nine_tenths = _approximately(lengths.all.quantile(0.9))
        facts.append((_approximately(lengths.all.quantile(0.5)), "median thought", f"{lengths.unit}; nine in ten have at most {nine_tenths}"))
    if expansion is not None:
        facts.append((f"{expansion:.2f}×", "expansion", f"in {'tokens' if statistics.expansion_tokens else 'characters'}, document and thoughts over document"))
    if statistics.generated_tokens:
        facts.append((quantity(statistics.generated_tokens), "tokens generated", f"from {quantity(statistics.prompt_tokens)} of prompts"))
    return facts


def _expansion_rows(statistics: Statistics) -> Rows:
    rows = []
    if statistics.expansion_characters is not None:
        rows.append(("expansion in characters, exact", f"{statistics.expansion_characters:.3f}×"))
    if statistics.expansion_tokens is not None:
        counted = statistics.training_tokens.count
        over = "all documents" if counted == statistics.documents else f"the {counted:,} of {statistics.documents:,} documents whose tokens are known"
        rows.append((f"expansion in tokens, over {over}", f"{statistics.expansion_tokens:.3f}×"))
    return rows


def throughput_rows(statistics: Statistics, cost: Cost, elapsed_s: float | None) -> Rows:
    """Return (name, value) of throughput and cost so far; what was not stated or not told is left out."""
    rows: Rows = []
    if statistics.requests:
        rows.append(("requests", f"{statistics.requests:,}"))
    if statistics.prompt_tokens:
        rows.append(("prompt tokens", f"{statistics.prompt_tokens:,}"))
    if statistics.generated_tokens:
        rows.append(("generated tokens, those of rejected thoughts too", f"{statistics.generated_tokens:,}"))
    if statistics.work_ms:
        rows.append(("worker time, summed over workers", str(timedelta(seconds=round(statistics.work_s)))))
    if elapsed_s:
        rows += [
            ("wall time", str(timedelta(seconds=round(elapsed_s)))),
            ("documents per second", quantity(statistics.documents / elapsed_s)),
        ]
        if statistics.generated_tokens:
            rows.append(("generated tokens per second", quantity(statistics.generated_tokens / elapsed_s)))
    now = spent(statistics, cost, elapsed_s)
    if now.gpu_hours is not None:
        rows.append((f"GPU-hours, {cost.gpus:,} GPU{'s' if cost.gpus > 1 else ''} for the wall time", quantity(now.gpu_hours)))
        if statistics.generated_tokens and elapsed_s:
            rows.append(("generated tokens per second and GPU", quantity(statistics.generated_tokens / elapsed_s / cost.gpus)))
    if now.gpu_cost is not None:
        rows.append((f"cost by GPU-hour, at {cost.per_gpu_hour:g} {cost.currency}", f"{now.gpu_cost:,.2f} {cost.currency}"))
    if now.token_cost is not None:
        rows.append(("cost by token", f"{now.token_cost:,.2f} {cost.currency}"))
    return rows


def _rejections(statistics: Statistics) -> list[dict[str, Any]]:
    everything = statistics.thoughts + statistics.rejected
    rows = [
        {"reason": reason, "count": sum(counts.values()), "share": f"{sum(counts.values()) / everything:.2%}", "by_maker": sorted(counts.items())}
        for reason, counts in statistics.rejections.items()
    ]
    return sorted(rows, key=lambda row: (-row["count"], row["reason"]))


def _grouping(name: str, groups: Mapping[str, Group], lengths: _Lengths, otherwise: str) -> dict[str, Any]:
    """Return one section on thinking length: figure and table, longest first. `otherwise` says why there is nothing."""
    measured = {group: lengths.of(about) for group, about in _ordered(groups, lengths).items()}
    drawn = {group: found for group, found in measured.items() if found.count}
    most = sorted(drawn, key=lambda group: -drawn[group].count)[:MAXIMUM_BARS]
    rows = [
        {
            "name": group,
            "documents": f"{groups[group].documents:,}",
            "thoughts": f"{groups[group].characters.count:,}",
            "mean": _approximately(found.mean),
            "quantiles": [_approximately(found.quantile(share)) for share in (0.1, 0.5, 0.9)],
        }
        for group, found in measured.items()
    ]
    figure = _interval_figure({group: found for group, found in drawn.items() if group in most}, lengths.unit) if most else None
    return {"name": name, "rows": rows, "figure": figure, "left_out": len(drawn) - len(most), "otherwise": otherwise}


def _ordered(groups: Mapping[str, Group], lengths: _Lengths) -> dict[str, Group]:
    """Order groups that are numbers, such as grades, by number; others by their mean length, longest first."""
    if all(_number(name) is not None for name in groups):
        names = sorted(groups, key=lambda name: (_number(name) or 0.0, name))
    else:
        names = sorted(groups, key=lambda name: (-(lengths.of(groups[name]).mean or 0.0), name))
    return {name: groups[name] for name in names}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _figure(height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _drawing() -> Any:
    """Return matplotlib's settings for the page's figures; MachineError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise _missing("matplotlib") from None
    # svg.hashsalt and no date: the same statistics give the same file.
    return matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tpt", "font.family": "sans-serif", "font.size": 10})


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in any script: the reader's browser has the fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # inside HTML the XML prologue is an error


def _names_on(axes: Any, names: list[str]) -> None:
    short = [name if len(name) <= MAXIMUM_LABEL else f"{name[: MAXIMUM_LABEL - 16]}…{name[-15:]}" for name in names]
    axes.set_yticks(range(len(names)), labels=short, parse_math=False)  # a dollar sign in a name is no formula
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _histogram_figure(lengths: Histogram, unit: str) -> str:
    """Draw thoughts by length, on a logarithmic axis since the bins are logarithmic."""
    with _drawing():
        from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

        figure, axes = _figure(2.9)
        bins = {index: count for index, count in lengths.bins.items() if index >= 0}
        edges = [2 ** (index / BINS_PER_DOUBLING) for index in bins]
        widths = [edge * (2 ** (1 / BINS_PER_DOUBLING) - 1) for edge in edges]
        axes.bar(edges, list(bins.values()), widths, align="edge", color=BLUE, edgecolor="white", linewidth=0.7)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(f"{unit} of a thought")
        axes.set_ylabel("thoughts")
        axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
        return _svg(figure)


def _interval_figure(groups: Mapping[str, Histogram], unit: str) -> str:
    """Draw each group's median, the middle half of its lengths, and the middle eight tenths."""
    with _drawing():
        from matplotlib.ticker import EngFormatter

        figure, axes = _figure(1.0 + 0.3 * len(groups))
        for place, found in enumerate(groups.values()):
            tenth, quarter, median, three_quarters, nine_tenths = (found.quantile(share) or 0.0 for share in (0.1, 0.25, 0.5, 0.75, 0.9))
            axes.plot([tenth, nine_tenths], [place, place], color=BLUE, linewidth=1.4, alpha=0.6, solid_capstyle="butt")
            axes.plot([quarter, three_quarters], [place, place], color=BLUE, linewidth=6, alpha=0.45, solid_capstyle="butt")
            axes.plot([median], [place], color=BLUE, marker="o", markersize=6)
        _names_on(axes, list(groups))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel(f"{unit} of a thought")
        axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
        return _svg(figure)


def _bar_figure(counts: Mapping[str, int]) -> str:
    """Draw counts as bars, the largest first."""
    with _drawing():
        from matplotlib.ticker import EngFormatter, MaxNLocator

        names = sorted(counts, key=lambda name: (-counts[name], name))
        figure, axes = _figure(0.9 + 0.32 * len(names))
        bars = axes.barh(range(len(names)), [counts[name] for name in names], height=0.62, color=RED)
        axes.bar_label(bars, labels=[f"{counts[name]:,}" for name in names], padding=4, color=GREY)
        _names_on(axes, names)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("rejected thoughts")
        axes.margins(x=0.1)
        axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
        return _svg(figure)


def terminal_summary(statistics: Statistics, cost: Cost, elapsed_s: float | None) -> Table:
    """Return the key figures, rejections by reason, throughput and cost as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    lengths = _Lengths(statistics)
    table = Table(show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("note", style="dim")
    for value, name, note in _facts(statistics, lengths):
        table.add_row(name, value, note)
    if lengths.in_tokens and lengths.uncounted:
        table.add_row("thoughts without a token count", quantity(lengths.uncounted), "their engine tells none; left out of lengths")
    for row in _rejections(statistics):
        table.add_row(Text(f"rejected: {row['reason']}"), f"{row['count']:,}", row["share"])
    already_said = {"generated tokens, those of rejected thoughts too", "prompt tokens"}
    for name, value in throughput_rows(statistics, cost, elapsed_s):
        if name not in already_said:
            table.add_row(Text(name), value, "")
    return table
