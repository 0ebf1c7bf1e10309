"""What `tpt inspect RUN --step N` says a step saw is what the trainer reads in that step."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.token_files import write_token_files
from tpt_megatron.config.load import check_config
from tpt_megatron.config.train import TrainConfig
from tpt_megatron.datasets import open_dataset
from tpt_megatron.errors import DataError, UsageError
from tpt_megatron.inspection.step import print_step
from tpt_megatron.train.data import open_run_data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run over two datasets, as run.json describes it."""
    for name, first in (("one", 0), ("two", 100)):
        write_token_files(tmp_path / name, [([first + i] * (i % 5 + 1), [first + i] * 2, f"source {name}") for i in range(30)], sidecars=name == "one")
    config: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_heads": 1, "num_query_groups": 1},
        "data": {"train": [{"path": str(tmp_path / name), "weight": 1} for name in ("one", "two")], "sequence_length": 12},
        "optimizer": {"learning_rate": 1e-3},
        "steps": 50,
        "global_batch_sequences": 4,
    }
    checked = check_config(TrainConfig, config, "test")
    (tmp_path / "run").mkdir()
    described = {"config": checked.model_dump(mode="json"), "sequences": open_run_data(checked).train.stream.fingerprint()}
    (tmp_path / "run/run.json").write_text(json.dumps(described))
    return tmp_path / "run"


def shown(run: Path, step: int) -> str:
    out = io.StringIO()
    print_step(run, step, Console(file=out, width=160))
    return out.getvalue()


def test_the_tokens_of_the_documents_shown_are_those_that_the_step_reads(run: Path) -> None:
    config = TrainConfig.model_validate(json.loads((run / "run.json").read_text())["config"])
    tokens = open_run_data(config).train.micro_batch(range(8, 12)).tokens
    lines = [line.split() for line in shown(run, 3).splitlines()[1:] if "/" in line]
    for row, sequence in zip(tokens, range(8, 12), strict=True):
        read: list[int] = []
        for path, number, document, first, count, length, *name in lines:
            if int(number) == sequence:
                dataset = open_dataset(path)
                begin = dataset.begin(int(document)) + int(first)
                read += dataset.tokens[begin : begin + int(count)].tolist()
                assert int(length) == dataset.lengths[int(document)]
                assert name == ([document, "source", "one"] if path.endswith("one") else ["-", "(none)"])
        assert read[:-1] == row.tolist()


def test_a_run_that_went_back_shows_what_it_reads_then_and_after(run: Path) -> None:
    plain = shown(run, 3), shown(run, 7)
    lines = [{"step": 2, "first_sequence": 4}, {"step": 3, "first_sequence": 8 + 4 * 4}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "fir')  # torn by a crash
    assert shown(run, 2).startswith("step 2: sequences 4 to 7")
    assert shown(run, 3).split("\n", 1)[1] == plain[1].split("\n", 1)[1]
    assert shown(run, 5).startswith("step 5: sequences 32 to 35")
    (run / "metrics.jsonl").write_text('{"step": 3}\n')
    assert shown(run, 3) == plain[0]


def test_what_is_no_step_of_a_run_or_no_longer_its_data_is_refused(run: Path, tmp_path: Path) -> None:
    for step in (0, 51):
        with pytest.raises(UsageError, match="has the steps 1 to 50"):
            shown(run, step)
    with pytest.raises(UsageError, match="not a run folder"):
        shown(tmp_path, 1)
    write_token_files(tmp_path / "two", [([7], [7], None)] * 40, sidecars=False)
    with pytest.raises(DataError, match="are not the ones it read"):
        shown(run, 1)
    (run / "run.json").write_text('{"config": {}, "sequences": {}}')
    with pytest.raises(DataError, match=r"run\.json: its config has \d+ key"):
        shown(run, 1)
