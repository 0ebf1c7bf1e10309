"""Showing a token dataset in the terminal: what it is, counts, lengths, and its first documents with their parts in colours."""

from __future__ import annotations

import unicodedata
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tpt_megatron.datasets import PART_THINKING, TokenDataset, open_dataset, sidecar
from tpt_megatron.errors import DataError, UsageError
from tpt_megatron.inspection.summary import Summary, histogram, percentiles, summarise
from tpt_megatron.inspection.verify import FINDINGS_SHOWN, verify
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON, TokenizerLike, load_tokenizer

SOURCES_SHOWN = 30
TOKENS_SHOWN = 300
"""Of a document: half of them from its beginning, half from its end."""
BAR = 40
THINKING_STYLE = "cyan"


def inspect_path(path: Path, console: Console, *, documents: int, plot: Path | None, check: bool) -> None:
    """Show what lies at `path`: a dataset's PREFIX, one of its files, or an output of `tpt preprocess`, whose datasets are listed.

    Raises UsageError for anything else, and DataError when `check` finds anything wrong.
    """
    prefix = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix in (".bin", ".idx") else path
    if path.is_dir():
        _show_folder(path, console)
        return
    if not sidecar(prefix, "idx").is_file():
        raise UsageError(f"{path}: neither a dataset (PREFIX.bin and PREFIX.idx; give PREFIX) nor an output folder of tpt preprocess")
    if check:
        _verify(prefix, console)
        return
    dataset = open_dataset(prefix)
    summary = summarise(dataset)
    _show_facts(dataset, summary, console)
    _show_sources(summary, console)
    _show_lengths(summary, console)
    if documents:
        _show_documents(dataset, documents, console)
    if plot is not None:
        from tpt_megatron.inspection.plot import plot_summary

        plot_summary(summary, plot, str(prefix))
        console.print(f"picture: {escape(str(plot))}")


def _verify(prefix: Path, console: Console) -> None:
    def say(what: str, findings: list[str]) -> None:
        console.print(f"{what}: {'ok' if not findings else f'{len(findings)} finding(s)'}")
        for finding in findings[:FINDINGS_SHOWN]:
            console.print(f"  {escape(finding)}")

    found = verify(prefix, say)
    if found:
        raise DataError(f"{prefix}: {found} finding(s), see above; make the dataset again")


def _show_folder(folder: Path, console: Console) -> None:
    prefixes = sorted(path.with_name(path.name.removesuffix(".idx")) for path in [*folder.glob("*.idx"), *folder.glob("*/*.idx")])
    if not prefixes:
        raise UsageError(f"{folder}: no dataset in it (a PREFIX.idx here or one folder below)")
    table = Table(box=box.SIMPLE)
    table.add_column("dataset", no_wrap=True)
    names = ("sequences", "tokens", "document", "thinking", "mean length")
    for name in names:
        table.add_column(name, justify="right")
    for prefix in prefixes:
        summary = summarise(open_dataset(prefix))
        thinking = None if summary.thinking is None else int(summary.thinking.sum())
        parts = ("-", "-") if thinking is None else (f"{summary.tokens - thinking:,}", f"{thinking:,}")
        row = (f"{len(summary.lengths):,}", f"{summary.tokens:,}", *parts, f"{summary.tokens / len(summary.lengths):,.1f}")
        table.add_row(escape(str(prefix.relative_to(folder))), *row)
    console.print(table)


def _show_facts(dataset: TokenDataset, summary: Summary, console: Console) -> None:
    details: dict[str, Any] = dataset.details or {}
    total = summary.tokens
    facts = [("dataset", str(dataset.prefix))]
    if details:
        facts += [(name, str(details[name])) for name in ("arm", "split") if name in details]
        facts.append(("tokenizer", f"{details['tokenizer_fingerprint']}, {details['vocabulary_size']:,} ids"))
        facts.append(("end of document", f"{details['end_of_document']} (id {details['eod_id']})"))
    else:
        facts.append(("sidecars", "none: a plain Megatron dataset"))
    facts += [("stored as", str(dataset.tokens.dtype)), ("sequences", f"{len(summary.lengths):,}"), ("tokens", f"{total:,}")]
    if summary.thinking is not None:
        thinking = int(summary.thinking.sum())
        facts += [(name, f"{count:,} ({count / total:.1%})") for name, count in (("  document", total - thinking), ("  thinking", thinking))]
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts:
        table.add_row(name, escape(value))
    console.print(table)


def _show_sources(summary: Summary, console: Console) -> None:
    if summary.by_source is None:
        return
    table = Table("source", box=box.SIMPLE)
    for name in ("sequences", "tokens", "document", "thinking", "mean length"):
        table.add_column(name, justify="right")
    for row in summary.by_source[:SOURCES_SHOWN]:
        tokens = row.tokens_document + row.tokens_thinking
        numbers = (row.sequences, tokens, row.tokens_document, row.tokens_thinking)
        table.add_row(
            "(none)" if row.name is None else escape(printable(row.name)), *(f"{number:,}" for number in numbers), f"{tokens / max(1, row.sequences):,.1f}"
        )
    console.print(table)
    if len(summary.by_source) > SOURCES_SHOWN:
        console.print(f"and {len(summary.by_source) - SOURCES_SHOWN} more sources")


def _show_lengths(summary: Summary, console: Console) -> None:
    kinds = [("whole", summary.lengths), ("document", summary.document), ("thinking", summary.thinking)]
    table = Table("tokens a sequence", box=box.SIMPLE)
    shown = [(name, values) for name, values in kinds if values is not None and (name == "whole" or (values != 0).any())]
    for name in percentiles(summary.lengths):
        table.add_column(name, justify="right")
    for name, values in shown:
        table.add_row(name, *(f"{value:,.0f}" if key != "mean" else f"{value:,.1f}" for key, value in percentiles(values).items()))
    console.print(table)
    rows = histogram(summary.lengths)
    most = max(count for _, _, count in rows)
    for begin, end, count in rows:
        console.print(f"{begin:>12,} to {end - 1:>12,} {count:>14,}  {'█' * round(BAR * count / most)}", highlight=False)


def _show_documents(dataset: TokenDataset, count: int, console: Console) -> None:
    tokenizer = _tokenizer_of(dataset)
    coloured = console.color_system is not None
    legend = Text("\nfirst documents: ").append("document").append("  ").append("thinking" if coloured else "⟦thinking⟧", THINKING_STYLE)
    console.print(legend)
    for number in range(min(count, len(dataset.lengths))):
        begin, end = int(dataset.offsets[number]), int(dataset.offsets[number + 1])
        console.print(Text(f"── {number} ({end - begin:,} tokens)", "bold"))
        console.print(_document(dataset, begin, end, tokenizer, coloured=coloured), highlight=False, soft_wrap=True)


def _document(dataset: TokenDataset, begin: int, end: int, tokenizer: TokenizerLike | None, *, coloured: bool) -> Text:
    text = Text()
    half = TOKENS_SHOWN // 2
    spans = [(begin, end)] if end - begin <= TOKENS_SHOWN else [(begin, begin + half), (end - half, end)]
    for number, (first, last) in enumerate(spans):
        if number:
            text.append(f"\n[… {end - begin - TOKENS_SHOWN:,} tokens …]\n", "dim")
        ids = dataset.tokens[first:last].tolist()
        parts = [0] * len(ids) if dataset.parts is None else dataset.parts[first:last].tolist()
        for part, run in groupby(zip(ids, parts, strict=True), key=lambda pair: pair[1]):
            run_ids = [token for token, _ in run]
            shown = printable(tokenizer.decode(run_ids)) if tokenizer is not None else " ".join(map(str, run_ids)) + " "
            if part == PART_THINKING:
                text.append(shown if coloured else f"⟦{shown}⟧", THINKING_STYLE)
            else:
                text.append(shown)
    return text


def printable(text: str) -> str:
    """Return text without what a terminal would obey: control and format characters become their code point; line ends and tabs stay."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{{{ord(c):x}}}" for c in text)


def _tokenizer_of(dataset: TokenDataset) -> TokenizerLike | None:
    for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL):
        path = sidecar(dataset.prefix, name)
        if path.is_file() and dataset.details is not None:
            return load_tokenizer(str(path), dataset.details["end_of_document"])
    return None
