"""What augmenting a corpus will take, before it is paid for: tokens, GPU-hours, hours and money.

Everything follows from means per document, out of a sample (`sampled`) or out of the settings (`planned`). Nothing is guessed:
what cannot be told is left out, by name and with what has to be stated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tpt_megatron.augment.statistics import Moments, Statistics, quantity, token_cost
from tpt_megatron.config.augment import Cost

if TYPE_CHECKING:
    from rich.table import Table

STANDARD_ERRORS = 1.96
"""Ranges are the normal approximation's 95 % for a mean: they tell of the sample's size, not of a price or speed that is wrong."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean per document, with its standard error where it comes of a sample of at least two documents."""

    value: float
    standard_error: float | None = None


@dataclass(frozen=True, slots=True)
class PerDocument:
    """What one document takes and gives on average. None is unknown.

    documents         of the sample that says it; None where the settings say it
    requests          samples x prompts x generators, x chunks
    document_tokens   of the whole document; prompt_tokens: of all its requests' prompts
    generated_tokens  of all its requests, those of rejected thoughts too
    training_tokens   document and kept thoughts
    kept_share        thoughts not rejected, of all, 0 to 1
    """

    documents: int | None = None
    requests: float | None = None
    document_tokens: Mean | None = None
    prompt_tokens: Mean | None = None
    generated_tokens: Mean | None = None
    training_tokens: Mean | None = None
    kept_share: float | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """A number, and where it lies with 95 % confidence as far as the sample tells; `low` and `high` are None without a sample."""

    value: float
    low: float | None = None
    high: float | None = None

    def times(self, factor: float) -> Range:
        """Return the range of this number times `factor`, which is taken as exact."""
        return Range(self.value * factor, None if self.low is None else self.low * factor, None if self.high is None else self.high * factor)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the run will take. None is unknown; `unknown` then says by name what has to be stated, or run, to know it.

    gpu_hours = generated tokens / tokens_per_second_per_gpu / 3600 x overhead; wall_hours = gpu_hours / gpus;
    gpu_cost and token_cost are two ways of paying, not parts of a sum.
    """

    documents: int
    sample_documents: int | None
    requests: float | None
    kept_share: float | None
    document_tokens: Range | None
    prompt_tokens: Range | None
    generated_tokens: Range | None
    training_tokens: Range | None
    gpu_hours: Range | None
    wall_hours: Range | None
    gpu_cost: Range | None
    token_cost: Range | None
    currency: str
    gpus: int
    overhead: float
    unknown: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a JSON object; a range is {value, low, high}."""
        return asdict(self)


def sampled(statistics: Statistics) -> PerDocument:
    """Return the means of a sample: of documents drawn from the corpus and augmented with the run's own settings.

    Standard errors are those over documents, so thoughts about one document do not count as independent.
    """
    documents = statistics.documents
    return PerDocument(
        documents=documents,
        requests=statistics.requests / documents if documents else None,
        document_tokens=_mean(statistics.document_tokens),
        prompt_tokens=_mean(statistics.prompt_tokens_each),
        generated_tokens=_mean(statistics.generated_tokens_each),
        training_tokens=_mean(statistics.training_tokens),
        kept_share=statistics.kept_share,
    )


def planned(
    cost: Cost,
    *,
    requests: float,
    document_tokens: Mean | None = None,
    shown_tokens: Mean | None = None,
    prompt_overhead_tokens: float | None = None,
    kept_share: float | None = None,
) -> PerDocument:
    """Return the means that follow from settings, with no thought generated yet. `cost.thought_tokens` is the length of a thought.

    requests                a document's: samples x prompts x generators, x chunks
    document_tokens         of a document, mean over the corpus, or over the documents that were counted
    shown_tokens            the part of it that one prompt shows, on average; prompt_overhead_tokens: the template around it
    kept_share              share of thoughts that the checks keep, where known from elsewhere
    """
    prompt = generated = training = None
    if shown_tokens is not None and prompt_overhead_tokens is not None:
        prompt = _scaled(shown_tokens, requests, requests * prompt_overhead_tokens)
    if cost.thought_tokens is not None:
        generated = Mean(requests * cost.thought_tokens)
        if document_tokens is not None and kept_share is not None:
            training = _scaled(document_tokens, 1, generated.value * kept_share)
    return PerDocument(None, requests, document_tokens, prompt, generated, training, kept_share)


def estimate(documents: int, per_document: PerDocument, cost: Cost) -> Estimate:
    """Return what `documents` documents take. `documents` and what `cost` states are taken as exact."""
    document_tokens, prompt, generated, training = (
        None if mean is None else _total(mean, documents)
        for mean in (per_document.document_tokens, per_document.prompt_tokens, per_document.generated_tokens, per_document.training_tokens)
    )
    speed = cost.tokens_per_second_per_gpu
    gpu_hours = None if generated is None or speed is None else generated.times(cost.overhead / speed / 3600)
    return Estimate(
        documents=documents,
        sample_documents=per_document.documents,
        requests=None if per_document.requests is None else documents * per_document.requests,
        kept_share=per_document.kept_share,
        document_tokens=document_tokens,
        prompt_tokens=prompt,
        generated_tokens=generated,
        training_tokens=training,
        gpu_hours=gpu_hours,
        wall_hours=None if gpu_hours is None else gpu_hours.times(1 / cost.gpus),
        gpu_cost=None if gpu_hours is None or cost.per_gpu_hour is None else gpu_hours.times(cost.per_gpu_hour),
        token_cost=_token_cost(cost, prompt, generated),
        currency=cost.currency,
        gpus=cost.gpus,
        overhead=cost.overhead,
        unknown=_unknown(per_document, cost),
    )


def _mean(moments: Moments) -> Mean | None:
    return None if moments.mean is None else Mean(moments.mean, moments.standard_error)


def _scaled(mean: Mean, factor: float, plus: float) -> Mean:
    return Mean(mean.value * factor + plus, None if mean.standard_error is None else mean.standard_error * factor)


def _total(mean: Mean, documents: int) -> Range:
    if mean.standard_error is None:
        return Range(mean.value * documents)
    spread = STANDARD_ERRORS * mean.standard_error
    return Range(mean.value, max(0.0, mean.value - spread), mean.value + spread).times(documents)


def _token_cost(cost: Cost, prompt: Range | None, generated: Range | None) -> Range | None:
    """Ends are added to ends, as if long prompts went with long thoughts throughout: no narrower than the truth."""
    value, low, high = (token_cost(cost, *tokens) for tokens in zip(_ends(prompt), _ends(generated), strict=True))
    if value is None:
        return None
    return Range(value) if low == high else Range(value, low, high)


def _ends(tokens: Range | None) -> tuple[float | None, float | None, float | None]:
    """Return value, low and high; a number without a range is its own ends."""
    if tokens is None:
        return None, None, None
    return tokens.value, tokens.value if tokens.low is None else tokens.low, tokens.value if tokens.high is None else tokens.high


def _unknown(per_document: PerDocument, cost: Cost) -> dict[str, str]:
    """Return what is not known, by the name that people read, with what to state."""
    from_sample = per_document.documents is not None
    untold = "the engine does not say how many; state generator.tokenizer, or use one that does"
    missing: dict[str, str] = {}
    if per_document.document_tokens is None:
        missing["document tokens"] = "generator.tokenizer"
    if per_document.prompt_tokens is None:
        missing["prompt tokens"] = untold if from_sample else "generator.tokenizer"
    if per_document.generated_tokens is None:
        missing["generated tokens"] = untold if from_sample else "cost.thought_tokens, or run a --sample"
    if per_document.training_tokens is None:
        lacking = ", ".join(missing[name] for name in ("document tokens", "generated tokens") if name in missing)
        missing["training tokens"] = lacking or "the share of thoughts that the checks keep: run a --sample"
    if cost.tokens_per_second_per_gpu is None:
        missing["GPU-hours"] = "cost.tokens_per_second_per_gpu, as measured or published for the model and the GPU"
    elif "generated tokens" in missing:
        missing["GPU-hours"] = missing["generated tokens"]
    if cost.per_gpu_hour is None:
        missing["cost by GPU-hour"] = "cost.per_gpu_hour"
    elif "GPU-hours" in missing:
        missing["cost by GPU-hour"] = missing["GPU-hours"]
    prices = {"prompt tokens": cost.per_million_prompt_tokens, "generated tokens": cost.per_million_generated_tokens}
    lacking = ", ".join(missing[name] for name, price in prices.items() if price is not None and name in missing)
    if all(price is None for price in prices.values()):
        missing["cost by token"] = "cost.per_million_prompt_tokens, cost.per_million_generated_tokens"
    elif lacking:
        missing["cost by token"] = lacking
    return missing


def terminal_table(estimated: Estimate) -> Table:
    """Return the estimate as a table for the terminal: known numbers with their ranges, then what is unknown."""
    from rich.table import Table

    said = "from the settings, no sample" if estimated.sample_documents is None else f"from a sample of {estimated.sample_documents:,} documents"
    table = Table(title=f"estimate, {said}", title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column("estimate", justify="right")
    table.add_column("95 % range", justify="right")
    table.add_column("how, or what to state", overflow="fold")
    for name, number, note in _rows(estimated):
        if isinstance(number, Range):
            table.add_row(name, quantity(number.value), _range_text(number), note)
        elif number is not None:
            table.add_row(name, f"{number:.1%}" if name == "thoughts kept" else quantity(number), "", note)
    for name, key in estimated.unknown.items():
        table.add_row(name, "unknown", "", key, style="dim")
    return table


def _rows(estimated: Estimate) -> list[tuple[str, Range | float | None, str]]:
    slower = f", × {estimated.overhead:g} of overhead" if estimated.overhead != 1 else ""
    return [
        ("documents", estimated.documents, ""),
        ("requests", estimated.requests, ""),
        ("thoughts kept", estimated.kept_share, "not rejected by a check"),
        ("document tokens", estimated.document_tokens, ""),
        ("prompt tokens", estimated.prompt_tokens, ""),
        ("generated tokens", estimated.generated_tokens, "those of rejected thoughts too"),
        ("training tokens", estimated.training_tokens, "documents and kept thoughts"),
        ("GPU-hours", estimated.gpu_hours, f"by cost.tokens_per_second_per_gpu{slower}"),
        ("wall hours", estimated.wall_hours, f"on {estimated.gpus:,} GPU{'s' if estimated.gpus > 1 else ''} (cost.gpus)"),
        (f"cost by GPU-hour, {estimated.currency}", estimated.gpu_cost, "by cost.per_gpu_hour"),
        (f"cost by token, {estimated.currency}", estimated.token_cost, "by the stated prices per million tokens"),
    ]


def _range_text(number: Range) -> str:
    return "" if number.low is None or number.high is None else f"{quantity(number.low)} – {quantity(number.high)}"
