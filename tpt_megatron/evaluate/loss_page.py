"""losses.html: what `hard_tokens.summarise` found, and documents with every token coloured by its loss, one column a model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from typing import Any

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from tpt_megatron import __version__
from tpt_megatron.datasets import PART_NAMES
from tpt_megatron.evaluate.token_losses import Documents
from tpt_megatron.tokenizer import TokenizerLike

DARKEST = 8.0
"""Nats from which on a token has the full colour."""
COLOURS = ("#4c566a", "#d1495b", "#2a7fb8", "#3a8f5c", "#b07a1e", "#7b5ea7")
TOKENS_SHOWN = 600
"""Of a document, from its beginning."""


def render(summary: dict[str, Any], documents: Documents, losses: Mapping[str, npt.NDArray[np.float32]], tokenizer: TokenizerLike | None, shown: int) -> str:
    """Return the page, which needs nothing beside it. tokenizer: of the dataset; ids are shown without."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((resources.files("tpt_megatron.evaluate") / "losses.html").read_text(encoding="utf-8"))
    models = list(losses)
    return template.render(
        version=__version__,
        summary=summary,
        models=models,
        compared=[model for model in models if model != summary["reference"]],
        figure=_difficulty_figure(summary["means"]["difficulty"], models),
        lowered={model: [{**row, "text": _text(row["id"], tokenizer)} for row in rows] for model, rows in summary["lowered"].items()},
        shown=_documents(documents, losses, tokenizer, shown),
        darkest=DARKEST,
    )


def _difficulty_figure(by_group: Mapping[str, Mapping[str, Any]], models: Sequence[str]) -> str:
    """Return an SVG of each model's mean loss in each group of difficulty."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tpt", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for number, model in enumerate(models):
            axes.plot(
                [int(group) for group in by_group],
                [of[model] for of in by_group.values()],
                color=COLOURS[number % len(COLOURS)],
                marker="o",
                markersize=3.5,
                label=model,
            )
        axes.set_xlabel("difficulty, in tenths of the tokens")
        axes.set_ylabel("mean loss (nats)")
        axes.set_xticks(range(1, len(by_group) + 1))
        axes.grid(color="#e3e6ea", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _documents(documents: Documents, losses: Mapping[str, npt.NDArray[np.float32]], tokenizer: TokenizerLike | None, shown: int) -> list[dict[str, Any]]:
    numbers, starts, counts = np.unique(documents.document, return_index=True, return_counts=True)
    chosen = np.unique(np.linspace(0, len(numbers) - 1, min(shown, len(numbers))).round().astype(int))
    pages = []
    for i in chosen.tolist():
        place = slice(int(starts[i]), int(starts[i]) + min(int(counts[i]), TOKENS_SHOWN))
        texts = _texts([int(documents.whole[i][0]), *documents.token[place].tolist()], tokenizer)
        source = documents.sources[int(documents.source[place.start])]
        pages.append(
            {
                "number": int(numbers[i]),
                "source": source,
                "first": texts[0],
                "left_out": int(counts[i]) - len(texts) + 1,
                "columns": {model: _column(texts[1:], documents.part[place], of[place]) for model, of in losses.items()},
            }
        )
    return pages


def _column(texts: Sequence[str], parts: npt.NDArray[np.uint8], losses: npt.NDArray[np.float32]) -> list[dict[str, Any]]:
    return [
        {"text": text, "part": PART_NAMES[part], "loss": f"{loss:.2f}", "strength": f"{min(1.0, loss / DARKEST):.2f}"}
        for text, part, loss in zip(texts, parts.tolist(), losses.tolist(), strict=True)
    ]


def _texts(ids: Sequence[int], tokenizer: TokenizerLike | None) -> list[str]:
    """Return each token as a reader sees it, with the space that some tokenizers put between two."""
    texts = [_text(token, tokenizer) for token in ids]
    if tokenizer is not None:
        for i, (before, token) in enumerate(pairwise(ids), 1):
            if tokenizer.decode([before, token]) == f"{tokenizer.decode([before])} {tokenizer.decode([token])}":
                texts[i] = f" {texts[i]}"
    return texts


def _text(token: int, tokenizer: TokenizerLike | None) -> str:
    """Return a token by itself: line ends, and bytes that are no text by themselves, get a sign."""
    text = f"{token} " if tokenizer is None else tokenizer.decode([token])
    return text.replace("\n", "⏎\n").replace("\t", "⇥") or f"⟨{token}⟩"
