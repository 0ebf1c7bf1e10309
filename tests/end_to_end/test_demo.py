"""`tpt demo`, with few steps: every stage runs, and the report has both arms. Whether they learn is for the full run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def demo(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpt_megatron.cli", "demo", "--output", str(output), "--steps", "20"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_the_whole_road_ends_in_a_report_and_is_not_walked_twice(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    ended = demo(output)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "What this shows." in ended.stderr
    report = json.loads((output / "report-tokens" / "report.json").read_text())
    page = (output / "report-tokens" / "report.html").read_text()
    assert "vanilla" in json.dumps(report)
    for arm in ("vanilla", "append"):
        assert arm in page
        run = output / "runs" / f"{arm}-{20 * 8 * 256}-seed1"
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 20
        assert len(list((run / "evaluation").glob("iter_???????.json"))) == 20
        assert (output / "models" / arm / "model.safetensors").is_file()
    assert "<svg" in page

    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.distcp")}
    assert made
    again = demo(output)
    assert again.returncode == 0, again.stderr[-4000:]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.distcp")} == made


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    ended = demo(tmp_path)
    assert ended.returncode == 1
    assert "not empty and not a demonstration's" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
