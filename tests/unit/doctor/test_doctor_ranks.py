"""Ranks compared: two real ones, one of them slowed or with another package; and what numbers of more ranks say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import ROOT, WarmRanks
from tpt_megatron.doctor.judging import bus_bandwidth, clocks_finding, speed_findings


def test_under_torchrun_the_rank_that_is_slowed_is_named(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", "tests.support.odd_rank", "slow"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*torchrun, "doctor", "--json", "--path", str(tmp_path)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=400)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)  # one rank speaks
    assert report["ranks"] == 2
    assert report["healthy"]
    named = [finding["found"] for finding in report["findings"] if finding["status"] == "warning" and finding["found"].startswith("matmul: ")]
    assert len(named) == 1
    assert named[0].startswith("matmul: rank 1 (")
    assert "rank 0" not in named[0]
    one, other = report["measurements"]["ranks"]
    assert one["matmul"] < other["matmul"]
    assert set(one["all_reduce"]) == {"1", "8", "32"}
    topics = {finding["topic"]: finding for finding in report["findings"]}
    assert topics["shared folder"]["found"] == f"{tmp_path} is one for all ranks, and so are its locks"
    assert topics["versions"]["status"] == topics["clocks"]["status"] == topics["all-reduce"]["status"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_versions_that_differ_between_ranks_are_a_problem(tmp_path: Path, warm_ranks: WarmRanks) -> None:
    info = tmp_path / "path" / "megatron_core-0.15.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    ended = warm_ranks.run(str(info.parent), "doctor", "--quick", "--path", str(tmp_path), module="tests.support.odd_rank", ranks=2)
    assert ended.returncode != 0, ended.stderr  # that of the first to end, upon which the other is killed, as torchrun does
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.split()[1] == "versions"]
    assert line.startswith("problem versions")
    assert "megatron-core differs: 0.16.1 on rank 0 (" in line
    assert "); 0.15.0 on rank 1 (" in line
    assert "all-reduce" not in ended.stdout  # --quick


def test_ranks_that_do_not_meet_are_a_finding(tmp_path: Path) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT)}
    code = (
        "import sys; from datetime import timedelta; from tpt_megatron.doctor import collectives; from tpt_megatron import cli\n"
        f"collectives.MEET_TIMEOUT = timedelta(seconds=2); sys.argv = ['tpt', 'doctor', '--quick', '--path', {str(tmp_path)!r}]; cli.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **place}, timeout=300)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "problem ranks" in ended.stdout
    assert "see that every node reaches no-such-host.invalid:1" in ended.stdout


HOSTS = ["a", "a", "b", "b"]


def measured(matmul: list[float], pairs: dict[tuple[int, int], float], all_reduce: float = 0.1) -> list[dict[str, Any]]:
    both = {**pairs, **{(other, one): time for (one, other), time in pairs.items()}}
    return [
        {"matmul": time, "all_reduce": {512: all_reduce}, "pairs": {other: seconds for (one, other), seconds in both.items() if one == rank}}
        for rank, time in enumerate(matmul)
    ]


def test_a_slow_gpu_and_a_slow_link_are_named() -> None:
    links = {(0, 1): 0.001, (2, 3): 0.001, (1, 2): 0.01, (3, 0): 0.03}
    findings = speed_findings(measured([0.02, 0.02, 0.03, 0.021], links), HOSTS, "cuda")
    said = [finding.found for finding in findings if finding.status == "warning" and finding.topic in ("stragglers", "links")]
    assert said == ["matmul: rank 2 (b) takes 30 ms, 1.5 times the median", "between machines, slow: rank 0 (a) and rank 3 (b), 3.0 times the median"]
    assert {finding.found for finding in findings if finding.topic == "links" and finding.status == "ok"} == {
        "within a machine: 2 pairs of neighbours, none slow"
    }


@pytest.mark.parametrize(("seconds", "status"), [(0.1, "ok"), (1.0, "warning")])
def test_gpus_that_speak_slowly_are_a_warning(seconds: float, status: str) -> None:
    first, *_ = speed_findings(measured([0.02] * 4, {}, all_reduce=seconds), HOSTS, "cuda")
    assert (first.topic, first.status) == ("all-reduce", status)
    assert f"512 MB {512e6 / seconds * 1.5 / 1e9:.3g} GB/s" in first.found


def test_bus_bandwidth_is_what_a_link_carries() -> None:
    assert bus_bandwidth(1e9, 1.0, 2) == 1.0
    assert bus_bandwidth(1e9, 1.0, 8) == pytest.approx(1.75)


def test_a_clock_that_is_off_is_named() -> None:
    assert clocks_finding([100.0, 100.1, 100.0, 100.0], HOSTS).status == "ok"
    assert clocks_finding([100.0, 100.1, 190.0, 190.1], ["a", "b", "c", "d"]).found.endswith(" s ahead")
    assert clocks_finding([100.0, 100.0, 70.0, 100.0], ["a", "b", "c", "d"]).found == "c is 30.0 s behind"
