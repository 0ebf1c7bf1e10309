"""What all pages of `tpt inspect` share: lines that do not wrap in files, text that a terminal cannot obey, and how thinking is marked."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

THINKING_STYLE = "cyan"
DIM = "dim"
NAME_LENGTH = 60
"""Characters of a name that a table shows."""


def printable(text: str) -> str:
    """Return text without what a terminal would obey: control and format characters become their code point; line ends and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{{{ord(c):x}}}" for c in text)


def one_line(text: str) -> str:
    """Return text that stays on its line."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def table_name(name: str | None) -> str:
    """Return a source's name as tables show it; `(none)` for what has no source."""
    if name is None:
        return "(none)"
    shown = one_line(name)
    return shown if len(shown) <= NAME_LENGTH else f"{shown[: NAME_LENGTH - 1]}…"


def has_colours(console: Console) -> bool:
    """Say whether styles reach the reader."""
    return console.color_system is not None and not console.no_color


def thinking_mark(text: str, coloured: bool) -> str:
    """Return thinking as it is shown: between brackets where there is no colour to tell it."""
    return text if coloured else f"⟦{text}⟧"


def print_line(console: Console, line: str | Text) -> None:
    """Print a line as it is: no markup, no highlighting, no wrapping by us."""
    console.print(line if isinstance(line, Text) else Text(line), soft_wrap=True, highlight=False)


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Print name and value, one pair a line."""
    for name, value in facts:
        print_line(console, f"{name:<18}{one_line(value)}")


def print_table(console: Console, table: Table) -> None:
    """Print a table as wide as it is: a number that a narrow terminal cut short would be another number."""
    table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table, soft_wrap=True)


def counts_table(first: str, columns: Iterable[str]) -> Table:
    """Return an empty table of one column of names and others of numbers."""
    table = Table(box=box.SIMPLE)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
