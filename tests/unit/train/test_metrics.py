import math
from pathlib import Path

import orjson
import pytest

from tests.support.disks import small_disk
from tpt_megatron.errors import DataError
from tpt_megatron.train.metrics import MetricsFile, versions


def steps(path: Path) -> list[int]:
    return [orjson.loads(line)["step"] for line in path.read_bytes().splitlines()]


def test_a_resumed_run_cuts_off_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        for step in (1, 2, 3, 4):
            metrics.write({"step": step})
    with open(path, "ab") as file:
        file.write(b'{"step": 5, "lo')  # torn by a crash
    with MetricsFile(path, 2) as metrics:
        metrics.write({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_a_value_that_json_does_not_know_stays_readable(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "m.jsonl", 0) as metrics:
        metrics.write({"step": 1, "gradient_norm": math.inf, "loss_by_source": {"web": math.nan, "books": 1.5}})
    assert orjson.loads((tmp_path / "m.jsonl").read_bytes()) == {"step": 1, "gradient_norm": "inf", "loss_by_source": {"web": "nan", "books": 1.5}}


def test_a_run_can_say_what_made_it() -> None:
    assert {"torch", "megatron-core"} <= set(versions())


def test_ranks_that_keep_no_metrics_touch_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with MetricsFile(None, 3) as metrics:
        metrics.write({"step": 4})
        metrics.sync()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_no_metrics_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a step's line"):
        MetricsFile(path, 2)


def test_a_damaged_line_that_others_follow_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not valid JSON.*, and lines follow"):
        MetricsFile(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2\n{"step": 3}\n'


def test_a_disk_that_takes_a_part_of_a_line_is_an_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk, MetricsFile(disk / "metrics.jsonl", 0) as metrics:
        (disk / "else").write_bytes(bytes((1 << 20) - 4096))
        with pytest.raises(OSError, match="No space left"):
            metrics.write({"step": 1, "note": "a" * 5000})
        assert (disk / "metrics.jsonl").stat().st_size == 4096
