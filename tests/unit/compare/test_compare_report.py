from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from fake_runs import write_run
from rich.console import Console

from tests.support.browser import check_page
from tpt_megatron.compare.figures import smooth
from tpt_megatron.compare.report import terminal_table
from tpt_megatron.compare.runner import run_compare
from tpt_megatron.errors import DataError, MachineError, UsageError


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    vanilla = [write_run(tmp_path / f"v{seed}", "vanilla", seed, [(10_000, 0.0), (100_000, 0.6)]) for seed in (1, 2)]
    return vanilla + [write_run(tmp_path / f"t{seed}", "tpt", seed, [(10_000, 0.0), (50_000, 0.8)], parts=True) for seed in (1, 2)]


def test_report_stands_alone_and_says_what_it_must(runs: list[Path], tmp_path: Path) -> None:
    result = run_compare(runs, tmp_path / "out", "Made-up <numbers>.\n\nSecond paragraph.")
    html = (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result
    (headline,) = result["headlines"]
    said = r"direct: tpt reaches vanilla's final score of 0\.600 on the fitted curve after 40k tokens, vanilla after 100k: a data-efficiency factor of 2\.50"
    assert re.fullmatch(said + r" \(90% interval 2\.\d\d to [23]\.\d\d\)\.", headline), headline
    assert "data-efficiency factor of 2.50" in html
    assert "not comparable" in html
    assert "Made-up &lt;numbers&gt;." in html
    assert "not reached" in html
    assert html.count("<svg") == 6  # score, length, four losses
    assert not re.search(r"""(src|href)=["']https?:""", html)
    assert not re.search(r"<(script|link|img)\b", html)


def test_a_browser_shows_the_report_wide_and_narrow(runs: list[Path], tmp_path: Path) -> None:
    run_compare(runs, tmp_path / "out", "Made-up numbers.")
    check_page(tmp_path / "out" / "report.html", pictures=6)


def test_costs_are_counted_where_a_plan_says_them(runs: list[Path], tmp_path: Path) -> None:
    """tpt needs 40k tokens of 1,000 FLOPs each and half the thoughts of an epoch of 80k tokens, 100 MFLOPs: 90 in all. Vanilla's 100k tokens are 100."""
    arms = [
        {"arm": "vanilla", "match": "tokens", "tokens": 100_000, "epochs": 0.5, "train_flops": 1e8, "generator_flops": 0.0},
        {"arm": "tpt", "match": "tokens", "tokens": 100_000, "epochs": 1.25, "train_flops": 1e8, "generator_flops": 1e8},
    ]
    (tmp_path / "plan.json").write_text(json.dumps({"arms": arms}))
    result = run_compare(runs, tmp_path / "out", costs=tmp_path / "plan.json")
    found = result["tasks"]["direct"]["tpt"]["efficiency_at_baseline_final"]["factor_of_flops"]
    assert (found["kind"], found["low"]) == ("estimate", pytest.approx(100 / 90))
    assert "counted in FLOPs, those that wrote the thoughts included, the factor is 1.11 (90% interval" in result["headlines"][1]
    assert result["tasks"]["direct"]["tpt"]["cost"] == [[pytest.approx(2.25e7), 0.0], [pytest.approx(1.125e8), pytest.approx(0.8)]]
    check_page(tmp_path / "out" / "report.html", pictures=7)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match=r"plan\.json: not the plan\.json that tpt experiment writes"):
        run_compare(runs, tmp_path / "out", costs=tmp_path / "plan.json")


def test_same_runs_give_the_same_report(runs: list[Path], tmp_path: Path) -> None:
    run_compare(runs, tmp_path / "a")
    run_compare(runs, tmp_path / "b")
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()


def test_runs_without_scores_give_losses_and_say_so(tmp_path: Path) -> None:
    result = run_compare([write_run(tmp_path / "r", "tpt", 1)], tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert result["tasks"] == {}
    assert "shows losses only" in html
    assert html.count("<svg") == 2
    assert "Score on" not in html


def test_terminal_table_holds_scores_and_factors(runs: list[Path], tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(terminal_table(run_compare(runs, tmp_path / "out")))
        text = console.export_text()
    assert re.search(r"direct\W+tpt\W+50k\W+0\.800\W+35k\W+not reached", text)
    assert re.search(r"2\.43× \(2\.\d\d", text), text


def test_long_curves_are_averaged_in_pieces() -> None:
    line = [[float(i), float(i % 2)] for i in range(1000)]
    assert len(smooth(line, 100)) == 100
    assert smooth(line, 100)[0] == [4.5, 0.5]
    assert smooth(line[:3], 100) == line[:3]
    assert smooth([], 100) == []


def test_mistakes_are_one_line(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="at least one"):
        run_compare([], tmp_path / "out")
    with pytest.raises(UsageError, match="twice"):
        run_compare([runs[0], runs[0]], tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"tpt-megatron\[report\]"):
        run_compare(runs, tmp_path / "out")


def test_compare_loads_no_torch() -> None:
    code = "import sys, tpt_megatron.compare.report, tpt_megatron.compare.runner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_benchmarks_have_their_own_numbers_of_problems_and_some_have_no_score(tmp_path: Path) -> None:
    runs = []
    for name, arm, last in (("v", "vanilla", 0.4), ("t", "tpt", 0.8)):
        run = write_run(tmp_path / name, arm, 1, [(10_000, 0.1), (100_000, 0.3)], settings={"problems": None, "tasks": {}})
        for path in sorted((run / "evaluation").iterdir()):
            result = json.loads(path.read_text())
            score = 0.1 if result["tokens_seen"] == 10_000 else last
            result |= {"problems": 0}
            result["tasks"] = {
                "gsm8k": {"accuracy": score, "mean_new_tokens": 90.0, "problems": 1319},
                "piqa": {"accuracy": score, "mean_new_tokens": None, "problems": 1838},
                "wikitext": {"accuracy": None, "mean_new_tokens": None, "problems": 62, "metrics": {"wikitext/word_perplexity,none": 30.0}},
            }
            path.write_text(json.dumps(result))
        runs.append(run)
    result = run_compare(runs, tmp_path / "out")
    assert list(result["tasks"]) == ["gsm8k", "piqa"]
    assert result["problems"] == [1319, 1838]
    assert result["tasks"]["piqa"]["tpt"]["mean_new_tokens"] == []
    widths = {}
    for task in ("gsm8k", "piqa"):
        factor = result["tasks"][task]["tpt"]["efficiency_at_baseline_final"]["factor"]
        widths[task] = factor["interval"][1] - factor["interval"][0]
    assert widths["piqa"] < widths["gsm8k"], "more problems leave less to chance"
