"""`tpt compare`: read the runs, compare their arms, write the report."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tpt_megatron.compare.costs import read_costs
from tpt_megatron.compare.curves import compare_arms, group_by_arm, read_run
from tpt_megatron.compare.difficulty import read_difficulty
from tpt_megatron.compare.thinking import thinking_of
from tpt_megatron.errors import MachineError, UsageError
from tpt_megatron.files import write_json, write_text


def run_compare(
    run_dirs: list[Path],
    output: Path,
    notes: str | None = None,
    costs: Path | None = None,
    difficulty: Path | None = None,
    difficulty_field: str | None = None,
) -> dict[str, Any]:
    """Compare runs, grouped by arm over their seeds; write OUTPUT/report.html and OUTPUT/report.json and return the latter.

    `notes` is text for the report's section on what the result shows and does not show. `costs` is the plan.json of a `tpt experiment`.
    `difficulty` is the output of a `tpt losses`, or record files with a field `difficulty_field`: lengths of thinking are held against it. Lengths are
    read from the datasets that the runs name; where they are gone the report says so. Runs without evaluation results give loss curves only.

    Raises UsageError for no run or a run named twice, and for a difficulty that is none, DataError and RecordError for runs that cannot be read, MachineError
    without matplotlib or jinja2.
    """
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise MachineError(f"{package} is not installed; the report needs it: pip install 'tpt-megatron[report]'")
    if not run_dirs:
        raise UsageError("name at least one run folder to compare")
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise UsageError("a run folder is named twice; it would count as two seeds")
    if difficulty_field is not None and difficulty is None:
        raise UsageError("--difficulty-field names a field of record files; give these, too, as --difficulty")
    from tpt_megatron.compare.report import headlines, render_html

    runs = [read_run(path) for path in run_dirs]
    known = None if difficulty is None else read_difficulty(difficulty, difficulty_field)
    comparison = compare_arms(runs, costs=None if costs is None else read_costs(costs))
    thinking = thinking_of({arm: [run.path for run in members] for arm, members in group_by_arm(runs).items()}, known)
    comparison |= {"thinking": thinking, "headlines": headlines(comparison), "notes": notes}
    write_text(output / "report.html", render_html(comparison, runs, notes))
    write_json(output / "report.json", comparison)
    return comparison
