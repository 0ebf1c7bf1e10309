import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.errors import DataError
from tpt_megatron.evaluate import value_statistics
from tpt_megatron.evaluate.value_statistics import QUANTILES, SCALE, Values, ValueStatistics

numbers = st.lists(st.tuples(st.sampled_from(["web", "math", None]), st.floats(-60, 60), st.integers(1, 40)), min_size=1, max_size=60)


@given(numbers)
def test_quantiles_are_within_a_bin_and_means_exact(values: list[tuple[str | None, float, int]]) -> None:
    found = Values()
    for _, nats, tokens in values:
        found.add(nats, tokens)
    each = np.sort([nats / tokens for _, nats, tokens in values])
    summary = found.summary()
    assert summary["mean_nats_per_token"] == pytest.approx(each.mean(), abs=1e-12)
    assert summary["mean_nats"] == pytest.approx(np.mean([nats for _, nats, _ in values]), abs=1e-12)
    assert summary["helping"] == np.mean([nats > 0 for _, nats, _ in values])
    assert summary["nats_of_all_per_token_of_all"] == pytest.approx(sum(nats for _, nats, _ in values) / sum(tokens for *_, tokens in values), abs=1e-12)
    for share in QUANTILES:
        exact = each[max(1, math.ceil(share * len(each))) - 1]
        assert abs(found.quantile(share) - exact) <= 0.021 * math.hypot(exact, SCALE)


@given(numbers, st.integers(0, 60))
def test_shards_merge_to_the_whole(values: list[tuple[str | None, float, int]], cut: int) -> None:
    whole, parts = ValueStatistics(), (ValueStatistics(), ValueStatistics())
    for number, (source, nats, tokens) in enumerate(values):
        whole.add(source, nats, tokens)
        parts[number >= cut].add(source, nats, tokens)
    merged = ValueStatistics()
    for part in parts:
        part.without["too_long"] += 1
        merged.merge(ValueStatistics.from_json(json.loads(json.dumps(part.to_json()))))
    assert merged.without == {"too_long": 2}
    assert merged.all.bins == whole.all.bins
    assert merged.by_source.keys() == whole.by_source.keys()
    for mine, theirs in [(merged.all, whole.all), *((merged.by_source[name], whole.by_source[name]) for name in whole.by_source)]:
        assert (mine.thoughts, mine.helped, mine.least, mine.greatest) == (theirs.thoughts, theirs.helped, theirs.least, theirs.greatest)
        assert mine.nats == pytest.approx(theirs.nats, abs=1e-9)


def test_many_sources_are_folded_alike_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_statistics, "SOURCES", 3)
    found = []
    for names in ("abcdef", "fedcba"):
        statistics = ValueStatistics()
        for name in names:
            statistics.add(name, 1.0, 1)
        found.append({name: values.thoughts for name, values in statistics.by_source.items()})
    assert found[0] == found[1] == {"a": 1, "b": 1, "c": 1, "(other)": 3}


def test_what_is_no_statistics_is_refused() -> None:
    assert ValueStatistics.from_json(json.loads(json.dumps(ValueStatistics().to_json()))) == ValueStatistics()
    for damaged in (None, {}, {"all": 3, "by_source": {}, "without": {}}, ValueStatistics().to_json() | {"without": 3}):
        with pytest.raises(DataError, match="the shard's manifest is damaged"):
            ValueStatistics.from_json(damaged)
