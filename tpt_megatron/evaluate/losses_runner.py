"""`tpt losses`: the losses of some documents' tokens under each model, and what they say."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from tpt_megatron.config.losses import LossesConfig
from tpt_megatron.datasets import PART_NAMES, TokenDataset, open_dataset, sidecar
from tpt_megatron.errors import DataError
from tpt_megatron.evaluate.exports import model_folder, remove_stale_exports
from tpt_megatron.evaluate.hard_tokens import Losses, difficulty, summarise
from tpt_megatron.evaluate.loss_page import render
from tpt_megatron.evaluate.token_losses import Documents, choose_documents, positions_of, token_losses
from tpt_megatron.files import open_atomic, write_json, write_text
from tpt_megatron.log import progress_bar
from tpt_megatron.tokenizer import SENTENCEPIECE_MODEL, TOKENIZER_JSON, TokenizerLike, load_tokenizer

log = logging.getLogger(__name__)


def run_losses(config: LossesConfig) -> dict[str, Any]:
    """Write OUTPUT/tokens.parquet (a row a token), losses.json and losses.html, and return what losses.json holds.

    Raises DataError for a dataset or a model that cannot be read, or that do not belong together, and CheckpointError and ConversionError for checkpoints
    that cannot be exported. Memory: the chosen documents' tokens, about 40 bytes each, and one model at a time.
    """
    dataset = open_dataset(config.data)
    remove_stale_exports(config.output)
    with ExitStack() as stack:
        folders = {name: stack.enter_context(model_folder(path, config.output)) for name, path in config.models.items()}
        for name, folder in folders.items():
            _check_tokenizer(config, name, folder, dataset)
        most = min(positions_of(folder) for folder in folders.values())
        documents = choose_documents(dataset, config.documents, min(config.longest or most, most))
        losses = {}
        with progress_bar("losses", total=len(documents.whole) * len(folders)) as bar:
            for name, folder in folders.items():
                bar.say(name)
                losses[name] = token_losses(folder, documents, config.dtype, bar.advance)
                log.info("%s: %.4f nats a token", name, losses[name].mean(dtype=float))
    about = {"models": {name: str(path) for name, path in config.models.items()}, "data": config.data}
    summary = summarise(documents, losses, config.reference, config.learned_below) | about
    config.output.mkdir(parents=True, exist_ok=True)
    with open_atomic(config.output / "tokens.parquet") as file:
        pq.write_table(_table(documents, losses, config.reference), file, compression="zstd")
    write_text(config.output / "losses.html", render(summary, documents, losses, _tokenizer(dataset), config.show_documents))
    write_json(config.output / "losses.json", summary)
    return summary


def losses_table(summary: dict[str, Any]) -> Table:
    """Return mean losses for the terminal."""
    table = Table(title=f"nats a token, {summary['tokens']:,} tokens of {summary['documents']:,} documents", title_justify="left")
    table.add_column("tokens that are")
    for column in ("", *summary["models"]):
        table.add_column(column or "tokens", justify="right")
    for kind, rows in summary["means"].items():
        for name, row in rows.items():
            title = "all" if kind == "all" else f"{kind} {name}"
            table.add_row(title, f"{row['tokens']:,}", *(f"{row[model]:.3f}" for model in summary["models"]))
    return table


def _table(documents: Documents, losses: Losses, reference: str) -> pa.Table:
    """Return a row a token; difficulty is 1 to 10, and loss/NAME in nats."""
    return pa.table(
        {
            "document": documents.document,
            "position": documents.position,
            "token": documents.token,
            "part": pa.array([PART_NAMES[part] for part in documents.part.tolist()]).dictionary_encode(),
            "source": pa.array([documents.sources[number] for number in documents.source.tolist()], pa.string()).dictionary_encode(),
            "difficulty": (difficulty(losses[reference]) + 1).astype("int8"),
            **{f"loss/{name}": of for name, of in losses.items()},
        }
    )


def _check_tokenizer(config: LossesConfig, name: str, folder: Path, dataset: TokenDataset) -> None:
    """Refuse a model that was trained with another tokenizer than the data, where both say which (DataError): their ids mean other texts."""
    details, path = dataset.details or {}, folder / TOKENIZER_JSON
    if "tokenizer_fingerprint" not in details or not path.is_file():
        return
    if load_tokenizer(str(path), details["end_of_document"]).fingerprint != details["tokenizer_fingerprint"]:
        raise DataError(f"models.{name}={config.models[name]}: its tokenizer is not the one that {config.data} was made with; preprocess the documents with it")


def _tokenizer(dataset: TokenDataset) -> TokenizerLike | None:
    path = next((path for path in (sidecar(dataset.prefix, name) for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL)) if path.is_file()), None)
    return None if path is None or dataset.details is None else load_tokenizer(str(path), dataset.details["end_of_document"])
