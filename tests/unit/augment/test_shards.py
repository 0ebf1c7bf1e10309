"""The journal of unfinished shards, and what a commit does when another was faster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpt_megatron.augment.claims import Claim
from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.plan import Plan, make_plan
from tpt_megatron.augment.shards import Journal, OpenShard, ShardReader, ShardWriter, open_shard
from tpt_megatron.config.augment import AugmentConfig
from tpt_megatron.records import FieldNames, Thought
from tpt_megatron.storage import LocalLocation, locate


def planned(folder: Path, **settings: object) -> Plan:
    (folder / "in.jsonl").write_text("".join(json.dumps({"id": str(i), "text": f"document {i}"}) + "\n\n" for i in range(5)))
    config = AugmentConfig.model_validate({"input": str(folder / "in.jsonl"), "output": folder / "out", "generator": {"kind": "worked"}})
    return make_plan([locate(folder / "in.jsonl")], dict(settings), config)


def opened(plan: Plan) -> OpenShard:
    (shard,) = plan.shards
    return open_shard(shard, Claim(0, 0), ShardReader(plan, 1000).read(shard), FieldNames())


def outcome(text: str) -> Outcome:
    thought = Thought(text=text, generator="g", sampling={"top_p": 0.9}, seed=3, extra={"x": 1})
    return Outcome(thoughts=(thought,), rejections=(Rejection("loop", "why", thought),), requests=2, prompt_tokens=3, generated_tokens=4)


def test_what_was_saved_comes_back_under_the_same_plan_and_no_other(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert plan.records == 5
    first = opened(plan)
    for number in (3, 1):
        first.finish(number, outcome(f"thought {number}"))
    journal = Journal(locate(tmp_path / "journal"), plan, "worker")
    journal.save(first)
    journal.save(first)
    again = opened(plan)
    Journal(locate(tmp_path / "journal"), plan, "later").restore(again)
    assert [work.outcome for work in again.works] == [None, outcome("thought 1"), None, outcome("thought 3"), None]
    assert (again.restored, again.settled, again.pending()) == (2, 2, [0, 2, 4])
    other = opened(plan)
    Journal(locate(tmp_path / "journal"), planned(tmp_path, temperature=1), "later").restore(other)
    assert other.restored == 0


def test_what_could_not_be_saved_is_saved_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path)
    first, journal = opened(plan), Journal(locate(tmp_path / "journal"), plan, "worker")
    first.finish(0, outcome("a"))

    def full(self: LocalLocation, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LocalLocation, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.save(first)
    first.finish(2, outcome("b"))
    journal.save(first)
    again = opened(plan)
    journal.restore(again)
    assert again.pending() == [1, 3, 4]


def test_a_damaged_part_is_left_out_and_the_others_count(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    first, journal = opened(plan), Journal(locate(tmp_path / "journal"), plan, "worker")
    for number in (0, 1):
        first.finish(number, outcome("a"))
        journal.save(first)
    part = sorted((tmp_path / "journal/00000").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-4])
    again = opened(plan)
    journal.restore(again)
    assert again.pending() == [0, 2, 3, 4]


def test_the_second_of_two_that_finish_one_shard_leaves_nothing(tmp_path: Path) -> None:
    plan, output = planned(tmp_path), locate(tmp_path / "out")
    for worker, text, wins in (("one", "first", True), ("two", "second", False)):
        shard = opened(plan)
        for number in shard.pending():
            shard.finish(number, outcome(text))
        writer = ShardWriter(output, plan, worker, kind="jsonl", keep_rejected=True, difficulty_field=None)
        assert writer.commit(shard) == wins
    assert len((output / "rejected").names()) == 1
    (data,) = (name for name in (output / "shards").names() if name.endswith(".jsonl"))
    assert b"first" in (output / "shards" / data).read_bytes()
