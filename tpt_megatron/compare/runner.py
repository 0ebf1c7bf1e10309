"""`tpt compare`: read the runs, compare their arms, write the report."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tpt_megatron.compare.costs import read_costs
from tpt_megatron.compare.curves import compare_arms, read_run
from tpt_megatron.errors import MachineError, UsageError
from tpt_megatron.files import write_json, write_text


def run_compare(run_dirs: list[Path], output: Path, notes: str | None = None, costs: Path | None = None) -> dict[str, Any]:
    """Compare runs, grouped by arm over their seeds; write OUTPUT/report.html and OUTPUT/report.json and return the latter.

    `notes` is text for the report's section on what the result shows and does not show. `costs` is the plan.json of a `tpt experiment`.
    Runs without evaluation results give loss curves only; the report says so.

    Raises UsageError for no run or a run named twice, DataError and RecordError for runs that cannot be read, MachineError
    without matplotlib or jinja2.
    """
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise MachineError(f"{package} is not installed; the report needs it: pip install 'tpt-megatron[report]'")
    if not run_dirs:
        raise UsageError("name at least one run folder to compare")
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise UsageError("a run folder is named twice; it would count as two seeds")
    from tpt_megatron.compare.report import headlines, render_html

    runs = [read_run(path) for path in run_dirs]
    comparison = compare_arms(runs, costs=None if costs is None else read_costs(costs))
    comparison |= {"headlines": headlines(comparison), "notes": notes}
    write_text(output / "report.html", render_html(comparison, runs, notes))
    write_json(output / "report.json", comparison)
    return comparison
