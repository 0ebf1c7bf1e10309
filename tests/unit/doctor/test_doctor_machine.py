"""Limits that are low, variables that are wrong, disks that are full."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.disks import small_disk
from tpt_megatron.doctor.disk import disk_findings
from tpt_megatron.doctor.findings import Finding, merge_hosts, ok, problem
from tpt_megatron.doctor.machine import _shared_memory, usable_processors
from tpt_megatron.doctor.variables import variable_findings


def findings_under(preparation: str, prefix: tuple[str, ...] = ()) -> dict[str, tuple[str, str, str]]:
    """Examine the machine in a process that is prepared first; return status, finding and advice by topic."""
    code = (
        f"import os, resource; {preparation}\n"
        "from tpt_megatron.doctor.machine import machine_findings\n"
        "print(repr({one.topic: (one.status, one.found, one.do) for one in machine_findings()}))"
    )
    ended = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = eval(ended.stdout)
    assert isinstance(found, dict)
    return found


def test_a_folder_that_cannot_be_looked_for_is_a_problem_and_no_traceback() -> None:
    """A name that is too long stands here for a folder above it that is closed to this user: root finds none."""
    (finding,) = disk_findings(Path("a" * 300), quick=True)
    assert finding.status == "problem" and finding.found.endswith("a: File name too long")


def test_few_open_files_are_a_warning_and_how_to_raise_them() -> None:
    assert findings_under("resource.setrlimit(resource.RLIMIT_NOFILE, (5000, 5000))")["open files"][0] == "ok"
    status, found, do = findings_under("resource.setrlimit(resource.RLIMIT_NOFILE, (256, 8000))")["open files"]
    assert (status, found, do) == ("warning", "at most 256 (RLIMIT_NOFILE)", "ulimit -n 8000")
    status, _, do = findings_under("resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))")["open files"]
    assert status == "warning"
    assert "limits.conf" in do  # more than its hard limit nobody but root gives it


def test_locked_memory_says_what_it_is() -> None:
    status, found, _ = findings_under("resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))")["locked memory"]
    assert found.startswith("at most 65.5 kB")
    assert status == ("warning" if os.path.isdir("/sys/class/infiniband") and os.listdir("/sys/class/infiniband") else "ok")


def test_fewer_processors_than_ranks_are_a_warning() -> None:
    pin = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.environ['LOCAL_WORLD_SIZE'] = "
    assert findings_under(f"{pin}'1'")["processors"][0] == "ok"
    status, found, _ = findings_under(f"{pin}'2'")["processors"]
    assert status == "warning"
    assert found.startswith("1 of ") or found.startswith("1 for")


def test_a_small_shared_memory_is_a_warning(tmp_path: Path) -> None:
    with small_disk(tmp_path / "shm", 64) as shm:
        (finding,) = _shared_memory(shm)
    assert finding.status == "warning"
    assert "--shm-size=16g" in finding.do


def test_a_clock_that_is_before_the_install_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    from tpt_megatron.doctor import machine

    assert machine._clock().status == "ok"
    monkeypatch.setattr(machine.time, "time", lambda: 0.0)
    assert machine._clock().found == "1970-01-01 00:00:00 UTC, before this package was installed"


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    findings = {finding.topic: finding for finding in disk_findings(tmp_path, quick=False)}
    assert list(findings) == ["disk", "disk clock", "atomic rename", "hard links", "file locks", "disk speed"]
    assert "/s written with fsync" in findings["disk speed"].found
    assert {findings[topic].status for topic in ("atomic rename", "hard links", "file locks", "disk clock")} == {"ok"}
    assert list(tmp_path.iterdir()) == []
    assert "disk speed" not in {finding.topic for finding in disk_findings(tmp_path, quick=True)}


def test_a_disk_that_is_full_is_a_problem(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        with open(disk / "filler", "wb", buffering=0) as file, suppress(OSError):
            while file.write(b"0" * 4096):
                pass
        findings = disk_findings(disk, quick=False)
        assert [path.name for path in disk.iterdir()] == ["filler"]
    assert findings[0].status == "problem"
    assert "0 bytes free of 1.0 MB" in findings[0].found
    assert Finding("disk", "problem", f"{disk}: No space left on device", "make room there, or give another --path") in findings


def test_a_disk_without_room_for_files_is_a_problem(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8) as disk:
        subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(disk)], check=True)
        found = disk_findings(disk, quick=True)[0].found
    assert "more files only" in found


def test_a_folder_that_is_not_there_or_closed_is_a_problem(tmp_path: Path) -> None:
    (absent,) = disk_findings(tmp_path / "absent", quick=True)
    assert (absent.status, absent.do) == ("problem", f"mkdir -p {tmp_path / 'absent'}, or give another --path")
    (tmp_path / "file").touch()
    (a_file,) = disk_findings(tmp_path / "file", quick=True)
    assert (a_file.found, a_file.do) == (f"{tmp_path / 'file'}: not a folder", "give --path the folder that runs and data are to be in")
    (address,) = disk_findings(Path("s3://bucket/x"), quick=True)
    assert address.found == "s3:/bucket/x: an address, and not a folder of this machine"
    if sys.platform == "linux":
        assert disk_findings(Path("/proc"), quick=True)[-1].status == "problem"


def test_a_disk_that_can_only_be_read_is_a_problem(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        found = disk_findings(disk, quick=True)
    assert Finding("disk", "problem", f"{disk}: Read-only file system", "mount it so that it can be written to, or give another --path") in found


@pytest.mark.parametrize(
    ("variables", "says", "do"),
    [
        ({"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE=1: GPUs of one machine do not speak to one another directly", "unset NCCL_P2P_DISABLE, unless"),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "CUDA_DEVICE_MAX_CONNECTIONS=8:", "unset CUDA_DEVICE_MAX_CONNECTIONS"),
        ({"NCCL_SOCKET_IFNAME": "=nosuch0,nosuch1"}, "names no network interface of this machine", "lo"),
        ({"OMP_NUM_THREADS": "4096"}, "OMP_NUM_THREADS=4096 for 1 rank(s)", f"export OMP_NUM_THREADS={int(usable_processors())}"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "hides all 8 GPU(s)", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_variables_that_slow_or_break_training_are_warnings(variables: dict[str, str], says: str, do: str) -> None:
    first, *_ = variable_findings(variables, gpus=8)
    assert first.status == "warning"
    assert says in first.found
    assert do in first.do


def test_variables_as_they_should_be_are_shown_and_nothing_more() -> None:
    (shown,) = variable_findings({"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "0", "HOME": "/root"}, gpus=0)
    assert shown == ok("environment", "CUDA_DEVICE_MAX_CONNECTIONS=1, NCCL_P2P_DISABLE=0, NCCL_SOCKET_IFNAME=lo")


def test_what_hosts_share_is_one_line() -> None:
    same, full = ok("torch", "2.11"), problem("disk", "full", "make room")
    merged = merge_hosts([("a", same), ("a", ok("disk", "free")), ("b", same), ("b", full)])
    assert [(finding.topic, finding.where) for finding in merged] == [("torch", "a, b"), ("disk", "a"), ("disk", "b")]
