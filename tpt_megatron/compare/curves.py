"""What runs say, arm by arm: curves of score over tokens, and how many tokens an arm needs for a score (crossings.py says how sure that is).

A score's mean curve is taken over an arm's runs (seeds) at the token counts that all of them were evaluated at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tpt_megatron.compare.costs import ArmCost
from tpt_megatron.compare.crossings import INTERVAL, Crossings, Estimate, Resamples, crossings, resample, tokens_to
from tpt_megatron.errors import DataError
from tpt_megatron.files import parse_json_line, read_json, read_lines

VANILLA = "vanilla"
THRESHOLDS = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Point:
    """A value after so many tokens."""

    tokens: int
    value: float


Curve = tuple[Point, ...]


@dataclass(frozen=True)
class Run:
    """One training run: its arm, its loss curves, and by task scores, lengths of continuation, and how many problems are behind a score."""

    path: Path
    arm: str
    seed: int | None
    losses: dict[str, Curve]
    scores: dict[str, Curve]
    new_tokens: dict[str, Curve]
    problems: dict[str, int]
    settings: dict[str, Any] = field(repr=False)


LOSSES = ("loss", "validation_loss", "loss_document", "loss_thinking")


def read_run(path: Path) -> Run:
    """Read a run folder. Evaluation results are optional; DataError for a folder that is no run or holds damaged files."""
    if not (path / "run.json").is_file():
        raise DataError(f"{path}: not a run folder (no run.json in it); give folders that tpt train wrote")
    about = read_json(path / "run.json")
    steps = []
    for number, line in read_lines(path / "metrics.jsonl"):
        step = parse_json_line(line, f"{path / 'metrics.jsonl'}:{number}")
        if not isinstance(step, dict) or "tokens_seen" not in step or "loss" not in step:
            raise DataError(f"{path / 'metrics.jsonl'}:{number}: a step has tokens_seen and loss, found {line[:60]!r}")
        for name in LOSSES:
            if not isinstance(step.get(name, 0.0), int | float):  # the trainer writes what is not finite as a string
                raise DataError(f"{path / 'metrics.jsonl'}:{number}: {name} is {step[name]!r}, no number; a run that diverged cannot be compared")
        steps.append(step)
    losses = {name: tuple(Point(step["tokens_seen"], step[name]) for step in steps if step.get(name) is not None) for name in LOSSES}
    results = _read_results(path)
    tasks = sorted({task for result in results for task in result["tasks"]})
    config = about.get("config", {})
    return Run(
        path=path,
        arm=about.get("arm") or "unnamed",
        seed=config.get("seed"),
        losses={name: curve for name, curve in losses.items() if curve},
        scores={task: curve for task in tasks if (curve := _task_curve(results, task, "accuracy"))},
        new_tokens={task: curve for task in tasks if (curve := _task_curve(results, task, "mean_new_tokens"))},
        # A benchmark has its own number; the others are asked the same problems.
        problems={task: about.get("problems", result["problems"]) for result in results for task, about in result["tasks"].items()},
        settings=_settings(results[-1]) if results else {},
    )


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a result was made with, apart from the checkpoint's own weights."""
    return {key: value for key, value in result["settings"].items() if key != "weights"}


def _read_results(run: Path) -> list[dict[str, Any]]:
    """Return the evaluation results of a run's checkpoints in the order of tokens; those of other models are left out."""
    results = []
    for path in sorted((run / "evaluation").glob("iter_*.json")):
        result = read_json(path)
        if not isinstance(result, dict) or not {"tokens_seen", "tasks", "problems", "settings"} <= result.keys():
            raise DataError(f"{path}: not an evaluation result; remove it and evaluate the run again")
        if result["tokens_seen"] is not None:
            results.append(result)
    if len({json.dumps(_settings(result), sort_keys=True) for result in results}) > 1:
        raise DataError(f"{run / 'evaluation'}: its checkpoints were evaluated with different settings or problems; run tpt evaluate on the run again")
    return sorted(results, key=lambda result: int(result["tokens_seen"]))


def _task_curve(results: Sequence[dict[str, Any]], task: str, measure: str) -> Curve:
    """Return a measure over tokens, empty where the task has none: some benchmarks have no score between 0 and 1."""
    found = ((result["tokens_seen"], result["tasks"].get(task, {}).get(measure)) for result in results)
    return tuple(Point(tokens, value) for tokens, value in found if value is not None)


def group_by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each arm: vanilla first, the others by name."""
    arms = sorted({run.arm for run in runs}, key=lambda arm: (arm != VANILLA, arm))
    return {arm: [run for run in runs if run.arm == arm] for arm in arms}


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Average curves at the token counts that all of them have."""
    values = [{point.tokens: point.value for point in curve} for curve in curves]
    shared = sorted(set.intersection(*(set(value) for value in values))) if values else []
    return tuple(Point(tokens, sum(value[tokens] for value in values) / len(values)) for tokens in shared)


def resamples(runs: Sequence[Run], task: str, name: str) -> Resamples | None:
    """Return what an arm's mean curve might have been; None where its runs share no token count. The same name gives the same draws."""
    scored = [run for run in runs if task in run.scores]
    tokens = [point.tokens for point in mean_curve([run.scores[task] for run in scored])]
    if not tokens:
        return None
    values = [{point.tokens: point.value for point in run.scores[task]} for run in scored]
    scores = np.array([[value[at] for at in tokens] for value in values])
    problems = np.array([[run.problems.get(task, 0)] * len(tokens) for run in scored])
    return resample(np.array(tokens, float), scores, problems, name)


def compare_arms(runs: Sequence[Run], baseline: str = VANILLA, costs: Mapping[str, ArmCost] | None = None) -> dict[str, Any]:
    """Return the comparison as plain data, as report.json holds it.

    Per task and arm: every seed's curve, the mean with a band, the best and the final score, the tokens to each threshold, and, where the baseline was
    scored too, the efficiency at the baseline's final score and at each threshold, in tokens and, for arms whose `costs` are known, in FLOPs. Estimates
    have bounds and an interval: `_estimate`.
    """
    arms = group_by_arm(runs)
    tasks = sorted({task for run in runs for task in run.scores})
    return {
        "format": 2,
        "interval": INTERVAL,
        "baseline": baseline if baseline in arms else None,
        "arms": {arm: {"runs": [str(run.path) for run in members], "seeds": [run.seed for run in members]} for arm, members in arms.items()},
        "problems": sorted({run.problems[task] for run in runs for task in run.scores}),
        "tasks": {task: _compare_task(arms, task, baseline, costs or {}) for task in tasks},
        "cautions": _cautions(arms, runs, baseline),
    }


def _compare_task(arms: dict[str, list[Run]], task: str, baseline: str, costs: Mapping[str, ArmCost]) -> dict[str, Any]:
    drawn = {arm: found for arm, members in arms.items() if (found := resamples(members, task, f"{arm} {task}")) is not None}
    vanilla = drawn.get(baseline)
    answers = _answers(arms.get(baseline, []), task)
    return {
        arm: _compare_arm(arms[arm], task, found, vanilla if arm != baseline else None, answers, (costs.get(baseline), costs.get(arm)))
        for arm, found in drawn.items()
    }


def improved(curve: Curve, answers: int) -> bool:
    """Say whether a score rose by more than chance may explain: two standard errors of a difference of two proportions.

    `answers` is the number of problems behind each point; the standard error is that of proportions of one half, the largest.
    """
    return len(curve) > 1 and curve[-1].value - curve[0].value > 2 * math.sqrt(2 * 0.25 / max(answers, 1))


def _answers(runs: Sequence[Run], task: str) -> int:
    return sum(run.problems.get(task, 0) for run in runs)


def _compare_arm(
    members: Sequence[Run], task: str, drawn: Resamples, baseline: Resamples | None, answers: int, costs: tuple[ArmCost | None, ArmCost | None]
) -> dict[str, Any]:
    scored = [run for run in members if task in run.scores]
    mean = [[point.tokens, point.value] for point in _mean(drawn)]
    low, high = drawn.band()
    at_final = baseline is not None and improved(
        tuple(Point(int(at), float(value)) for at, value in zip(baseline.tokens, baseline.mean[0], strict=True)), answers
    )
    return {
        "mean": mean,
        "band": [[float(below), float(above)] for below, above in zip(low, high, strict=True)],
        "seeds": [[[point.tokens, point.value] for point in run.scores[task]] for run in scored],
        "mean_new_tokens": [[point.tokens, point.value] for point in mean_curve([run.new_tokens[task] for run in scored if task in run.new_tokens])],
        "final": mean[-1][1],
        "final_by_seed": [run.scores[task][-1].value for run in scored],
        "best": max(value for _, value in mean),
        "tokens": mean[-1][0],
        "tokens_to": {str(threshold): _estimate(tokens_to(drawn, threshold)) for threshold in THRESHOLDS},
        "efficiency_at_baseline_final": _efficiency(crossings(baseline, drawn, None), *costs) if baseline is not None and at_final else None,
        "efficiency": {str(threshold): _efficiency(crossings(baseline, drawn, threshold), *costs) for threshold in THRESHOLDS}
        if baseline is not None
        else None,
        "cost": None if costs[1] is None else [[float(costs[1](np.array([tokens]))[0]), value] for tokens, value in mean],
    }


def _mean(drawn: Resamples) -> Curve:
    return tuple(Point(int(tokens), float(value)) for tokens, value in zip(drawn.tokens, drawn.mean[0], strict=True))


def _efficiency(found: Crossings, baseline_cost: ArmCost | None, arm_cost: ArmCost | None) -> dict[str, Any]:
    return {
        "target": found.target,
        "baseline_tokens": _estimate(found.baseline.estimate()),
        "arm_tokens": _estimate(found.arm.estimate()),
        "factor": _estimate(found.factor()),
        "factor_of_flops": None if baseline_cost is None or arm_cost is None else _estimate(found.factor(baseline_cost, arm_cost)),
        "not_reached": {"baseline": found.baseline.share_not_reached, "arm": found.arm.share_not_reached},
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON holds it: low and high are equal where it is known, and null is no bound."""
    ends = (found.low, found.high, *found.interval)
    low, high, *interval = (value if 0 < value < math.inf else None for value in ends)
    return {"kind": found.kind, "low": low, "high": high, "interval": interval}


def _how_asked(scored: Sequence[Run]) -> list[str]:
    """Say where the runs' evaluations differ. Prompts may: each arm is cued in the format that its text has."""

    def apart_from_prompts(settings: dict[str, Any]) -> str:
        tasks = {name: {key: value for key, value in task.items() if key != "prompt"} for name, task in settings["tasks"].items()}
        return json.dumps({**settings, "problems": (settings["problems"] or {}).get("sha256"), "tasks": tasks}, sort_keys=True)

    if len({apart_from_prompts(run.settings) for run in scored}) > 1:
        return ["The runs were evaluated with different settings or problems: their scores are not comparable."]
    said = []
    for name in scored[0].settings["tasks"]:
        prompts = dict.fromkeys((run.arm, run.settings["tasks"][name]["prompt"]) for run in scored)
        if len({prompt for _, prompt in prompts}) > 1:
            listed = "; ".join(f"{arm}: \u201c{prompt}\u201d" for arm, prompt in prompts)
            said.append(f"On {name} the arms were asked with different prompts. {listed}.")
    return said


def _cautions(arms: dict[str, list[Run]], runs: Sequence[Run], baseline: str) -> list[str]:
    """Return what a reader must know before believing the numbers, in plain sentences."""
    said = []
    scored = [run for run in runs if run.scores]
    if not scored:
        return ["No run has evaluation results: the report shows losses only, and losses of different arms are not comparable. Run tpt evaluate on each run."]
    if len(scored) < len(runs):
        said.append(f"Without evaluation results, and so without scores: {', '.join(str(run.path) for run in runs if not run.scores)}.")
    if baseline not in arms:
        said.append(f"No run is of the arm {baseline!r}, so no data-efficiency factor can be given.")
    said += _how_asked(scored)
    for arm, members in arms.items():
        scores: dict[str, list[Curve]] = {}
        for run in members:
            for task, curve in run.scores.items():
                scores.setdefault(task, []).append(curve)
        said += [f"{arm} is left out on {task}: its seeds share no token count." for task, curves in sorted(scores.items()) if not mean_curve(curves)]
    if lonely := [arm for arm, members in arms.items() if len(members) == 1]:
        said.append(f"One seed only: {', '.join(lonely)}. A difference between arms may be chance.")
    if len({run.scores[task][-1].tokens for run in scored for task in run.scores}) > 1:
        said.append("Runs end at different token counts; compare scores at equal tokens, not final scores.")
    for task in sorted({task for run in arms.get(baseline, []) for task in run.scores}):
        curve = mean_curve([run.scores[task] for run in arms[baseline] if task in run.scores])
        if curve and not improved(curve, _answers(arms[baseline], task)):
            said.append(f"{baseline} did not improve on {task} by more than chance may explain, so no factor is given at its final score.")
    starts = [task for arm in arms.values() for run in arm for task in run.scores if run.scores[task][0].value >= THRESHOLDS[0]]
    if starts:
        said.append("Some curve starts above a threshold already: it was reached at its first checkpoint or before.")
    return said
