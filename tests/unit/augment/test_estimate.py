from __future__ import annotations

import random

import orjson
import pytest
from rich.console import Console

from tpt_megatron.augment.estimate import Mean, PerDocument, Range, estimate, planned, sampled, terminal_table
from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.statistics import Statistics
from tpt_megatron.config.augment import Cost
from tpt_megatron.records import Document, Thought

PRICED = Cost(tokens_per_second_per_gpu=1000, gpus=4, per_gpu_hour=2, per_million_prompt_tokens=1, per_million_generated_tokens=10, overhead=1.5)


def ends(found: Range | None) -> tuple[float | None, ...]:
    return () if found is None else (found.value, found.low, found.high)


def printed(estimated: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(terminal_table(estimated))  # type: ignore[arg-type]
    return capture.get()


def test_a_sample_gives_totals_with_ranges() -> None:
    sample = PerDocument(100, 2.0, Mean(100, 5), Mean(300, 10), Mean(360, 20), Mean(400, 15), 0.9)
    found = estimate(1000, sample, PRICED)
    spread = 1.96 * 20 * 1000
    assert ends(found.generated_tokens) == pytest.approx((360_000, 360_000 - spread, 360_000 + spread))
    assert found.requests == 2000
    assert ends(found.gpu_hours) == pytest.approx((0.15, 0.15 * (1 - spread / 360_000), 0.15 * (1 + spread / 360_000)))
    assert ends(found.wall_hours)[0] == pytest.approx(0.15 / 4)
    assert ends(found.gpu_cost)[0] == pytest.approx(0.3)
    assert ends(found.token_cost) == pytest.approx((3.9, 0.2804 + 3.208, 0.3196 + 3.992))
    assert found.unknown == {}
    assert orjson.loads(orjson.dumps(found.to_json()))["training_tokens"]["value"] == 400_000


def test_ranges_do_not_go_below_nothing() -> None:
    found = estimate(10, PerDocument(2, generated_tokens=Mean(10, 100)), Cost())
    assert ends(found.generated_tokens) == pytest.approx((100, 0, 2060))


def test_settings_alone_give_what_follows_from_them() -> None:
    cost = Cost(thought_tokens=900, tokens_per_second_per_gpu=1000)
    per_document = planned(cost, requests=6, document_tokens=Mean(1200), shown_tokens=Mean(700), prompt_overhead_tokens=50)
    found = estimate(100, per_document, cost)
    assert ends(found.prompt_tokens) == (100 * 6 * 750, None, None)
    assert ends(found.generated_tokens) == (100 * 6 * 900, None, None)
    assert ends(found.gpu_hours)[0] == pytest.approx(0.15)
    assert found.training_tokens is None
    assert "--sample" in found.unknown["training tokens"]
    assert set(found.unknown) == {"training tokens", "cost by GPU-hour", "cost by token"}
    kept = planned(cost, requests=6, document_tokens=Mean(1200), kept_share=0.5)
    assert ends(estimate(100, kept, cost).training_tokens) == (100 * (1200 + 2700), None, None)


def test_what_is_unknown_is_left_out_by_name_with_its_key() -> None:
    found = estimate(100, planned(Cost(), requests=1), Cost())
    assert found.gpu_hours is found.gpu_cost is found.token_cost is found.prompt_tokens is None
    assert found.unknown["generated tokens"].startswith("cost.thought_tokens")
    assert found.unknown["GPU-hours"].startswith("cost.tokens_per_second_per_gpu")
    assert found.unknown["cost by GPU-hour"] == "cost.per_gpu_hour"
    assert "cost.per_million_prompt_tokens" in found.unknown["cost by token"]
    priced = estimate(100, planned(PRICED, requests=1, shown_tokens=Mean(5), prompt_overhead_tokens=1), PRICED)
    assert priced.unknown["GPU-hours"] == priced.unknown["cost by GPU-hour"] == priced.unknown["cost by token"] == "cost.thought_tokens, or run a --sample"
    untold = estimate(100, PerDocument(documents=20, requests=1), PRICED)
    assert "the engine does not say" in untold.unknown["prompt tokens"]


def test_a_price_for_generated_tokens_alone_is_enough() -> None:
    found = estimate(1000, PerDocument(2, generated_tokens=Mean(1000, 0)), Cost(per_million_generated_tokens=3))
    assert ends(found.token_cost) == (3.0, None, None)


def test_the_range_of_samples_holds_the_truth_about_as_often_as_it_says() -> None:
    chance = random.Random(0)
    held = 0
    for _ in range(200):
        sample = Statistics()
        for _ in range(100):
            tokens = round(chance.gauss(1000, 300))
            outcome = Outcome((Thought("t", "g", tokens=tokens),), (Rejection("loop", "", Thought("", "g")),), 2, 50, tokens)
            sample.add(Document("d", "text"), outcome, difficulty=None, document_tokens=200)
        found = estimate(1, sampled(sample), Cost())
        assert found.training_tokens is not None and found.training_tokens.low is not None and found.training_tokens.high is not None
        held += found.training_tokens.low <= 1200 <= found.training_tokens.high
    assert found.kept_share == 0.5
    assert found.requests == 2
    assert ends(found.prompt_tokens) == (50, 50, 50)
    assert 180 <= held <= 198


def test_table_says_numbers_ranges_and_what_to_state() -> None:
    table = printed(estimate(1_000_000, PerDocument(100, 1.0, Mean(100, 5), None, Mean(360, 20), Mean(400, 15), 0.9), PRICED))
    assert "from a sample of 100 documents" in table
    assert "360M" in table
    assert "321M – 399M" in table
    assert "90.0%" in table
    assert "unknown" in table
    assert "× 1.5 of overhead" in table
    assert "from the settings" in printed(estimate(1, planned(Cost(), requests=1), Cost()))
