"""The first documents of a token dataset as text, their parts in colours or, where there are none, in brackets."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from tpt_megatron.datasets import PART_NAMES, TokenDataset, sidecar
from tpt_megatron.inspection.printing import DIM, THINKING_STYLE, has_colours, print_line, printable, thinking_mark
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON, TokenizerLike, load_tokenizer

TOKENS_SHOWN = 300
"""Of a document: half of them from its beginning, half from its end."""
_END = -1


def tokenizer_file(prefix: Path) -> Path | None:
    """Return the dataset's own tokenizer; None where it has none."""
    return next((path for path in (sidecar(prefix, name) for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL)) if path.is_file()), None)


def print_documents(dataset: TokenDataset, count: int, console: Console) -> None:
    """Print the first `count` documents, decoded with the dataset's tokenizer, or as ids where there is none."""
    path, details = tokenizer_file(dataset.prefix), dataset.details or {}
    eod = details.get("eod_id")
    tokenizer = load_tokenizer(str(path), details["end_of_document"]) if path is not None and "end_of_document" in details else None
    legend = Text("\nfirst documents" + ("" if tokenizer else ", as ids: the dataset has no tokenizer"))
    if dataset.parts is not None:
        plain, marked = (PART_NAMES[part] for part in dataset.part_codes)
        legend.append(f": {plain}  ").append(thinking_mark(marked, has_colours(console)), THINKING_STYLE)
    if eod is not None:
        legend.append("  end of document", DIM)
    print_line(console, legend)
    for number in range(min(count, len(dataset.lengths))):
        begin, end = int(dataset.offsets[number]), int(dataset.offsets[number + 1])
        print_line(console, Text(f"── {number} ({end - begin:,} tokens)", "bold"))
        print_line(console, document_text(dataset, begin, end, tokenizer, eod, coloured=has_colours(console)))


def document_text(dataset: TokenDataset, begin: int, end: int, tokenizer: TokenizerLike | None, eod: int | None, *, coloured: bool) -> Text:
    """Return tokens [begin, end) as text, run by run of one part; the middle of more than TOKENS_SHOWN is left out, with a note."""
    text = Text()
    plain, marked = dataset.part_codes
    half = TOKENS_SHOWN // 2
    spans = [(begin, end)] if end - begin <= TOKENS_SHOWN else [(begin, begin + half), (end - half, end)]
    for number, (first, last) in enumerate(spans):
        if number:
            text.append(f"\n[… {end - begin - 2 * half:,} tokens …]\n", DIM)
        ids = np.asarray(dataset.tokens[first:last]).astype(np.int64)
        kinds = np.full(len(ids), plain) if dataset.parts is None else np.asarray(dataset.parts[first:last]).astype(np.int64)
        if eod is not None:
            kinds = np.where((ids == eod) & (kinds == plain), _END, kinds)
        for kind, run in groupby(zip(kinds.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]):
            shown = _decoded([token for _, token in run], tokenizer)
            if kind == marked:
                text.append(thinking_mark(shown, coloured), THINKING_STYLE)
            else:
                text.append(shown, DIM if kind == _END else "")
    return text


def _decoded(ids: list[int], tokenizer: TokenizerLike | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids)) + " "
    known = [token for token in ids if 0 <= token < tokenizer.vocabulary_size]
    note = "" if len(known) == len(ids) else f"[{len(ids) - len(known)} ids outside the vocabulary]"
    return printable(tokenizer.decode(known)) + note
