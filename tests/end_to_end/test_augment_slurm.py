"""Augmentation on Slurm: a real controller and two node daemons on this machine, and the command as a user runs it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.augment_runs import DOCUMENT_PATTERN, output_of, run, write_config, write_documents
from tests.support.scripted_server import running_server
from tests.support.slurm import Cluster, running_slurm
from tpt_megatron.augment.shards import finished_shards
from tpt_megatron.storage import locate

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("slurmctld") is None, reason="Slurm is not installed (Debian: tests/support/packages.sh)"),
]
KEY = "a-key-that-nobody-may-read"
ONE_AT_A_TIME = {"concurrency": {"initial": 1, "maximum": 1}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_slurm() as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that the command runs in, so that relative paths are tried; its name has a space."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def slurm(tasks: int, **changes: Any) -> dict[str, Any]:
    return {"tasks": tasks, "time": "00:10:00", "partition": "main", "logs": "logs", "cpus_per_task": 1, "memory_per_cpu_gb": 1} | changes


def job_of(said: str) -> str:
    found = re.search(r"Slurm job (\d+): ", said)
    assert found, said
    return found.group(1)


def until(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_array_over_two_nodes_asks_once_for_each_document_and_keeps_the_key_to_itself(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_FOR_TESTS", KEY)
    write_documents(Path("in/a.jsonl"), 80)
    with running_server(reply_ms=50, document_pattern=DOCUMENT_PATTERN, api_key=KEY) as server:
        asked = {"api_key_env": "SECRET_FOR_TESTS", "concurrency": {"initial": 4, "maximum": 4}}
        # Two CPUs of four each: three workers do not fit on one node.
        config = write_config(Path("c.yaml"), "in", "out", server.url, generator=asked, shard={"documents": 5}, slurm=slurm(3, cpus_per_task=2))
        said = run(config)
        job = job_of(said)
        assert f"3 workers for 16 of 16 shards of out; logs: logs/{job}_*.out" in said
        assert cluster.wait(job) == {i: ("COMPLETED", "0:0") for i in range(3)}
        assert server.log()["documents"] == {str(i): 1 for i in range(80)}
        assert [augmented.document.id for augmented in output_of("out")] == [str(i) for i in range(80)]

        assert "out: finished before, kept; nothing was submitted" in run(config)
    assert cluster.ask("squeue", "--noheader") == ""
    assert sorted(path.name for path in Path("logs").glob("*.out")) == [f"{job}_{i}.out" for i in range(3)]
    assert len({line for i in range(3) for line in cluster.ask("scontrol", "show", "job", f"{job}_{i}").split() if line.startswith("NodeList=n")}) == 2
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"launch_script.slurm", "executor.pik"} < {path.name for path in files}
    assert "qos" not in next(Path("logs").glob("*/launch_script.slurm")).read_text()  # a cluster without accounting has none
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_cancelled_array_finishes_what_is_under_way_and_the_next_one_asks_for_the_rest_only(cluster: Cluster, folder: Path) -> None:
    write_documents(Path("in/a.jsonl"), 40)
    with running_server(reply_ms=500, document_pattern=DOCUMENT_PATTERN) as server:
        config = write_config(Path("c.yaml"), "in", "out", server.url, generator=ONE_AT_A_TIME, shard={"documents": 10}, slurm=slurm(2))
        job = job_of(run(config))
        until(lambda: server.log()["replies"] >= 2 and server.log()["under_way"] == 2)
        cluster.ask("scancel", job)
        assert cluster.wait(job) == {i: ("CANCELLED", "3:0") for i in range(2)}
        asked = server.log()["documents"]
        assert 4 <= len(asked) < 40
        assert not Path("out/manifest.json").exists()
        for i in range(2):
            assert Path(f"logs/{job}_{i}.out").read_text().rstrip().endswith("what was finished is kept, run the same command again to continue")

        server.kill()
    with running_server(reply_ms=10, document_pattern=DOCUMENT_PATTERN, port=server.port) as server:
        second = job_of(run(config))
        assert cluster.wait(second) == {i: ("COMPLETED", "0:0") for i in range(2)}
        assert server.log()["documents"] == {str(i): 1 for i in range(40) if str(i) not in asked}
    assert [augmented.document.id for augmented in output_of("out")] == [str(i) for i in range(40)]


def test_one_cancelled_task_leaves_its_shards_to_the_others(cluster: Cluster, folder: Path) -> None:
    write_documents(Path("in/a.jsonl"), 24)
    with running_server(reply_ms=200, document_pattern=DOCUMENT_PATTERN) as server:
        config = write_config(Path("c.yaml"), "in", "out", server.url, generator=ONE_AT_A_TIME, shard={"documents": 4}, slurm=slurm(2))
        job = job_of(run(config))
        until(lambda: finished_shards(locate("out")) and server.log()["under_way"] == 2)
        cluster.ask("scancel", f"{job}_1")
        states = cluster.wait(job)
        assert states[0] == ("COMPLETED", "0:0")
        assert states[1] in (("CANCELLED", "3:0"), ("CANCELLED", "0:0")), "0: what it had under way was the last of all"
        assert server.log()["documents"] == {str(i): 1 for i in range(24)}
    assert len(list(output_of("out"))) == 24


def test_workers_that_fail_are_failed_tasks_with_one_clear_line(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_documents(Path("in/a.jsonl"), 10)
    with running_server() as server:
        config = write_config(Path("c.yaml"), "in", "out", server.url, generator={"model": "another"}, shard={"documents": 5}, slurm=slurm(2))
        job = job_of(run(config))
        assert cluster.wait(job) == {i: ("FAILED", "2:0") for i in range(2)}
    for i in range(2):
        said = Path(f"logs/{job}_{i}.out").read_text()
        assert re.search(r"^tpt: .*another", said, re.MULTILINE), said
        assert "Traceback" not in said
    assert [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []


def test_a_node_that_does_not_see_the_output_says_so(cluster: Cluster, folder: Path) -> None:
    write_documents(Path("in/a.jsonl"), 3)
    (folder / "elsewhere").mkdir()
    elsewhere = slurm(1, sbatch={"chdir": str(folder / "elsewhere")})
    job = job_of(run(write_config(Path("c.yaml"), "in", "out", "http://127.0.0.1:9/v1", slurm=elsewhere)))
    assert cluster.wait(job) == {0: ("FAILED", "1:0")}
    assert "tpt: output=out: node " in Path(f"logs/{job}_0.out").read_text()
    assert not list((folder / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"sbatch": {"no-such-option": "1"}}, "unrecognized option '--no-such-option=1'"),
    ],
)
def test_what_sbatch_refuses_is_one_line_in_its_words(cluster: Cluster, folder: Path, changes: dict[str, Any], words: str) -> None:
    write_documents(Path("in/a.jsonl"), 3)
    said = run(write_config(Path("c.yaml"), "in", "out", "http://127.0.0.1:9/v1", slurm=slurm(1, **changes)), exit_code=1)
    assert len(said.splitlines()) == 1, said
    assert said.startswith("tpt: slurm: sbatch: ") and words in said
    assert not list(Path("logs").iterdir())


def test_a_task_of_an_array_submits_no_array(cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(Path("in/a.jsonl"), 3)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
    said = run(write_config(Path("c.yaml"), "in", "out", "http://127.0.0.1:9/v1", slurm=slurm(1)), exit_code=2)
    assert said.startswith("tpt: slurm: this already is a task of a Slurm array")
