"""`tpt inspect`: finds out what lies at a path, and prints what it holds: a dataset, an output of `tpt preprocess`, record files, a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tpt_megatron.datasets import DOCUMENT_PARTS, MANIFEST_KIND, PART_NAMES, TokenDataset, open_dataset, sidecar
from tpt_megatron.errors import DataError, UsageError
from tpt_megatron.files import read_manifest
from tpt_megatron.inspection.documents import print_documents, tokenizer_file
from tpt_megatron.inspection.models import holds_model, print_model
from tpt_megatron.inspection.printing import counts_table, one_line, print_facts, print_line, print_table, table_name
from tpt_megatron.inspection.records import holds_records, print_records
from tpt_megatron.inspection.summary import Summary, distribution, percentiles, shown_kinds, summarise
from tpt_megatron.inspection.verify import verify
from tpt_megatron.storage import locate

SOURCES_SHOWN = 30
_DOCUMENT = tuple(PART_NAMES[part] for part in DOCUMENT_PARTS)
SIDECARS = ("parts.bin", "sources.bin", "documents.parquet", "tokenizer.json", "tokenizer.model", "manifest.json")


def inspect_path(path: str | Path, console: Console, *, documents: int, plot: Path | None, check: bool) -> None:
    """Show what lies at `path`: a dataset's PREFIX (or its .bin or .idx), an output of `tpt preprocess`, a model's folder, or record files,
    which may be a URL.

    `check` verifies instead, every dataset where `path` is a folder. Raises UsageError for anything else and for options
    that do not fit what is there, and DataError when `check` finds anything wrong, after all of it is printed.
    """
    if plot is not None and check:
        raise UsageError("give one of --plot and --verify")
    local = None if "://" in str(path) else Path(path)
    named = None if local is None else _named_dataset(local)
    prefixes = [named] if named is not None else [] if local is None else _datasets_in(local)
    if local is not None and named is None and holds_model(local):
        if plot is not None:
            raise UsageError(f"{path}: --plot draws a dataset, and this is a model's folder")
        print_model(local, console, check=check)
    elif not prefixes:
        _show_records(path, console, documents, has_options=plot is not None or check)
    elif check:
        _verify(prefixes, console)
    elif named is not None:
        _show_dataset(named, console, documents, plot)
    elif plot is not None:
        raise UsageError(f"{path}: --plot draws one dataset; give its PREFIX, for example {prefixes[0]}")
    else:
        _show_folder(Path(path), prefixes, console)


def _named_dataset(path: Path) -> Path | None:
    """Return the prefix of the dataset that a path names, by itself or by its .bin or .idx; None where it names none."""
    prefix = path.with_name(path.name.removesuffix(path.suffix)) if path.suffix in (".bin", ".idx") else path
    return prefix if prefix.name and (sidecar(prefix, "idx").is_file() or sidecar(prefix, "bin").is_file()) else None


def _datasets_in(folder: Path) -> list[Path]:
    """Return the prefixes of the datasets in a folder and one below."""
    return sorted(found.with_name(found.name.removesuffix(".idx")) for found in [*folder.glob("*.idx"), *folder.glob("*/*.idx")])


def _show_records(path: str | Path, console: Console, documents: int, *, has_options: bool) -> None:
    place = locate(path)
    if not holds_records(place):
        what = "no dataset in it (a PREFIX.idx here or one folder below), and no record file" if place.is_dir() else "neither a dataset nor a record file"
        raise UsageError(
            f"{path}: {what}; tpt inspect takes a dataset's PREFIX (PREFIX.bin and PREFIX.idx), an output folder of tpt preprocess, "
            "a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file of records or a folder of them, a checkpoint, a run, or a Hugging Face model folder"
        )
    if has_options:
        raise UsageError(f"{path}: --plot and --verify are for token datasets, and these are record files")
    print_records(place, console, documents)


def _verify(prefixes: list[Path], console: Console) -> None:
    def say(what: str, findings: list[str]) -> None:
        print_line(console, f"{what}: {'ok' if not findings else f'{len(findings)} finding(s)'}")
        for finding in findings:
            print_line(console, f"  {one_line(finding)}")

    found = {}
    for prefix in prefixes:
        if len(prefixes) > 1:
            print_line(console, Text(str(prefix), "bold"))
        try:
            found[prefix] = verify(prefix, say)
        except DataError as error:  # a manifest that cannot be read must not keep the other datasets from being checked
            say("manifest", [str(error)])
            found[prefix] = 1
        if not sidecar(prefix, "manifest.json").is_file():
            print_line(console, "no manifest: ids, parts and counts cannot be checked")
    wrong = [f"{prefix}" for prefix, count in found.items() if count]
    if wrong:
        raise DataError(f"{', '.join(wrong)}: {sum(found.values())} finding(s), see above; make the dataset again")


def _show_folder(folder: Path, prefixes: list[Path], console: Console) -> None:
    summaries = {prefix: summarise(open_dataset(prefix)) for prefix in prefixes}
    names = list(dict.fromkeys(name for summary in summaries.values() for name in summary.parts or _DOCUMENT))
    table = counts_table("dataset", ("sequences", "tokens", *names, "mean length"))
    for prefix, summary in summaries.items():
        counted = summary.tokens_by_part
        parts = (f"{counted[name]:,}" if name in counted else "-" for name in names)
        row = (f"{len(summary.lengths):,}", f"{summary.tokens:,}", *parts, f"{summary.tokens / len(summary.lengths):,.1f}")
        table.add_row(Text(one_line(str(prefix.relative_to(folder)))), *row)
    print_table(console, table)


def _show_dataset(prefix: Path, console: Console, documents: int, plot: Path | None) -> None:
    if plot is not None:
        from tpt_megatron.inspection.plot import check_plot

        check_plot(plot)  # before all the reading
    dataset = open_dataset(prefix)
    summary = summarise(dataset)
    print_facts(console, _facts(dataset, summary))
    _show_sources(summary, console)
    _show_lengths(summary, console)
    if documents:
        print_documents(dataset, documents, console)
    if plot is not None:
        from tpt_megatron.inspection.plot import plot_summary

        plot_summary(summary, plot, str(prefix))
        print_line(console, f"picture: {plot}")


def _facts(dataset: TokenDataset, summary: Summary) -> list[tuple[str, str]]:
    """Return what is known of a dataset, as (name, value): of a plain Megatron one, its counts."""
    prefix, details = dataset.prefix, dataset.details or {}
    facts = [("dataset", str(prefix)), *((name, str(details[name])) for name in ("arm", "split") if name in details)]
    facts.append(("stored as", dataset.tokens.dtype.name))
    facts += _tokenizer_facts(prefix, details)
    present = [ending for ending in SIDECARS if sidecar(prefix, ending).is_file()]
    facts.append(("sidecars", ", ".join(present) if present else "none: a plain Megatron dataset"))
    # From the files themselves; --verify tells where the manifest's counts differ.
    counted = {"sequences": len(summary.lengths), "tokens": summary.tokens}
    facts += [(name, f"{count:,}") for name, count in counted.items()]
    facts += [(f"  {name}", f"{count:,} ({count / summary.tokens:.1%})") for name, count in summary.tokens_by_part.items()]
    counts = read_manifest(sidecar(prefix, "manifest.json"), MANIFEST_KIND).counts if dataset.details is not None else {}
    others = {name: count for name, count in counts.items() if name not in counted and not name.startswith("tokens_")}
    if others:
        facts.append(("from the manifest", ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in others.items())))
    return facts


def _tokenizer_facts(prefix: Path, details: dict[str, Any]) -> list[tuple[str, str]]:
    facts, path = [], tokenizer_file(prefix)
    if "tokenizer_fingerprint" in details:
        kind = "file missing" if path is None else "SentencePiece" if path.suffix == ".model" else "tokenizer.json"
        facts.append(("tokenizer", f"{kind}, fingerprint {details['tokenizer_fingerprint']}"))
    if "vocabulary_size" in details:
        facts.append(("vocabulary", f"{details['vocabulary_size']:,} ids"))
    if "end_of_document" in details:
        facts.append(("end of document", f"{details['end_of_document']} (id {details.get('eod_id')})"))
    return facts


def _show_sources(summary: Summary, console: Console) -> None:
    if summary.by_source is None:
        return
    table = counts_table("source", ("sequences", "tokens", *(summary.parts or ()), "mean length"))
    for row in summary.by_source[:SOURCES_SHOWN]:
        numbers = (row.sequences, row.tokens, *row.by_part.values())
        table.add_row(Text(table_name(row.name)), *(f"{number:,}" for number in numbers), f"{row.tokens / row.sequences:,.1f}")
    print_table(console, table)
    if len(summary.by_source) > SOURCES_SHOWN:
        print_line(console, f"and {len(summary.by_source) - SOURCES_SHOWN} more sources")


def _show_lengths(summary: Summary, console: Console) -> None:
    kinds = shown_kinds(summary)
    table = counts_table("tokens a sequence", percentiles(summary.lengths))
    for name, values in kinds.items():
        table.add_row(name, *(f"{value:,.0f}" if key != "mean" else f"{value:,.1f}" for key, value in percentiles(values).items()))
    print_table(console, table)
    _show_histogram(summary, list(kinds), console)


def _show_histogram(summary: Summary, kinds: list[str], console: Console) -> None:
    rows = distribution(summary)
    most = {name: max(1, *(counts[name] for _, _, counts in rows)) for name in kinds}
    digits = max(len(f"{count:,}") for count in most.values())
    edge = len(f"{rows[-1][1] - 1:,}")
    width = 40 if len(kinds) == 1 else max(4, min(24, (min(console.width, 120) - 2 * edge - 4) // len(kinds) - digits - 3))
    header = " " * (2 * edge + 4) + "".join(f"  {'sequences, ' + name:<{digits + 1 + width}}" for name in kinds)
    print_line(console, header.rstrip())
    for begin, end, counts in rows:
        bars = "".join(f"  {counts[name]:>{digits},} {'█' * round(width * counts[name] / most[name]):<{width}}" for name in kinds)
        print_line(console, f"{begin:>{edge},} to {end - 1:>{edge},}{bars}".rstrip())
