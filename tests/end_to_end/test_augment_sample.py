"""Looking before paying, as a user does it: `--sample`, `--estimate`, `--report`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.augment_runs import run, write_config, write_documents
from tests.support.scripted_server import running_server


def test_sample_then_estimate_then_run_then_report(tmp_path: Path) -> None:
    write_documents(tmp_path / "in/a.jsonl", 400)
    write_documents(tmp_path / "in/b.jsonl", 100)
    output = tmp_path / "out"
    cost = {"tokens_per_second_per_gpu": 1000, "gpus": 2, "per_gpu_hour": 2.5, "overhead": 2.0}
    with running_server(reply_ms=2) as server:
        config = write_config(tmp_path / "c.yaml", str(tmp_path / "in"), str(output), server.url, cost=cost)
        assert f"sample: {output}/sample/sample.html" in run(config, "--sample", "20")
        assert server.log()["requests"] == 20
        page = (output / "sample/sample.html").read_text()
        sampled = [json.loads(line) for line in (output / "sample/sample.jsonl").read_text().splitlines()]
        assert len(sampled) == 20
        assert all(record["text"] in page and record["thoughts"][0]["text"] in page for record in sampled)
        assert not (output / "shards").exists()

        said = run(config, "--estimate")
        statistics = json.loads((output / "sample/statistics.json").read_text())["statistics"]
        mean = statistics["generated_tokens"] / 20
        assert "500" in said
        hours = 500 * mean / 1000 / 3600 * 2.0
        assert f"{hours:.3g}"[:4] in said, said
        assert server.log()["requests"] == 20

        # Another prompt is another sample: the first is no longer reckoned with, and says so.
        said = run(config, "prompts=focus", "--estimate")
        assert "was made with other settings" in said

        run(config)
        assert server.log()["requests"] == 520
        assert "report: " in run(config, "--report")
    assert "<svg" in (output / "report.html").read_text()


def test_an_estimate_without_a_sample_says_what_is_missing(tmp_path: Path) -> None:
    write_documents(tmp_path / "in.jsonl", 50)
    config = write_config(tmp_path / "c.yaml", str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "http://127.0.0.1:9/v1")
    said = run(config, "--estimate")
    assert "50" in said
    assert "tokens_per_second_per_gpu" in said
    assert "--sample" in said
    assert "one of --sample, --estimate and --report" in run(config, "--estimate", "--sample", "3", exit_code=2)
    assert "no such file" in run(config, f"output={tmp_path / 'nothing'}", "--report", exit_code=1)
