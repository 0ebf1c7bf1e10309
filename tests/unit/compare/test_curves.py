from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import write_run

from tpt_megatron.compare.curves import Point, compare_arms, group_by_arm, improved, mean_curve, read_run
from tpt_megatron.errors import DataError


def curve(*points: tuple[int, float]) -> tuple[Point, ...]:
    return tuple(Point(tokens, value) for tokens, value in points)


def test_mean_is_taken_where_all_seeds_were_scored() -> None:
    assert mean_curve([curve((1, 0.0), (2, 0.4)), curve((2, 0.6), (3, 1.0))]) == curve((2, 0.5))
    assert mean_curve([]) == ()


def test_arms_are_grouped_over_seeds_with_vanilla_first(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, arm, i)) for i, (name, arm) in enumerate((("a", "append"), ("b", "vanilla"), ("c", "append"), ("d", None)))]
    assert {arm: [run.seed for run in members] for arm, members in group_by_arm(runs).items()} == {"vanilla": [1], "append": [0, 2], "unnamed": [3]}
    assert list(group_by_arm(runs)) == ["vanilla", "append", "unnamed"]


def test_comparison_at_vanillas_final_score(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"v{seed}", "vanilla", seed, [(10_000, 0.0), (100_000, 0.5 + seed / 10)]) for seed in (0, 1)]
    runs += [write_run(tmp_path / f"t{seed}", "tpt", seed, [(10_000, 0.1), (50_000, 0.5), (100_000, 1.0)]) for seed in (0, 1)]
    result = compare_arms([read_run(run) for run in runs])
    arm = result["tasks"]["direct"]["tpt"]
    found = arm["efficiency_at_baseline_final"]
    assert found["target"] == pytest.approx(0.55)
    assert (found["factor"]["kind"], found["factor"]["low"]) == ("estimate", pytest.approx(100_000 / 55_000))
    low, high = found["factor"]["interval"]
    assert 1 < low < found["factor"]["low"] < high < 4
    assert found["not_reached"] == {"baseline": 0.0, "arm": 0.0}
    assert (arm["tokens_to"]["0.5"]["kind"], arm["tokens_to"]["0.5"]["low"]) == ("estimate", pytest.approx(50_000))
    vanilla = result["tasks"]["direct"]["vanilla"]
    assert vanilla["final_by_seed"] == [0.5, 0.6]
    assert vanilla["tokens_to"]["0.9"] == {"kind": "at_least", "low": 100_000, "high": None, "interval": [pytest.approx(100_000, rel=0.1), None]}
    assert vanilla["efficiency"] is None
    assert all(low <= value <= high for (_, value), (low, high) in zip(arm["mean"], arm["band"], strict=True))
    assert result["cautions"] == []


def test_cautions_are_said(tmp_path: Path) -> None:
    flat = write_run(tmp_path / "v", "vanilla", 0, [(10_000, 0.3), (90_000, 0.3)])
    other = write_run(tmp_path / "t", "tpt", 0, [(10_000, 0.1), (100_000, 0.5)], settings={"limit": 5})
    bare = write_run(tmp_path / "n", "tpt", 1)
    result = compare_arms([read_run(run) for run in (flat, other, bare)])
    text = " ".join(result["cautions"])
    seen = ("Without evaluation results", "different settings", "One seed only: vanilla", "different token counts")
    for said in (*seen, "did not improve on direct", "above a threshold"):
        assert said in text
    assert result["tasks"]["direct"]["tpt"]["efficiency_at_baseline_final"] is None
    assert "no data-efficiency factor" in " ".join(compare_arms([read_run(other)])["cautions"])


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run\.json"):
        read_run(tmp_path)
    run = write_run(tmp_path / "r", "a", 1, [(1000, 0.5)])
    (run / "evaluation" / "iter_0000001.json").write_text("{}")
    with pytest.raises(DataError, match=r"iter_0000001\.json: not an evaluation result"):
        read_run(run)
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        read_run(run)


def test_prompts_that_differ_are_said_without_calling_scores_incomparable(tmp_path: Path) -> None:
    asked = {"tasks": {"sums": {"prompt": "{problem} <think>", "max_new_tokens": 2}}}
    vanilla = write_run(tmp_path / "v", "vanilla", 0, [(10, 0.1), (20, 0.2)])
    append = write_run(tmp_path / "a", "append", 0, [(10, 0.1), (20, 0.5)], settings=asked)
    cautions = " ".join(compare_arms([read_run(vanilla), read_run(append)])["cautions"])
    assert "On sums the arms were asked with different prompts. vanilla: “{problem}”; append: “{problem} <think>”." in cautions
    assert "not comparable" not in cautions


def test_an_arm_whose_seeds_share_no_token_count_is_named(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "v", "vanilla", 0, [(10, 0.1), (20, 0.2)]),
        write_run(tmp_path / "a", "append", 0, [(10, 0.1), (20, 0.5)]),
        write_run(tmp_path / "b", "append", 1, [(15, 0.1), (25, 0.5)]),
    ]
    assert "append is left out on direct: its seeds share no token count." in compare_arms([read_run(folder) for folder in folders])["cautions"]


def test_a_run_evaluated_in_two_ways_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "v", "vanilla", 0, [(1000, 0.1)])
    write_run(tmp_path / "other", "vanilla", 0, [(2000, 0.2)], settings={"limit": 5})
    (tmp_path / "other/evaluation/iter_0000002.json").rename(run / "evaluation/iter_0000002.json")
    with pytest.raises(DataError, match="different settings or problems"):
        read_run(run)


def test_a_loss_that_is_no_number_is_refused_by_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "v", "vanilla", 0)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "tokens_seen": 101000, "loss": 1.0, "validation_loss": "nan"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:101: validation_loss is 'nan'"):
        read_run(run)


@pytest.mark.parametrize(("rise", "answers", "more_than_chance"), [(0.14, 100, False), (0.15, 100, True), (0.04, 1000, False), (0.05, 1000, True)])
def test_a_rise_within_two_standard_errors_is_no_improvement(rise: float, answers: int, more_than_chance: bool) -> None:
    assert improved((Point(1, 0.2), Point(2, 0.2 + rise)), answers) is more_than_chance
