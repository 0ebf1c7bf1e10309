from __future__ import annotations

import math
import statistics as exactly
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpt_megatron.augment import statistics as module
from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.statistics import NO_SOURCE, OTHER, Histogram, Statistics, quantity, spent, token_cost
from tpt_megatron.config.augment import Cost
from tpt_megatron.errors import DataError
from tpt_megatron.records import Document, Thought

THOUGHTS = st.builds(
    Thought,
    text=st.text(max_size=20),
    generator=st.sampled_from("pqr"),
    prompt=st.sampled_from((None, "expert", "focus")),
    tokens=st.none() | st.integers(0, 50_000),
)
ENTRIES = st.tuples(
    st.builds(Document, id=st.just("d"), text=st.text(min_size=1, max_size=40), source=st.none() | st.text("abcdef", min_size=1, max_size=2)),
    st.builds(
        Outcome,
        thoughts=st.lists(THOUGHTS, max_size=3).map(tuple),
        rejections=st.lists(st.builds(Rejection, st.sampled_from(("loop", "copy")), st.just(""), THOUGHTS), max_size=2).map(tuple),
        requests=st.integers(0, 3),
        prompt_tokens=st.integers(0, 5000),
        generated_tokens=st.integers(0, 5000),
    ),
    st.none() | st.sampled_from(("easy", "hard")),
    st.none() | st.integers(0, 4000),
)
SHARDS = st.lists(ENTRIES, max_size=8)


def counted(entries: list[Any], seconds: float = 0.0) -> Statistics:
    total = Statistics()
    for document, outcome, difficulty, document_tokens in entries:
        total.add(document, outcome, difficulty=difficulty, document_tokens=document_tokens)
    total.add_seconds(seconds)
    return total


def merged(*parts: Statistics) -> Statistics:
    total = Statistics()
    for part in parts:
        total.merge(part)
    return total


@settings(max_examples=60, deadline=None)
@given(SHARDS, SHARDS, SHARDS)
def test_merging_in_any_order_equals_counting_all(first: list[Any], second: list[Any], third: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAXIMUM_GROUPS", 3)  # so that few documents already overflow into "(other)"
        a, b, c = counted(first, 0.1), counted(second, 0.2), counted(third, 0.3)
        whole = counted([*first, *second, *third], 0.6)
        assert merged(merged(a, b), c) == whole
        assert merged(a, merged(b, c)) == whole
        assert merged(c, a, b) == whole
        assert sum(group.documents for group in whole.by_source.values()) == whole.documents == len(first) + len(second) + len(third)
        assert sum(group.characters.count for group in whole.by_source.values()) == whole.thoughts
        assert len(whole.by_source) <= 4


@settings(max_examples=40, deadline=None)
@given(SHARDS)
def test_json_is_an_exact_round_trip(entries: list[Any]) -> None:
    counts = counted(entries, 1.5)
    assert Statistics.from_json(orjson.loads(orjson.dumps(counts.to_json()))) == counts


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=60), st.sampled_from((0.1, 0.5, 0.9, 1.0)))
def test_quantiles_are_within_a_bin_of_the_exact_ones(values: list[int], share: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    true = sorted(values)[max(1, math.ceil(share * len(values))) - 1]
    found = histogram.quantile(share)
    assert found is not None
    assert true / 1.1893 <= found <= true * 1.1893
    assert histogram.mean == exactly.fmean(values)
    assert (histogram.least, histogram.greatest) == (min(values), max(values))


def test_bin_edges_are_those_that_are_documented() -> None:
    histogram = Histogram()
    for value in (0, 1, 2, 1023, 1024):
        histogram.add(value)
    assert histogram.bins == {-1: 1, 0: 1, 4: 1, 39: 1, 40: 1}


def test_counts_of_known_documents() -> None:
    kept = Thought("abcd", "g", prompt="expert", tokens=10)
    untold = Thought("abcdefgh", "h")
    total = Statistics()
    total.add(Document("1", "x" * 6, "web"), Outcome((kept,), (), 1, 20, 15), difficulty="hard", document_tokens=5)
    total.add(
        Document("2", "x" * 6), Outcome((untold,), (Rejection("loop", "", kept), Rejection("loop", "", untold)), 3, 0, 0), difficulty=None, document_tokens=7
    )
    total.add(Document("3", "x" * 6), Outcome((), (), 0, 0, 0), difficulty="hard", document_tokens=None)
    assert (total.documents, total.documents_without_thoughts, total.thoughts, total.rejected) == (3, 1, 2, 2)
    assert (total.requests, total.prompt_tokens, total.generated_tokens) == (4, 20, 15)
    assert total.rejections == {"loop": {"g · expert": 1, "h": 1}}
    assert total.kept_share == 0.5
    assert total.expansion_characters == (18 + 12) / 18
    assert total.expansion_tokens == 15 / 5  # the second document's thought has no count, the third document has none
    assert total.training_tokens.count == 1
    assert total.by_source["web"].tokens.total == 10
    assert total.by_source[NO_SOURCE].documents == 2
    assert (total.all.tokens.count, total.all.characters.count) == (1, 2)
    assert {name: group.documents for name, group in total.by_difficulty.items()} == {"hard": 2}
    assert {name: group.documents for name, group in total.by_maker.items()} == {"g · expert": 1, "h": 1}
    # Three requests without a token are an engine that does not tell; no request at all costs nothing.
    assert (total.generated_tokens_each.count, total.generated_tokens_each.total) == (2, 15)


def test_more_than_200_sources_become_one_group_and_long_names_are_cut() -> None:
    total = Statistics()
    for number in range(300):
        total.add(Document("d", "text", f"{number:03} {'x' * 500}"), Outcome(), difficulty=None, document_tokens=None)
    assert len(total.by_source) == 201
    assert total.by_source[OTHER].documents == 100
    assert max(map(len, total.by_source)) == 100
    assert len(orjson.dumps(total.to_json())) < 60_000


def test_standard_error_is_that_of_the_mean() -> None:
    values = [3, 8, 8, 21, 1000]
    moments = module.Moments()
    assert moments.standard_error is None
    for value in values:
        moments.add(value)
    assert moments.standard_error == pytest.approx(exactly.stdev(values) / math.sqrt(5))


def test_sums_of_squares_beyond_64_bits_survive() -> None:
    total = Statistics()
    total.generated_tokens_each.add(10**12)
    assert Statistics.from_json(orjson.loads(orjson.dumps(total.to_json()))).generated_tokens_each.squares == 10**24


@pytest.mark.parametrize("value", [None, [], {"documents_without_thoughts": "many"}, {"all": {"tokens": {"bins": {"x": 1}}}}])
def test_damaged_statistics_are_named(value: Any) -> None:
    with pytest.raises(DataError, match=r"^statistics: .*damaged"):
        Statistics.from_json(value)


def test_only_what_was_stated_is_priced() -> None:
    total = Statistics(prompt_tokens=2_000_000, generated_tokens=500_000)
    assert spent(total, Cost(), 7200.0) == module.Spent(None, None, None)
    assert spent(total, Cost(gpus=4), 7200.0) == module.Spent(8.0, None, None)
    assert spent(total, Cost(gpus=4, per_gpu_hour=2.5), 7200.0) == module.Spent(8.0, 20.0, None)
    assert spent(total, Cost(per_gpu_hour=2.5), None) == module.Spent(None, None, None)
    assert spent(total, Cost(per_million_prompt_tokens=0.1, per_million_generated_tokens=2), None).token_cost == pytest.approx(1.2)
    assert token_cost(Cost(per_million_prompt_tokens=1), None, 5.0) is None
    assert token_cost(Cost(per_million_prompt_tokens=1, per_million_generated_tokens=1), None, 5.0) is None
    assert spent(Statistics(), Cost(per_million_generated_tokens=2), None).token_cost is None


def test_numbers_as_people_say_them() -> None:
    said = [quantity(value) for value in (0, 3, 4.72, 812.4, 12345, 999_400, 999_900, 1_250_000, 3.4e9, 2e12)]
    assert said == ["0", "3", "4.72", "812", "12,345", "999,400", "1M", "1.25M", "3.4B", "2T"]
