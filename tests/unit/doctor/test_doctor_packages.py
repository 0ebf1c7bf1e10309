"""Packages that are missing or of the wrong version: real environments made of links, and metadata laid on the path."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tpt_megatron.doctor.gpus import _has_kernels
from tpt_megatron.doctor.packages import TorchBuild, apex_findings, megatron_finding, torch_findings, transformer_engine_finding

ROOT = Path(__file__).parents[3]


def fake(folder: Path, name: str, version: str) -> Path:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def base_install(folder: Path) -> Path:
    """Make a folder with links to what `pip install tpt-megatron` would install, and nothing else."""
    wanted, done = ["tpt-megatron"], set()
    while wanted:
        name = wanted.pop()
        found = importlib.metadata.distribution(name)
        done.add(name)
        for file in found.files or ():
            top = file.parts[0]
            if top != ".." and not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))  # type: ignore[arg-type]
        asked = [Requirement(text) for text in found.requires or ()]
        wanted += [one.name for one in asked if (one.marker is None or one.marker.evaluate({"extra": ""})) and one.name not in done]
    return folder


def doctor(*arguments: str, packages: Path, interpreter: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{packages}:{ROOT}"}
    command = [sys.executable, *interpreter, "-m", "tpt_megatron.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=packages)


def by_topic(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["topic"]: finding for finding in report["findings"]}


def test_a_base_install_has_findings_and_no_traceback(tmp_path: Path) -> None:
    site = base_install(tmp_path)
    assert not (site / "torch").exists()
    ended = doctor("--quick", "--json", packages=site, interpreter=("-S",))
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    found = by_topic(report)
    assert found["torch"]["status"] == found["megatron-core"]["status"] == "warning"
    assert found["extra train"]["do"] == "pip install 'tpt-megatron[train]'"
    assert "torch, megatron-core" in found["extra train"]["found"]
    assert report["healthy"] is (ended.returncode == 0) is True


def test_a_base_install_under_many_ranks_is_told_that_they_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    ended = doctor("--quick", "--json", packages=base_install(tmp_path), interpreter=("-S",))
    assert ended.returncode == 1
    assert "without torch ranks cannot meet" in by_topic(json.loads(ended.stdout))["ranks"]["found"]


def test_another_megatron_is_a_problem_with_its_mending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(fake(tmp_path, "megatron-core", "0.15.0"))
    finding = megatron_finding()
    assert finding.status == "problem"
    assert finding.found == "0.15.0, and this package is written for ==0.16.1"
    assert finding.do == "pip install 'megatron-core==0.16.1'"


def test_a_torch_that_does_not_import_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "torch", "9.9")
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,), build = torch_findings()
    assert finding.status == "problem"
    assert finding.found == "9.9 does not import: OSError: libcudart.so.13: cannot open shared object file"
    assert build == TorchBuild()


def test_a_torch_that_crashes_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "torch", "9.9")
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,), _ = torch_findings()
    assert finding.found == "9.9 does not import: killed by SIGSEGV"


TORCH_ON_A_GPU = """
class version: cuda = "13.0"
__version__ = "9.9"
class cuda:
    class nccl: version = staticmethod(lambda: (2, 30, 4))
    init = staticmethod(lambda: None)
    get_arch_list = staticmethod(lambda: ["sm_90"])
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda number: "H100")
    get_device_capability = staticmethod(lambda number: (9, 0))
def ones(*_, device): raise RuntimeError("CUDA error: {}")
"""


@pytest.mark.parametrize(("said", "statuses"), [("out of memory", ["ok", "ok"]), ("unspecified launch failure", ["ok", "ok", "problem"])])
def test_a_gpu_whose_memory_is_full_is_not_broken(said: str, statuses: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are healthy while they train."""
    fake(tmp_path, "torch", "9.9")
    (tmp_path / "torch.py").write_text(TORCH_ON_A_GPU.format(said))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    findings, build = torch_findings()
    assert [finding.status for finding in findings] == statuses
    assert [gpu["name"] for gpu in build.gpus] == ["H100"]


H100 = TorchBuild("2.11.0+cu130", "13.0", ("sm_90",), [{"name": "H100", "capability": [9, 0]}])


def test_transformer_engine_is_wanted_where_there_is_a_gpu() -> None:
    assert transformer_engine_finding(TorchBuild()).status == "ok"
    missing = transformer_engine_finding(H100)
    assert missing.status == "problem"
    assert "transformer-engine[pytorch,core_cu13]<2.12.0,>=2.9.0a0" in missing.do


def test_a_transformer_engine_that_megatron_core_is_not_for_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(fake(tmp_path, "transformer_engine", "2.20.2"))
    finding = transformer_engine_finding(H100)
    assert finding.status == "problem"
    assert finding.found == "2.20.2, and megatron-core 0.16.1 is for <2.12.0,>=2.9.0a0"


def test_a_transformer_engine_that_does_not_import_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(fake(tmp_path, "transformer_engine", "2.11.0"))
    finding = transformer_engine_finding(H100)
    assert finding.status == "problem"
    assert finding.found.startswith("2.11.0 does not import beside torch 2.11.0+cu130: ModuleNotFoundError")


def test_a_package_that_is_only_called_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "apex", raising=False)  # which mcore, once imported, hides
    assert apex_findings() == []
    (tmp_path / "apex.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = apex_findings()
    assert (finding.status, finding.do) == ("warning", "pip uninstall apex")


@pytest.mark.parametrize(
    ("built", "chip", "has"),
    [
        (("sm_80", "sm_90"), (9, 0), True),
        (("sm_80", "sm_86"), (8, 9), True),
        (("sm_86",), (8, 0), False),
        (("sm_90a",), (9, 0), True),
        (("sm_80", "sm_90"), (10, 0), False),
        (("sm_80", "compute_90"), (12, 0), True),
        (("sm_100", "sm_120"), (9, 0), False),
    ],
)
def test_binaries_serve_their_major_version_and_ptx_all_later_ones(built: tuple[str, ...], chip: tuple[int, int], has: bool) -> None:
    assert _has_kernels(built, *chip) is has
