from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.augment.reporting import elapsed_s, summarise
from tpt_megatron.augment.statistics import Statistics
from tpt_megatron.files import Manifest

spans = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 30)).map(lambda span: (span[0], span[0] + span[1])))


@given(spans)
def test_elapsed_time_counts_each_second_once(some: list[tuple[int, int]]) -> None:
    assert elapsed_s(some) == len({second for began, ended in some for second in range(began, ended)})


def test_time_is_summed_over_workers_but_not_over_the_shards_that_one_has_at_once() -> None:
    def shard(worker: str, began: float, ended: float) -> Manifest:
        details = {"worker": worker, "began": began, "ended": ended, "statistics": Statistics().to_json()}
        return Manifest(kind="augmented_shard", settings={}, inputs=(), outputs=(), counts={}, details=details)

    summary = summarise([shard("a", 0, 10), shard("a", 5, 12), shard("b", 2, 8), shard("b", 100, 101)])
    assert summary.elapsed_s == 13
    assert summary.statistics.work_s == 12 + 7
    assert summary.shards == 4
