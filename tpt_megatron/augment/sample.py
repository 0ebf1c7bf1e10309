"""Looking before paying: a handful of documents with their thoughts, and what the whole run would take.

OUTPUT/sample/sample.html       documents and thoughts side by side
OUTPUT/sample/sample.jsonl      the augmented documents
OUTPUT/sample/statistics.json   what --estimate reckons with, under the settings that made it
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import tokenizers

from tpt_megatron.augment.claims import Claim
from tpt_megatron.augment.estimate import Estimate, Mean, PerDocument, estimate, planned, sampled, terminal_table
from tpt_megatron.augment.generators import Generator, Ingredients, all_or_none, fields_by_variable
from tpt_megatron.augment.outcome import Outcome
from tpt_megatron.augment.plan import Plan, make_or_read_plan
from tpt_megatron.augment.reporting import settings_shown
from tpt_megatron.augment.sample_page import render_sample
from tpt_megatron.augment.shards import ShardReader, Work, open_shard
from tpt_megatron.augment.statistics import Moments, Statistics
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.errors import DataError, RecordError
from tpt_megatron.files import read_json
from tpt_megatron.record_files import encode_json, encode_records, refuse_inputs_in_output
from tpt_megatron.records import AugmentedDocument
from tpt_megatron.storage import Location, locate

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)
COUNTED_DOCUMENTS = 200


def run_sample(config: AugmentConfig, documents: int) -> Location:
    """Think about `documents` documents drawn from all inputs, write the sample's files, and return the page's place."""
    output, ingredients, plan = _prepare(config)
    chosen = list(_draw(config, plan, documents))
    if not chosen:
        raise DataError(f"{', '.join(config.input)}: no usable document among the {documents} that were drawn")
    if len(chosen) < documents:
        logger.warning("%d documents of the %d that were asked for: the others are blank, unusable, or not there", len(chosen), documents)
    thought_about = asyncio.run(_think(ingredients.generators(), chosen))
    if not thought_about:
        raise DataError(f"{', '.join(config.input)}: none of the {len(chosen)} documents that were drawn could be thought about; the reasons are above")
    statistics, pairs = Statistics(), []
    counter = next(iter(ingredients.tokenizers.values()), None)  # the first generator's counts documents
    for work, outcome in thought_about:
        document = work.given.document
        statistics.add(document, outcome, difficulty=None, document_tokens=None if counter is None else _tokens(counter, document.text))
        pairs.append((AugmentedDocument(document, work.given.thoughts + outcome.thoughts), outcome))
    folder = output / "sample"
    (folder / "sample.jsonl").write(encode_records([augmented for augmented, _ in pairs], "jsonl"))
    (folder / "statistics.json").write(encode_json({"settings": plan.settings, "statistics": statistics.to_json()}))
    place = folder / "sample.html"
    place.write(render_sample(pairs, title=f"{len(pairs)} documents and their thoughts", settings=settings_shown(config)).encode())
    return place


def run_estimate(config: AugmentConfig) -> Table:
    """Return what the whole run will take: from the last sample where it was made with these settings, else from the config's `cost`."""
    return terminal_table(make_estimate(config))


def make_estimate(config: AugmentConfig) -> Estimate:
    """Return the estimate that `run_estimate` shows."""
    output, ingredients, plan = _prepare(config)
    documents = plan.records
    place = output / "sample/statistics.json"
    if place.is_file():
        sample = read_json(place)
        if sample["settings"] == plan.settings:
            return estimate(documents, sampled(Statistics.from_json(sample["statistics"])), config.cost)
        logger.warning("%s: was made with other settings, and is not used; run --sample again", place)
    return estimate(documents, _from_settings(config, ingredients, plan), config.cost)


def _prepare(config: AugmentConfig) -> tuple[Location, Ingredients, Plan]:
    output = locate(config.output)
    refuse_inputs_in_output(config.input, output)
    ingredients = Ingredients.of(config)
    return output, ingredients, make_or_read_plan(config, ingredients.settings(), output)


def _draw(config: AugmentConfig, plan: Plan, documents: int) -> Iterator[Work]:
    """Yield documents drawn evenly from all inputs, the same ones for the same seed; blank and bad records are left out."""
    total = sum(shard.count for shard in plan.shards)
    rows = iter(sorted(random.Random(config.seed).sample(range(total), min(documents, total))))
    reader = ShardReader(plan, int(config.max_record_megabytes * 1e6))
    row, first = next(rows, None), 0
    for shard in plan.shards:
        wanted = []
        while row is not None and row < first + shard.count:
            wanted.append(row - first)
            row = next(rows, None)
        if wanted:
            content = reader.read(shard)
            opened = open_shard(shard, Claim(shard.number, 0), [content[number] for number in wanted], config.fields.names())
            for _, error in opened.bad:
                logger.warning("%s; left out of the sample", error)
            yield from opened.works
        first += shard.count
    reader.close()


async def _think(generators: list[Generator], works: list[Work]) -> list[tuple[Work, Outcome]]:
    """Return what came of each document; one whose record lacks what a generator needs is left out, as a run sets it aside."""

    async def one(work: Work) -> tuple[Work, Outcome] | None:
        try:
            return work, Outcome.joined(await all_or_none([generator.think(work.given.document, work.row.where) for generator in generators]))
        except RecordError as error:
            logger.warning("%s; left out of the sample", error)
            return None

    try:
        for generator in generators:
            await generator.open()
        return [found for found in await all_or_none([one(work) for work in works]) if found is not None]
    finally:
        for generator in generators:
            await generator.close()


def _tokens(counter: tokenizers.Tokenizer, text: str) -> int:
    return len(counter.encode(text, add_special_tokens=False).ids)


def _from_settings(config: AugmentConfig, ingredients: Ingredients, plan: Plan) -> PerDocument:
    """Return what the settings say of a document: requests, and tokens of prompts, counted on some documents that are drawn."""
    counter = next(iter(ingredients.tokenizers.values()), None)
    document, asked, shown = Moments(), Moments(), Moments()
    for work in _draw(config, plan, COUNTED_DOCUMENTS if ingredients.excerpts else 0):
        given = work.given.document
        excerpts = [excerpt for some in ingredients.excerpts.values() for excerpt in some.of(given.text)]
        asked.add(len(excerpts) * len(ingredients.prompts) * config.samples)
        if counter is None:
            continue
        document.add(_tokens(counter, given.text))
        for excerpt in excerpts:
            for prompt in ingredients.prompts:
                with suppress(RecordError):  # a run sets it aside
                    messages = prompt.render(given, excerpt, fields_by_variable(config), config.seed, work.row.where)
                    shown.add(sum(_tokens(counter, message["content"]) for message in messages))
    return planned(
        config.cost,
        requests=asked.mean or 0.0,
        document_tokens=None if document.mean is None else Mean(document.mean, document.standard_error),
        shown_tokens=None if shown.mean is None else Mean(shown.mean, shown.standard_error),
        prompt_overhead_tokens=0.0,  # the prompts were counted whole, but for the chat template's few tokens
    )
