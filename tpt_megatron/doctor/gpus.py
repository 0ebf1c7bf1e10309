"""The NVIDIA driver, and every GPU's state, as nvidia-smi tells them. Written by its manual: no GPU has run it."""

from __future__ import annotations

import os
from pathlib import Path

from packaging.version import InvalidVersion, Version

from tpt_megatron.doctor.findings import Finding, in_bytes, ok, problem, warning
from tpt_megatron.doctor.packages import TorchBuild
from tpt_megatron.doctor.probing import ask_program

OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""By CUDA's major version, on Linux: NVIDIA's table of minor version compatibility."""
PCI = Path("/sys/bus/pci/devices")
ECC = ("ecc.errors.uncorrected.volatile.total", "ecc.errors.uncorrected.aggregate.total")
FIELDS = ("index", "uuid", "name", "driver_version", "memory.total", "memory.used", *ECC)
MIB = 2**20


def gpu_findings(build: TorchBuild) -> tuple[list[Finding], int]:
    """Return what is to be said of driver and GPUs, and how many GPUs there are. build: what torch sees."""
    said, why = _query("gpu", FIELDS)
    if said is None:
        return [_without_answer(why)], 0
    if not said:
        return [
            problem("NVIDIA driver", "there, and it shows no GPU", "look at the kernel's log: dmesg | grep -i nvrm; in a container start it with --gpus all")
        ], 0
    findings = [_driver(said[0]["driver_version"], build)]
    numbers = {row["uuid"]: row["index"] for row in said}
    for row in said:
        findings += [_memory(row), *_errors(row)]
    findings += [*_remapped(numbers), *_processes(numbers), *_seen_by_torch(said, build)]
    return findings, len(said)


def _without_answer(why: str) -> Finding:
    if why == "not found" and not _on_the_bus():
        return warning("GPUs", "none: everything runs on the CPU", "train on GPUs what is more than a trial; tpt augment asks servers elsewhere")
    found = "an NVIDIA GPU is in this machine, and nvidia-smi is not" if why == "not found" else f"nvidia-smi: {why}"
    return problem(
        "NVIDIA driver",
        found,
        "install NVIDIA's driver, or load it: modprobe nvidia; in a container start it with --gpus all; if it hangs, restart the machine",
    )


def _on_the_bus() -> bool:
    """Say whether a display or 3D controller of NVIDIA's is on the PCI bus."""

    def is_one(device: Path) -> bool:
        try:
            return (device / "vendor").read_text().strip() == "0x10de" and (device / "class").read_text().startswith("0x03")
        except OSError:
            return False

    return PCI.is_dir() and any(is_one(device) for device in PCI.iterdir())


def _query(what: str, fields: tuple[str, ...]) -> tuple[list[dict[str, str]] | None, str]:
    """Return a row for each line of nvidia-smi's answer, or None and why there is none."""
    answer, why = ask_program("nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits")
    if answer is None:
        return None, why
    lines = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [dict(zip(fields, cells, strict=True)) for cells in lines if len(cells) == len(fields)], ""


def _driver(driver: str, build: TorchBuild) -> Finding:
    if build.version and not build.cuda:
        return problem(
            "NVIDIA driver",
            f"{driver}, and torch {build.version} is built without CUDA",
            "install torch's build for CUDA: pip uninstall torch, then pip install torch",
        )
    oldest = OLDEST_DRIVER.get(int(build.cuda.split(".")[0])) if build.cuda else None
    try:
        too_old = oldest is not None and Version(driver) < Version(oldest)
    except InvalidVersion:
        too_old = False
    if too_old:
        found = f"{driver}, and torch's CUDA {build.cuda} wants {oldest} at least"
        return problem("NVIDIA driver", found, "install a newer driver, or a torch that is built for an older CUDA")
    return ok("NVIDIA driver", f"{driver}{f', new enough for CUDA {build.cuda}' if oldest else ''}")


def _memory(row: dict[str, str]) -> Finding:
    total, used = (int(row[name]) * MIB if row[name].isdigit() else 0 for name in ("memory.total", "memory.used"))
    found = f"{row['name']}, {in_bytes(total - used)} free of {in_bytes(total)}"
    if used > 0.05 * total:
        return warning(f"GPU {row['index']}", found, "end what uses its memory: nvidia-smi shows it")
    return ok(f"GPU {row['index']}", found)


def _errors(row: dict[str, str]) -> list[Finding]:
    now, ever = (int(row[name]) if row[name].isdigit() else None for name in ECC)
    topic = f"GPU {row['index']} ECC"
    if now is None and ever is None:
        return [ok(topic, "off, or not there")]
    if now:
        return [
            problem(
                topic,
                f"{now} uncorrected errors since the driver was loaded",
                f"stop using it, then: nvidia-smi --gpu-reset -i {row['index']}; if they come again, have it replaced",
            )
        ]
    if ever:
        return [warning(topic, f"no uncorrected errors since the driver was loaded, {ever} in its life", "watch it: nvidia-smi -q -d ECC,ROW_REMAPPER")]
    return [ok(topic, "no uncorrected errors")]


def _remapped(numbers: dict[str, str]) -> list[Finding]:
    """Rows of memory that wait to be replaced by spare ones, which GPUs since the A100 do."""
    rows, _ = _query("remapped-rows", ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure"))
    findings = []
    for row in rows or ():
        topic = f"GPU {numbers.get(row['gpu_uuid'], '?')} memory"
        if row["remapped_rows.failure"] in ("1", "Yes"):
            findings.append(problem(topic, "a row of memory could not be replaced by a spare one", "have the GPU replaced"))
        elif row["remapped_rows.pending"] in ("1", "Yes"):
            findings.append(warning(topic, "rows of memory wait to be replaced", "restart the machine, or reset the GPU, when nothing runs there"))
    return findings


def _processes(numbers: dict[str, str]) -> list[Finding]:
    rows, _ = _query("compute-apps", ("gpu_uuid", "pid", "process_name", "used_memory"))
    findings = []
    for row in rows or ():
        if row["pid"] == str(os.getpid()):
            continue
        used = in_bytes(int(row["used_memory"]) * MIB) if row["used_memory"].isdigit() else "memory"
        found = f"process {row['pid']} ({row['process_name']}) uses {used}"
        findings.append(warning(f"GPU {numbers.get(row['gpu_uuid'], '?')}", found, f"wait for its end, or if it is yours and left over: kill {row['pid']}"))
    return findings


def _seen_by_torch(said: list[dict[str, str]], build: TorchBuild) -> list[Finding]:
    findings = []
    if build.cuda and "CUDA_VISIBLE_DEVICES" not in os.environ and len(build.gpus) < len(said):
        findings.append(
            problem("GPUs", f"torch sees {len(build.gpus)} of {len(said)}", "see what torch says above; restart the machine if a GPU has fallen off the bus")
        )
    for number, gpu in enumerate(build.gpus):
        major, minor = gpu["capability"]
        if build.architectures and not _has_kernels(build.architectures, major, minor):
            found = f"{gpu['name']} is sm_{major}{minor}, and torch has kernels for {', '.join(build.architectures)}"
            findings.append(problem(f"GPU {number}", found, "install a torch that is built for this GPU"))
    return findings


def _has_kernels(architectures: tuple[str, ...], major: int, minor: int) -> bool:
    """Binaries serve chips of the same major version and no lower minor one; PTX (compute_) serves all later chips."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdigit():
            continue
        other = (int(digits[:-1]), int(digits[-1]))
        if (kind == "compute" and other <= (major, minor)) or (kind == "sm" and other[0] == major and other[1] <= minor):
            return True
    return False
