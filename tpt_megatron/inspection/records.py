"""What record files hold: documents, thoughts, sources. Read from first to last, one record in memory at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from tpt_megatron.errors import RecordError
from tpt_megatron.inspection.printing import (
    THINKING_STYLE,
    counts_table,
    has_colours,
    one_line,
    print_facts,
    print_line,
    print_table,
    printable,
    table_name,
    thinking_mark,
)
from tpt_megatron.record_files import expand_inputs, is_record_file, read_rows
from tpt_megatron.records import AugmentedDocument, read_augmented
from tpt_megatron.storage import Location

SOURCES_COUNTED = 100_000
"""Different sources that are counted apart; sequences of any further one are counted together."""
OTHERS = "(other sources)"
SOURCES_SHOWN = 30
FAULTS_KEPT = 3
LONGEST_RECORD = 1 << 28
"""Bytes; a longer record is counted as bad and not held."""
CHARACTERS_SHOWN = 1_000


@dataclass(slots=True)
class RecordCounts:
    """Counts over record files. characters are of documents' texts, thinking_characters of thoughts'; faults: the first bad records, with why."""

    files: int = 0
    bytes: int = 0
    records: int = 0
    bad_records: int = 0
    blank_lines: int = 0
    with_thoughts: int = 0
    thoughts: int = 0
    characters: int = 0
    thinking_characters: int = 0
    sources: Counter[str | None] = field(default_factory=Counter)
    generators: Counter[str | None] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first: list[AugmentedDocument] = field(default_factory=list)


def holds_records(place: Location) -> bool:
    """Say whether a place is a record file, a folder with any, or an output of `tpt augment`, finished or not."""
    if not place.is_dir():
        return is_record_file(place.name) and place.is_file()
    is_augmented = (place / "shards").is_dir() and any((place / name).is_file() for name in ("plan.json", "manifest.json"))
    return is_augmented or any(is_record_file(name) for name in place.names())


def count_records(place: Location, documents: int) -> RecordCounts:
    """Read every record; keep the first `documents`. Raises DataError when a file is damaged or an augment output is incomplete."""
    found = RecordCounts()
    for file in expand_inputs((str(place),)):
        found.files += 1
        found.bytes += file.size()
        for row in read_rows(file, longest=LONGEST_RECORD):
            if row.is_blank:
                found.blank_lines += 1
                continue
            try:
                record = read_augmented(row.parse(), row.where)
            except RecordError as error:
                found.bad_records += 1
                if len(found.faults) < FAULTS_KEPT:
                    found.faults.append(str(error))
                continue
            _count(record, found)
            if len(found.first) < documents:
                found.first.append(record)
    return found


def _count(record: AugmentedDocument, found: RecordCounts) -> None:
    found.records += 1
    found.characters += len(record.document.text)
    found.with_thoughts += bool(record.thoughts)
    found.thoughts += len(record.thoughts)
    for thought in record.thoughts:
        found.thinking_characters += len(thought.text)
        _add(found.generators, thought.generator)
    _add(found.sources, record.document.source)


def _add(counts: Counter[str | None], name: str | None) -> None:
    counts[name if name in counts or len(counts) < SOURCES_COUNTED else OTHERS] += 1


def print_records(place: Location, console: Console, documents: int) -> None:
    """Print counts, sources, and the first documents of a record file or a folder of them."""
    found = count_records(place, documents)
    share = f" ({found.with_thoughts / found.records:.1%})" if found.records else ""
    facts = [
        ("record files", str(place)),
        ("files", f"{found.files:,} ({found.bytes:,} bytes)"),
        ("records", f"{found.records:,}"),
        ("  with thoughts", f"{found.with_thoughts:,}{share}"),
        ("thoughts", f"{found.thoughts:,}"),
        ("characters", f"{found.characters:,}"),
        ("  of thoughts", f"{found.thinking_characters:,}"),
        ("bad records", f"{found.bad_records:,}"),
        ("blank lines", f"{found.blank_lines:,}"),
    ]
    print_facts(console, facts)
    for fault in found.faults:
        print_line(console, f"  {one_line(fault)}")
    _print_counter("source", "records", found.sources, console)
    _print_counter("generator", "thoughts", found.generators, console)
    _print_documents(found.first, console)


def _print_counter(what: str, of: str, counts: Counter[str | None], console: Console) -> None:
    if not counts:
        return
    table = counts_table(what, (of, "share"))
    total = counts.total()
    for name, count in counts.most_common(SOURCES_SHOWN):
        table.add_row(Text(table_name(name)), f"{count:,}", f"{count / total:.1%}")
    print_table(console, table)
    if len(counts) > SOURCES_SHOWN:
        print_line(console, f"and {len(counts) - SOURCES_SHOWN:,} more")


def _print_documents(documents: list[AugmentedDocument], console: Console) -> None:
    coloured = has_colours(console)
    if documents:
        print_line(console, Text("\nfirst documents: document  ").append(thinking_mark("thinking", coloured), THINKING_STYLE))
    for number, record in enumerate(documents):
        source = "" if record.document.source is None else f", {table_name(record.document.source)}"
        print_line(console, Text(f"── {number} ({table_name(record.document.id)}{source})", "bold"))
        print_line(console, _excerpt(record.document.text))
        for thought in record.thoughts:
            print_line(console, Text(thinking_mark(_excerpt(thought.text), coloured), THINKING_STYLE))


def _excerpt(text: str) -> str:
    half = CHARACTERS_SHOWN // 2
    if len(text) <= CHARACTERS_SHOWN:
        return printable(text)
    return f"{printable(text[:half])}\n[… {len(text) - 2 * half:,} characters …]\n{printable(text[-half:])}"
