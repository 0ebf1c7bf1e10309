from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.config.data import DataConfig
from tpt_megatron.datasets import TokenDataset
from tpt_megatron.errors import ConfigError, DataError
from tpt_megatron.sequences.stream import Seen, Stream

LENGTH = 8


def dataset(path: str, documents: int, seed: int = 0) -> TokenDataset:
    lengths = np.random.default_rng(seed).integers(1, 20, documents).astype(np.int32)
    return of_lengths(path, lengths)


def of_lengths(path: str, lengths: np.ndarray) -> TokenDataset:
    ends = np.cumsum(lengths, dtype=np.int64)
    return TokenDataset(Path(path), np.zeros(int(ends[-1]), np.uint16), None, lengths, 2 * (ends - lengths), None)


DATASETS = {"a": dataset("a", 200), "b": dataset("b", 50, seed=1), "c": dataset("c", 80, seed=2)}


def stream(seed: int = 0, **data: Any) -> Stream:
    config = DataConfig.model_validate({"sequence_length": LENGTH, **data})
    return Stream(config, config.blends, DATASETS, seed)


def blend(**weights: float) -> list[dict[str, Any]]:
    return [{"path": path, "weight": weight} for path, weight in weights.items()]


stages = st.lists(st.tuples(st.integers(1, 60), st.sets(st.sampled_from("abc"), min_size=1)), max_size=3)


@given(stages, st.sets(st.sampled_from("abc"), min_size=1))
def test_stages_switch_exactly_and_datasets_are_read_on(first: list[tuple[int, set[str]]], last: set[str]) -> None:
    listed = [{"tokens": sequences * LENGTH + LENGTH - 1, "train": blend(**dict.fromkeys(sorted(paths), 1))} for sequences, paths in first]
    run = stream(stages=[*listed, {"train": blend(**dict.fromkeys(sorted(last), 1))}])
    number, seen = 0, Counter[str]()
    for sequences, paths in [*first, (40, last)]:
        inside = Counter[str]()
        for _ in range(sequences):
            path, within = run.locate(number)
            assert path in paths
            assert within == seen[path]
            assert run.counts(number) == {name: seen[name] for name in run.counts(number)}
            seen[path] += 1
            inside[path] += 1
            number += 1
        assert all(abs(inside[path] - sequences / len(paths)) < 1 for path in paths)


def test_a_resumed_stream_goes_on_with_the_very_next_sequence() -> None:
    data = {"stages": [{"tokens": 100 * LENGTH, "train": blend(a=0.7, b=0.3)}, {"train": blend(a=0.2, c=0.8)}], "packing": "best_fit"}
    unbroken = stream(**data)
    spans = [unbroken.spans(number) for number in range(300)]
    for number in (299, 0, 99, 100, 101, 250):
        assert stream(**data).spans(number) == spans[number]


def test_a_stream_says_which_documents_it_showed() -> None:
    run = stream(train=blend(a=1, b=1), packing="best_fit", too_long="drop")
    for number in (0, 1, 7):
        path, spans = run.spans(number)
        assert list(run.documents([number])) == [Seen(number, path, span.document, span.first, span.tokens) for span in spans]
    assert [seen.sequence for seen in run.documents(range(3, 5))] == [3] * len(run.spans(3)[1]) + [4] * len(run.spans(4)[1])


def test_what_would_repeat_a_dataset_too_often_is_refused_with_what_fits() -> None:
    held = stream(train="b").sequences_per_epoch("b")
    shares = [{"path": "a", "weight": 3}, {"path": "b", "weight": 1, "max_epochs": 1.5}]
    fits = int(1.5 * held)
    stream(train=shares).check_epochs(4 * fits)
    with pytest.raises(ConfigError, match=rf"b: the run would go through it \d\.\d\d times, over its max_epochs=1.5: .*; {fits * LENGTH:,} fit, "):
        stream(train=shares).check_epochs(4 * fits + 4)
    # A dataset of several stages counts over all of them.
    with pytest.raises(ConfigError, match=r"b: the run would go through it 2\.00 times"):
        stream(stages=[{"tokens": held * LENGTH, "train": "b"}, {"train": [{"path": "b", "max_epochs": 1.5}]}]).check_epochs(2 * held)


def test_a_share_too_small_to_be_dealt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"b: its share is 1e-05 of the tokens, the least is 3\.1e-05"):
        stream(train=blend(a=0.99999, b=0.00001))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"packing": "concatenate", "sequence_length": 10_000}, "a: .* tokens do not fill one sequence of 10000"),
        ({"packing": "best_fit", "too_long": "drop", "sequence_length": 1}, "every document is over 2 tokens and would be dropped"),
    ],
)
def test_a_dataset_that_fills_no_sequence_is_refused(data: dict[str, Any], says: str) -> None:
    long = {"a": of_lengths("a", np.array([9], np.int32))}
    config = DataConfig.model_validate({"train": "a", **data})
    with pytest.raises(DataError, match=says):
        Stream(config, config.blends, long, 0)


def test_dropped_documents_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    stream(train="a", packing="best_fit", too_long="drop", sequence_length=LENGTH)
    lengths = DATASETS["a"].lengths
    over = lengths[lengths > LENGTH + 1]
    assert f"a: {len(over):,} documents ({over.sum():,} tokens) are over 9 tokens and left out" in caplog.text


def test_the_fingerprint_knows_everything_that_decides_which_tokens_come_when() -> None:
    base: dict[str, Any] = {"train": blend(a=1, b=3)}
    changes: list[dict[str, Any]] = [
        {"train": blend(a=1, b=2)},
        {"train": blend(b=3, a=1)},
        {"train": blend(a=1, c=3)},
        {"train": "a"},
        {"stages": [{"tokens": 80, "train": blend(a=1, b=3)}, {"train": "a"}]},
        {"stages": [{"tokens": 88, "train": blend(a=1, b=3)}, {"train": "a"}]},
        {**base, "packing": "best_fit"},
        {**base, "packing": "best_fit", "too_long": "drop"},
        {**base, "attention": "sequence"},
        {**base, "sequence_length": 9},
    ]
    prints = [stream(**data).fingerprint() for data in (base, *changes)] + [stream(seed=1, **base).fingerprint()]
    assert all(prints[i] != prints[j] for i in range(len(prints)) for j in range(i))
    # Only their relation counts, and not where the files lie.
    assert stream(train=blend(a=2, b=6)).fingerprint() == prints[0]
    moved = DataConfig.model_validate({"train": "/x/a", "sequence_length": LENGTH})
    elsewhere = Stream(moved, moved.blends, {"/x/a": DATASETS["a"]}, 0)
    assert elsewhere.fingerprint() == stream(train="a").fingerprint()


def test_equally_many_documents_come_in_the_same_order_in_every_arm() -> None:
    longer = of_lengths("d", DATASETS["a"].lengths + 3)
    config = DataConfig.model_validate({"train": "a", "sequence_length": LENGTH})

    def order(one: TokenDataset) -> list[int]:
        run = Stream(config, config.blends, {"a": one}, 7)
        return list(dict.fromkeys(seen.document for seen in run.documents(range(run.sequences_per_epoch("a")))))[:150]

    assert order(DATASETS["a"]) == order(longer)
