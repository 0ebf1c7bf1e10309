"""Python, the extras, and whether torch, megatron-core and Transformer Engine are there, import, and fit one another.

What fits is what this package's own metadata asks for, and of Transformer Engine what megatron-core's does.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tpt_megatron.doctor.findings import Finding, ok, problem, warning
from tpt_megatron.doctor.probing import ask_python

DISTRIBUTION = "tpt-megatron"
WITHOUT_TELLING = {"dev", "all"}
"""Extras that are for working on this package, or sums of others."""
WANTED = {
    "generate": "tpt augment cannot ask models",
    "train": "tpt train, plan, convert and demo do not work",
    "evaluate": "tpt evaluate does not work",
    "report": "tpt compare writes no report",
}
"""Extras without which a part of the usual road is closed. The others are listed, and nothing more."""


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """What torch says of itself and of the GPUs that it sees; empty where it is not there or does not import."""

    version: str | None = None
    cuda: str | None = None
    architectures: tuple[str, ...] = ()
    gpus: list[dict[str, Any]] = field(default_factory=list)


ASK_TORCH = """
import json, warnings
warnings.simplefilter("ignore")
import torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": None, "architectures": [], "gpus": [], "why": ""}
if found["cuda"]:
    found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    try:
        torch.cuda.init()
        found["architectures"] = torch.cuda.get_arch_list()
        for number in range(torch.cuda.device_count()):
            found["gpus"].append({"name": torch.cuda.get_device_name(number), "capability": list(torch.cuda.get_device_capability(number))})
            try:
                torch.ones(8, device=f"cuda:{number}").sum().item()
            except RuntimeError as error:
                if "out of memory" not in str(error):  # a GPU that training has filled is no broken one
                    raise
    except Exception as error:
        found["why"] = (str(error).splitlines() or [repr(error)])[0]
print(json.dumps(found))
"""
ASK_IMPORT = "import json, warnings; warnings.simplefilter('ignore'); import {}; print(json.dumps({{}}))"


def version(name: str) -> str | None:
    """Return the version of a distribution that is installed, None where there is none. Imports nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_finding() -> Finding:
    """Return whether this Python is one that the package is for."""
    here, asked = platform.python_version(), SpecifierSet(_metadata("Requires-Python") or ">=3.11")
    if here in asked:
        return ok("Python", here)
    return problem("Python", f"{here}, and this package is for {asked}", "make an environment of one of those: python3.12 -m venv .venv")


def _metadata(key: str) -> str | None:
    try:
        return importlib.metadata.metadata(DISTRIBUTION)[key]
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None


def requirements(extra: str, of: str = DISTRIBUTION) -> Iterator[Requirement]:
    """Yield what an extra of a distribution asks for on this machine, with what its own other extras do."""
    for text in importlib.metadata.requires(of) or ():
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}) or not asked.marker.evaluate({"extra": extra}):
            continue
        if canonicalize_name(asked.name) == of:
            for other in sorted(asked.extras):
                yield from requirements(other, of)
        else:
            yield asked


def extra_findings() -> list[Finding]:
    """Return which extras are there, which are not, and which have versions that do not fit."""
    try:
        extras = [name for name in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or () if name not in WITHOUT_TELLING]
    except importlib.metadata.PackageNotFoundError:
        return [warning("extras", f"{DISTRIBUTION} is not installed, only found on the path", "pip install -e '.[all]' in its checkout")]
    there, others, findings = [], [], []
    for extra in extras:
        asked = list(requirements(extra))
        absent = [one.name for one in asked if version(one.name) is None]
        wrong = [
            f"{one.name} {here}, not {one.specifier}" for one in asked if (here := version(one.name)) and not one.specifier.contains(here, prereleases=True)
        ]
        install = f"pip install '{DISTRIBUTION}[{extra}]'"
        if wrong:
            findings.append(problem(f"extra {extra}", "; ".join(wrong), install))
        elif absent and extra in WANTED:
            findings.append(warning(f"extra {extra}", f"not installed ({', '.join(absent)}): {WANTED[extra]}", install))
        elif absent or not asked:
            others.append(extra)
        else:
            there.append(extra)
    if there:
        findings.insert(0, ok("extras", f"{', '.join(there)} installed"))
    if others:
        findings.append(ok("extras", f"{', '.join(others)} not installed", f"where wanted: pip install '{DISTRIBUTION}[{','.join(others)}]'"))
    return findings


def torch_findings() -> tuple[list[Finding], TorchBuild]:
    """Return what is to be said of torch and NCCL, and what it sees."""
    install = f"pip install '{DISTRIBUTION}[train]'"
    if version("torch") is None:
        return [warning("torch", "not installed: tpt augment and preprocess work, training and evaluating do not", install)], TorchBuild()
    answer, why = ask_python(ASK_TORCH)
    if answer is None:
        return [problem("torch", f"{version('torch')} does not import: {why}", f"{install} --force-reinstall")], TorchBuild()
    build = TorchBuild(answer["version"], answer["cuda"], tuple(answer["architectures"]), answer["gpus"])
    findings = [ok("torch", f"{build.version}, {'built for CUDA ' + build.cuda if build.cuda else 'built without CUDA'}")]
    if answer["nccl"]:
        findings.append(ok("NCCL", answer["nccl"]))
    elif build.cuda:
        findings.append(problem("NCCL", "not in this torch", "install a build of torch that has it"))
    if answer["why"]:
        findings.append(problem("torch", f"cannot use the GPU: {answer['why']}", "mend the driver, which is below, or install a torch built for it"))
    return findings, build


def megatron_finding() -> Finding:
    """Return whether megatron-core is the version that this package is written for, and imports."""
    here = version("megatron-core")
    install = f"pip install '{DISTRIBUTION}[train]'"
    try:
        pinned = [one.specifier for one in requirements("train") if canonicalize_name(one.name) == "megatron-core"]
    except importlib.metadata.PackageNotFoundError:
        pinned = []
    if here is None:
        return warning("megatron-core", "not installed: training does not work", install)
    if pinned and not pinned[0].contains(here, prereleases=True):
        return problem("megatron-core", f"{here}, and this package is written for {pinned[0]}", f"pip install 'megatron-core{pinned[0]}'")
    answer, why = ask_python(ASK_IMPORT.format("megatron.core"))
    if answer is None:
        return problem("megatron-core", f"{here} does not import: {why}", f"{install} --force-reinstall")
    return ok("megatron-core", here)


def transformer_engine_finding(build: TorchBuild) -> Finding:
    """Return whether Transformer Engine, which training on CUDA is made of, is there, fits and imports."""
    here, asked, bound = version("transformer-engine"), _asked_transformer_engine(), "Transformer Engine"
    major = (build.cuda or "13").split(".")[0]
    install = f"pip install --no-build-isolation 'transformer-engine[pytorch,core_cu{major}]{asked}'"
    if here is None:
        if build.gpus:
            return problem(bound, "not installed, and training on CUDA is made of it", install)
        return ok(bound, "not installed; only training on CUDA needs it")
    if not asked.contains(here, prereleases=True):
        return problem(bound, f"{here}, and megatron-core {version('megatron-core')} is for {asked}", install)
    answer, why = ask_python(ASK_IMPORT.format("transformer_engine.pytorch"))
    if answer is None:
        return problem(bound, f"{here} does not import beside torch {build.version}: {why}", install)
    return ok(bound, here)


def _asked_transformer_engine() -> SpecifierSet:
    """Return the versions that megatron-core is for, by its metadata."""
    if version("megatron-core") is not None:
        for text in importlib.metadata.requires("megatron-core") or ():
            asked = Requirement(text)
            if canonicalize_name(asked.name) == "transformer-engine":
                return asked.specifier
    return SpecifierSet(">=2.9.0a0,<2.12.0")  # of megatron-core 0.16.1


def apex_findings() -> list[Finding]:
    """Return a warning for a package that is called apex and is not NVIDIA's: megatron-core asks for no more than the name."""
    if find_spec("apex") is None:
        return []
    if find_spec("amp_C") is None:
        return [
            warning(
                "apex",
                "there is a package apex that is not NVIDIA's, or was built without its CUDA parts, and megatron-core takes it for that",
                "pip uninstall apex",
            )
        ]
    return [ok("apex", f"NVIDIA's, {version('apex')}")]
