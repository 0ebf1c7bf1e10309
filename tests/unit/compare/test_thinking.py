from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import write_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.support.browser import check_page
from tests.support.token_files import write_token_files
from tpt_megatron.compare import thinking as module
from tpt_megatron.compare.difficulty import Difficulty
from tpt_megatron.compare.runner import run_compare
from tpt_megatron.compare.thinking import thinking_of
from tpt_megatron.compare.thinking_report import thinking_table
from tpt_megatron.errors import UsageError

Sequences = list[tuple[list[int], list[int], str | None]]


def run_on(folder: Path, arm: str, train: list[Path], validation: Path | None = None) -> Path:
    """Write a run that names datasets in its run.json."""
    run = write_run(folder, arm, 1)
    about = json.loads((run / "run.json").read_text())
    shares = [{"path": str(prefix), "weight": 1.0} for prefix in train]
    about["config"]["data"] = {"train": shares, "sequence_length": 8} | ({} if validation is None else {"validation": str(validation)})
    (run / "run.json").write_text(json.dumps(about))
    return run


def sequences(lengths: list[tuple[int, int, str | None]]) -> Sequences:
    """Return documents of so many tokens, and the end, with so many of thinking, and their source."""
    return [([1] * document, [2] * thinking, source) for document, thinking, source in lengths]


def number(values: dict[str, float]) -> Difficulty:
    return Difficulty("level", dict(values), len(values))


def test_lengths_by_source_are_sums_of_the_tables(tmp_path: Path) -> None:
    write_token_files(tmp_path / "one", sequences([(4, 10, "math"), (9, 0, "math"), (1, 30, None), (1, 20, "math")]))
    write_token_files(tmp_path / "two", sequences([(1, 6, "web"), (3, 60, "math")]))
    found = thinking_of({"tpt": [run_on(tmp_path / "a", "tpt", [tmp_path / "one", tmp_path / "two"]), run_on(tmp_path / "b", "tpt", [tmp_path / "one"])]})
    assert found is not None
    arm = found["arms"]["tpt"]
    assert arm["datasets"] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert (arm["sampled"], arm["difficulty"], found["difficulty"], found["missing"]) == (None, None, None, [])
    document, thinking = 5 + 10 + 2 + 2 + 2 + 4, 126  # each document has its end
    assert arm["all"] == {
        "sequences": 6,
        "with_thinking": 5,
        "tokens_document": document,
        "tokens_thinking": thinking,
        "mean": thinking / 5,
        "quantiles": {"0.05": pytest.approx(6.8), "0.5": 20.0, "0.95": pytest.approx(54.0)},
        "expansion": (document + thinking) / document,
    }
    assert list(arm["by_source"]) == ["math", "(none)", "web"]
    math = arm["by_source"]["math"]
    assert (math["sequences"], math["with_thinking"], math["mean"], math["quantiles"]["0.5"]) == (4, 3, 30.0, 20.0)
    assert math["expansion"] == pytest.approx((21 + 90) / 21)


lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 40), st.sampled_from(["math", "web", None])), min_size=1, max_size=40)


@settings(max_examples=25)
@example([(1, i, "web" if i < 5 else None) for i in range(10)], 3)
@given(lengths, st.integers(1, 50))
def test_blocks_change_nothing(tmp_path_factory: pytest.TempPathFactory, made: list[tuple[int, int, str | None]], block: int) -> None:
    folder = tmp_path_factory.mktemp("thinking")
    write_token_files(folder / "data", sequences(made))
    run = run_on(folder / "run", "tpt", [folder / "data"])
    hard = number({str(i): float(i % 7) for i in range(0, len(made), 2)})
    whole = thinking_of({"tpt": [run]}, hard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        assert thinking_of({"tpt": [run]}, hard) == whole
    assert whole is not None
    arm = whole["arms"]["tpt"]
    assert arm["all"]["tokens_thinking"] == sum(thinking for _, thinking, _ in made)
    for source in ("math", "web", None):
        of = [thinking for _, thinking, name in made if name == source]
        if of:
            assert arm["by_source"][source or "(none)"]["with_thinking"] == sum(length > 0 for length in of)
    known = [(i % 7, thinking) for i, (_, thinking, _) in enumerate(made) if i % 2 == 0 and thinking]
    assert arm["difficulty"]["documents"] == len(known)
    assert sum(group["documents"] for group in arm["difficulty"]["groups"].values()) == len(known)


def test_many_sequences_are_sampled_with_exact_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_token_files(tmp_path / "data", sequences([(1, 1 + i % 100, f"s{i % 2}") for i in range(3000)]))
    run = run_on(tmp_path / "run", "tpt", [tmp_path / "data"])
    whole = thinking_of({"tpt": [run]})
    monkeypatch.setattr(module, "SAMPLED", 500)
    found = thinking_of({"tpt": [run]})
    assert found is not None
    assert whole is not None
    before, after = (of["arms"]["tpt"] for of in (whole, found))
    assert (before["sampled"], after["sampled"]) == (None, 500)
    for key in ("sequences", "mean", "expansion"):
        assert before["all"][key] == after["all"][key]
    assert before["all"]["quantiles"] != after["all"]["quantiles"]
    assert after["all"]["quantiles"]["0.5"] == pytest.approx(50.5, abs=8)
    assert found == thinking_of({"tpt": [run]})


def test_sources_beyond_the_largest_are_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCES", 2)
    write_token_files(tmp_path / "data", sequences([(1, 1, "a"), (1, 2, "b"), (1, 3, "b"), (1, 4, "c"), (1, 5, "c"), (1, 6, "d")]))
    found = thinking_of({"tpt": [run_on(tmp_path / "run", "tpt", [tmp_path / "data"])]})
    assert found is not None
    assert {name: of["tokens_thinking"] for name, of in found["arms"]["tpt"]["by_source"].items()} == {"b": 5, "c": 9, "(other)": 7}


def test_length_rises_with_difficulty_where_it_was_made_to(tmp_path: Path) -> None:
    write_token_files(tmp_path / "train", sequences([(1, 1 + 3 * i, None) for i in range(60)] + [(1, 0, None)]))
    write_token_files(tmp_path / "validation", sequences([(1, 500, None)] * 62))
    run = run_on(tmp_path / "run", "tpt", [tmp_path / "train"])
    hard = number({str(i): i / 60 for i in range(61)} | {"unknown": 3.0})
    found: Any = thinking_of({"tpt": [run]}, hard)
    of = found["arms"]["tpt"]["difficulty"]
    assert (of["documents"], of["rho"], of["interval"]) == (60, pytest.approx(1), [pytest.approx(1), pytest.approx(1)])
    assert list(of["groups"]) == [str(tenth) for tenth in range(1, 11)]
    assert {group["documents"] for group in of["groups"].values()} == {6}
    assert of["groups"]["1"]["mean"] == pytest.approx(np.mean([1 + 3 * i for i in range(6)]))
    assert of["groups"]["10"]["difficulty"] == pytest.approx(np.mean([i / 60 for i in range(54, 60)]))
    held_out: Any = thinking_of({"tpt": [run_on(tmp_path / "other", "tpt", [tmp_path / "train"], tmp_path / "validation")]}, number({"61": 1.0, "5": 2.0}))
    assert held_out["arms"]["tpt"]["difficulty"]["groups"]["1"]["mean"] == 500  # of the validation data, which losses are best taken on
    assert held_out["arms"]["tpt"]["all"]["sequences"] == 61


def test_what_has_no_correlation_says_why(tmp_path: Path) -> None:
    write_token_files(tmp_path / "train", sequences([(1, 1 + i, None) for i in range(12)]))
    run = run_on(tmp_path / "run", "tpt", [tmp_path / "train"])
    same: Any = thinking_of({"tpt": [run]}, number({str(i): 2.0 for i in range(12)}))
    of = same["arms"]["tpt"]["difficulty"]
    assert (of["rho"], of["why_not"]) == (None, "all values of one of the two are equal")
    assert of["groups"]["2"]["documents"] == 12
    none: Any = thinking_of({"tpt": [run]}, number({"elsewhere": 1.0}))
    assert none["arms"]["tpt"]["difficulty"]["why_not"] == "fewer than 3 documents"
    named: Any = thinking_of({"tpt": [run]}, Difficulty("level", {str(i): ("hard", 1.5)[i % 2] for i in range(12)}, 12))
    of = named["arms"]["tpt"]["difficulty"]
    assert (of["rho"], of["why_not"]) == (None, "the difficulty is a name, which has no order")
    assert {name: group["mean"] for name, group in of["groups"].items()} == {"hard": 6.0, "1.5": 7.0}


def test_the_report_shows_it_wide_and_narrow(tmp_path: Path) -> None:
    made = sequences([(20, 10 + 5 * i, f"source $n$ {i % 14} of <many>") for i in range(60)])
    write_token_files(tmp_path / "append", made)
    write_token_files(tmp_path / "vanilla", [(document, [], source) for document, _, source in made])
    runs = [run_on(tmp_path / f"run-{arm}", arm, [tmp_path / arm]) for arm in ("append", "vanilla")]
    runs.append(run_on(tmp_path / "run-gone", "prepend", [tmp_path / "nowhere"]))
    with open(tmp_path / "levels.jsonl", "w") as file:
        for i in range(60):
            file.write(json.dumps({"id": str(i), "text": "t", "level": i % 5}) + "\n")
    result = run_compare(runs, tmp_path / "out", difficulty=tmp_path / "levels.jsonl", difficulty_field="level")
    assert json.loads((tmp_path / "out/report.json").read_text()) == result
    assert result["format"] == 2
    page = (tmp_path / "out/report.html").read_text()
    assert '<td class="name">source $n$ 3 of &lt;many&gt;</td>' in page
    assert re.search(r"<text [^>]*>source \$n\$ 3 of &lt;many&gt;</text>", page)
    assert "nowhere.idx: no such file" in page
    assert re.search(r"append: Spearman&#39;s ρ [+-]0\.\d\d \(60 documents, 90% interval", page)
    assert page.count("<svg") == 4  # sources, difficulty, two losses
    check_page(tmp_path / "out/report.html", pictures=4)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(thinking_table(result["thinking"], result["interval"]))
        said = console.export_text()
    expansion = (60 * 21 + sum(10 + 5 * i for i in range(60))) / (60 * 21)
    assert re.search(rf"append\W+all, of 14 sources\W+60\W+60\W+158\W+158\W+{expansion:.2f}×", said), said
    assert re.search(r"vanilla\W+all, of 14 sources\W+60\W+0\W+–\W+–\W+1\.00×", said)
    assert "Spearman's ρ" in said


def test_runs_that_do_not_say_what_they_read_have_no_section(tmp_path: Path) -> None:
    result = run_compare([write_run(tmp_path / "run", "tpt", 1)], tmp_path / "out")
    assert result["thinking"] is None
    assert "Thinking length" not in (tmp_path / "out/report.html").read_text()
    write_token_files(tmp_path / "plain", sequences([(1, 0, None)]), sidecars=False)
    result = run_compare([run_on(tmp_path / "other", "tpt", [tmp_path / "plain"])], tmp_path / "out")
    assert result["thinking"]["missing"] == [f"{tmp_path / 'plain'}: it has no table that says what of its documents is thinking"]
    write_token_files(tmp_path / "damaged", sequences([(1, 1, None)]))
    table = Path(f"{tmp_path / 'damaged'}.documents.parquet")
    table.write_bytes(b"x" * table.stat().st_size)
    found = thinking_of({"tpt": [run_on(tmp_path / "third", "tpt", [tmp_path / "damaged"])]})
    assert found is not None
    assert [line.startswith(f"{tmp_path / 'damaged'}: ") for line in found["missing"]] == [True]
    assert "no table that says" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(UsageError, match="--difficulty-field names a field"):
        run_compare([tmp_path / "run"], tmp_path / "out", difficulty_field="level")
