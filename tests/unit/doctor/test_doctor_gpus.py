"""GPUs by a stand-in for nvidia-smi that answers as its manual says: what is told of them. No GPU has been asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpt_megatron.doctor.gpus import gpu_findings
from tpt_megatron.doctor.packages import TorchBuild

SMI = """#!/bin/sh
case "$1" in
    --query-gpu=*) printf '%s' "{gpus}" ;;
    --query-remapped-rows=*) printf '%s' "{rows}" ;;
    --query-compute-apps=*) printf '%s' "{processes}" ;;
esac
exit {code}
"""
TWO = "0, GPU-a, NVIDIA H100 80GB HBM3, 580.82.07, 81559, 1, 0, 0\n1, GPU-b, NVIDIA H100 80GB HBM3, 580.82.07, 81559, {used}, {now}, {ever}\n"
BUILD = TorchBuild("2.11.0+cu130", "13.0", ("sm_80", "sm_90"), [{"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0]}] * 2)


@pytest.fixture(autouse=True)
def _all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: str, rows: str = "", processes: str = "", code: int = 0, build: TorchBuild = BUILD
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (status, topic) of what is not ok, and its words."""
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(gpus=gpus, rows=rows, processes=processes, code=code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    bad = [finding for finding in gpu_findings(build)[0] if finding.status != "ok"]
    return [(finding.status, finding.topic) for finding in bad], [finding.found for finding in bad]


def test_gpus_that_are_well_are_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path, monkeypatch, gpus=TWO.format(used=1, now=0, ever=0), rows="GPU-a, 0, 0\nGPU-b, 0, 0\n") == ([], [])


def test_errors_and_processes_are_told_by_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, said = told(
        tmp_path,
        monkeypatch,
        gpus=TWO.format(used=41000, now=3, ever=5),
        rows="GPU-a, 1, 0\nGPU-b, 0, 1\n",
        processes="GPU-b, 4711, python, 40960\n",
    )
    assert statuses == [("warning", "GPU 1"), ("problem", "GPU 1 ECC"), ("warning", "GPU 0 memory"), ("problem", "GPU 1 memory"), ("warning", "GPU 1")]
    assert said[1] == "3 uncorrected errors since the driver was loaded"
    assert said[-1] == "process 4711 (python) uses 42.9 GB"


def test_errors_of_the_past_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path, monkeypatch, gpus=TWO.format(used=1, now=0, ever=2))[0] == [("warning", "GPU 1 ECC")]


def test_ecc_that_is_not_there_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(tmp_path, monkeypatch, gpus=TWO.format(used=1, now="[N/A]", ever="[N/A]"))[0] == []


def test_a_driver_older_than_the_cuda_of_torch_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = TWO.format(used=1, now=0, ever=0).replace("580.82.07", "570.86.15")
    assert told(tmp_path, monkeypatch, gpus=old)[1] == ["570.86.15, and torch's CUDA 13.0 wants 580.65.06 at least"]
    assert told(tmp_path, monkeypatch, gpus=old, build=TorchBuild("2.8.0", "12.8", (), BUILD.gpus))[0] == []


def test_a_torch_without_cuda_beside_gpus_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, (said,) = told(tmp_path, monkeypatch, gpus=TWO.format(used=1, now=0, ever=0), build=TorchBuild("2.11.0+cpu"))
    assert statuses == [("problem", "NVIDIA driver")]
    assert said == "580.82.07, and torch 2.11.0+cpu is built without CUDA"


def test_a_gpu_that_torch_does_not_see_or_has_no_kernels_for_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = TorchBuild("2.11.0+cu130", "13.0", ("sm_80", "sm_90"), [{"name": "B200", "capability": [10, 0]}])
    said = told(tmp_path, monkeypatch, gpus=TWO.format(used=1, now=0, ever=0), build=build)[1]
    assert said == ["torch sees 1 of 2", "B200 is sm_100, and torch has kernels for sm_80, sm_90"]


def test_a_driver_that_does_not_answer_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    assert told(tmp_path, monkeypatch, gpus=why, code=9) == ([("problem", "NVIDIA driver")], [f"nvidia-smi: {why}"])


def test_a_gpu_without_a_driver_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpt_megatron.doctor import gpus

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "PCI", tmp_path / "none")
    assert [finding.status for finding in gpu_findings(TorchBuild())[0]] == ["warning"]
    device = tmp_path / "pci" / "0000:01:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    monkeypatch.setattr(gpus, "PCI", tmp_path / "pci")
    assert gpu_findings(TorchBuild())[0][0].found == "an NVIDIA GPU is in this machine, and nvidia-smi is not"
