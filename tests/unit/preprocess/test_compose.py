from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.arms import DelimiterIds, arrange
from tpt_megatron.config.preprocess import PlainArm
from tpt_megatron.datasets import PART_DOCUMENT, PART_THINKING
from tpt_megatron.preprocess.compose import in_validation, plain_arm, sequences

Ids = npt.NDArray[np.uint32]


def ids(*numbers: int) -> Ids:
    return np.array(numbers, np.uint32)


DOCUMENT, THOUGHTS = ids(1, 2, 3), [ids(10), ids(20, 21)]
MARKS = DelimiterIds(open=ids(90), close=ids(91), between=ids(92))


def flat(segments: list[tuple[int, Ids]]) -> list[int]:
    return [int(number) for _, part in segments for number in part]


def arranged(arm: PlainArm, cuts: list[int]) -> list[int]:
    return flat(arrange(arm, DOCUMENT, THOUGHTS, MARKS, cuts))


def test_each_arm_has_its_order() -> None:
    assert arranged("vanilla", [3, 3]) == [1, 2, 3]
    assert arranged("append", [3, 3]) == [1, 2, 3, 92, 90, 10, 91, 92, 90, 20, 21, 91]
    assert arranged("prepend", [3, 3]) == [90, 10, 91, 92, 90, 20, 21, 91, 92, 1, 2, 3]


def test_interleave_puts_a_thought_after_what_it_saw() -> None:
    assert arranged("interleave", [1, 2]) == [1, 92, 90, 10, 91, 92, 2, 92, 90, 20, 21, 91, 92, 3]
    assert arranged("interleave", [2, 1]) == [1, 92, 90, 20, 21, 91, 92, 2, 92, 90, 10, 91, 92, 3]
    assert arranged("interleave", [2, 2]) == [1, 2, 92, 90, 10, 91, 92, 90, 20, 21, 91, 92, 3]
    assert arranged("interleave", [0, 3]) == [90, 10, 91, 92, 1, 2, 3, 92, 90, 20, 21, 91]
    assert arranged("interleave", [3, 3]) == arranged("append", [3, 3])


numbers = st.lists(st.integers(0, 80), max_size=6)


@given(st.sampled_from(["vanilla", "append", "prepend", "interleave"]), numbers, st.lists(st.tuples(numbers, st.integers(0, 6)), max_size=4))
def test_dropping_the_thinking_gives_the_document_and_every_thought_is_there_once(
    arm: PlainArm, document: list[int], thoughts: list[tuple[list[int], int]]
) -> None:
    cuts = [min(cut, len(document)) for _, cut in thoughts]
    segments = arrange(arm, ids(*document), [ids(*thought) for thought, _ in thoughts], MARKS, cuts)
    assert flat([(part, segment) for part, segment in segments if part == PART_DOCUMENT]) == document
    thinking = flat([(part, segment) for part, segment in segments if part == PART_THINKING])
    expected = sorted(number for thought, _ in thoughts for number in thought) if arm != "vanilla" else []
    assert sorted(number for number in thinking if number < 90) == expected
    assert thinking.count(90) == thinking.count(91) == (0 if arm == "vanilla" else len(thoughts))


def test_as_samples_each_thought_makes_a_sequence() -> None:
    made = sequences("append", DOCUMENT, THOUGHTS, MARKS, [3, 3], as_samples=True)
    assert [flat(sequence.segments) for sequence in made] == [[1, 2, 3, 92, 90, 10, 91], [1, 2, 3, 92, 90, 20, 21, 91]]
    assert [(sequence.sample, sequence.thoughts) for sequence in made] == [(0, (0,)), (1, (1,))]
    (joined,) = sequences("append", DOCUMENT, THOUGHTS, MARKS, [3, 3], as_samples=False)
    assert (joined.sample, joined.thoughts) == (0, (0, 1))
    for arm, thoughts in (("vanilla", THOUGHTS), ("append", [])):
        (only,) = sequences(arm, DOCUMENT, thoughts, MARKS, [], as_samples=True)  # type: ignore[arg-type]
        assert (flat(only.segments), only.sample, only.thoughts) == ([1, 2, 3], 0, ())


def hashes(count: int) -> list[bytes]:
    return [hashlib.sha256(str(i).encode()).digest() for i in range(count)]


def test_the_split_is_by_hash_and_grows_with_the_fraction() -> None:
    chosen = [{i for i, sha256 in enumerate(hashes(2000)) if in_validation(sha256, fraction)} for fraction in (0.0, 0.1, 0.3, 0.999999)]
    assert chosen[0] == set() and len(chosen[3]) == 2000
    assert 150 < len(chosen[1]) < 250 and 540 < len(chosen[2]) < 660
    assert all(fewer <= more for fewer, more in pairwise(chosen))


def test_mixed_draws_by_weight_and_apart_from_the_split() -> None:
    weights: dict[PlainArm, float] = {"vanilla": 1.0, "append": 3.0, "prepend": 0.0}
    found = [plain_arm("mixed", sha256, weights) for sha256 in hashes(4000)]
    assert set(found) == {"vanilla", "append"}
    assert 0.72 < found.count("append") / 4000 < 0.78
    in_split = [arm for arm, sha256 in zip(found, hashes(4000), strict=True) if in_validation(sha256, 0.25)]
    assert 0.68 < in_split.count("append") / len(in_split) < 0.82
    assert plain_arm("prepend", hashes(1)[0], weights) == "prepend"
    assert found == [plain_arm("mixed", sha256, dict(reversed(weights.items()))) for sha256 in hashes(4000)]
