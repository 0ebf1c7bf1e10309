from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from rich.console import Console

from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.report import render_report, terminal_summary
from tpt_megatron.augment.statistics import Statistics
from tpt_megatron.config.augment import Cost
from tpt_megatron.errors import MachineError
from tpt_megatron.records import Document, Thought

PRICED = Cost(gpus=2, per_gpu_hour=3, per_million_generated_tokens=10, currency="EUR")


def made(*, tokens: int | None = 100, difficulty: str | None = "hard", sources: tuple[str, ...] = ("web", "books")) -> Statistics:
    total = Statistics()
    for number, source in enumerate(sources):
        thought = Thought("t" * 400, "qwen", prompt="expert", tokens=None if tokens is None else tokens * (number + 1))
        outcome = Outcome((thought,), (Rejection("loop", "", thought),), 2, 500, 2 * (tokens or 0))
        total.add(Document(str(number), "x" * 800, source), outcome, difficulty=difficulty, document_tokens=200)
    return total


def page(statistics: Statistics, **changes: Any) -> str:
    values: dict[str, Any] = {"title": "A run", "progress": (3, 4), "settings": {"model": "qwen"}, "cost": Cost(), "elapsed_s": None}
    return render_report(statistics, **(values | changes))


def printed(table: object) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_report_stands_alone_and_says_what_it_must() -> None:
    settings = {"prompts": "expert", "unset": None}
    html = render_report(made(), title="A <run>", progress=(3, 4), settings=settings, cost=PRICED, elapsed_s=1800)
    assert "A &lt;run&gt;" in html
    assert "3 of 4 shards finished (75.0%)" in html
    assert html.count("<svg") == 5  # histogram, source, difficulty, generator and prompt, rejections
    assert "50.0% kept, 2 rejected" in html
    assert "1.750×" in html  # (2 * 200 + 100 + 200) / (2 * 200) tokens
    assert "1.500×" in html  # (2 * 800 + 2 * 400) / (2 * 800) characters
    assert "3.00 EUR" in html  # 2 GPUs, half an hour, 3 EUR
    assert "0.00 EUR" in html  # 400 generated tokens
    assert not re.search(r"""(src|href)=["']https?:""", html)
    assert not re.search(r"<(script|link|img)\b", html)


def test_nothing_yet_reads_well() -> None:
    html = page(Statistics(), progress=(0, 0), settings={})
    assert "No shards were planned yet" in html
    assert "No thought has been kept yet." in html
    assert "No thought has come yet" in html
    assert "Nothing has been measured yet" in html
    assert "<svg" not in html


def test_a_run_whose_thoughts_were_all_rejected_says_so() -> None:
    total = Statistics()
    total.add(Document("1", "text"), Outcome((), (Rejection("copy", "", Thought("t", "g")),), 1), difficulty=None, document_tokens=None)
    html = page(total)
    assert "all 1 were rejected" in html
    assert html.count("<svg") == 1


def test_lengths_without_token_counts_are_characters_and_said_to_be() -> None:
    html = page(made(tokens=None))
    assert "Characters, since the engine tells no tokens" in html
    assert "characters of a thought" in html
    both = made()
    both.merge(made(tokens=None))
    html = page(both)
    assert "2 of 4 thoughts have no count" in html
    assert "tokens of a thought" in html
    assert "over the 2 of 4 documents whose tokens are known" in html


def test_missing_difficulty_is_named_with_its_key() -> None:
    html = page(made(difficulty=None))
    assert "difficulty_field=NAME" in html
    assert html.count("<svg") == 4


def test_cost_is_shown_only_where_stated() -> None:
    assert "cost by" not in page(made(), elapsed_s=60)
    assert "GPU-hours" not in page(made(), elapsed_s=60)
    assert "cost by GPU-hour" not in page(made(), cost=PRICED)  # no wall time
    assert "cost by token" in page(made(), cost=PRICED)


def test_names_of_any_kind_are_text() -> None:
    names = ("<script>alert(1)</script>", "a $x^{$ b", "数学 \\frac", "[bold]x[/bold]", "--> x")
    total = made(sources=names)
    total.rejections["[red]odd[/red] $\\bad{$"] = {"g": 3}
    html = page(total)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a $x^{$ b" in html
    assert "数学 \\frac" in html
    assert "[red]odd[/red]" in printed(terminal_summary(total, Cost(), None))


def test_grades_stand_in_their_own_order_and_sources_by_length() -> None:
    total = Statistics()
    for grade, length in (("10", 50), ("9", 100), ("2", 10)):
        total.add(Document("d", "text", f"s{grade}"), Outcome((Thought("t", "g", tokens=length),)), difficulty=grade, document_tokens=None)
    html = page(total)
    assert re.findall(r"<tr><td>(\d+)</td>", html) == ["2", "9", "10"]
    assert re.findall(r"<tr><td>(s\d+)</td>", html) == ["s9", "s10", "s2"]


def test_many_sources_are_all_in_the_table_and_the_largest_in_the_figure() -> None:
    html = page(made(sources=tuple(f"source-{number:02}" for number in range(40))))
    assert "16 more are in the table" in html
    assert html.count("<tr><td>source-") == 40


def test_same_statistics_give_the_same_page() -> None:
    assert page(made()) == page(made())


def test_terminal_summary_has_figures_rejections_and_cost() -> None:
    text = printed(terminal_summary(made(), PRICED, 1800))
    assert re.search(r"documents\W+2\b", text)
    assert re.search(r"rejected: loop\W+2\W+50\.00%", text)
    assert "3.00 EUR" in text
    assert "documents" in printed(terminal_summary(Statistics(), Cost(), None))


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MachineError, match=rf"{package} is not installed.*tpt-megatron\[report\]"):
        page(made())


def test_importing_loads_neither_matplotlib_nor_jinja2() -> None:
    code = "import sys, tpt_megatron.augment.report, tpt_megatron.augment.sample_page; sys.exit(bool({'matplotlib', 'jinja2', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
