"""Environment variables that change how training runs, or whether it does."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from tpt_megatron.doctor.findings import Finding, ok, warning
from tpt_megatron.doctor.machine import local_ranks, usable_processors

SLOW = {
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs of one machine do not speak to one another directly",
    "NCCL_SHM_DISABLE": "processes of one machine speak through the network",
    "NCCL_IB_DISABLE": "InfiniBand is not used",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "every tensor is allocated by the driver",
    "TORCH_DISTRIBUTED_DEBUG": "collective operations are checked on every call",
}
"""Variables for debugging, and what each costs while it is set."""
SHOWN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def variable_findings(environment: Mapping[str, str], gpus: int) -> list[Finding]:
    """Return what the environment says. gpus: how many the driver shows."""
    relevant = {
        name: value for name, value in sorted(environment.items()) if name in SHOWN or name in SLOW or name.startswith(("NCCL_", "TORCH_NCCL_", "NVTE_"))
    }
    said = [*_slowing(relevant), *_connections(relevant), *_interfaces(relevant), *_threads(relevant)]
    if gpus and relevant.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        said.append(warning("environment", f"CUDA_VISIBLE_DEVICES={relevant['CUDA_VISIBLE_DEVICES']!r} hides all {gpus} GPU(s)", "unset CUDA_VISIBLE_DEVICES"))
    shown = ", ".join(f"{name}={value}" for name, value in relevant.items())
    return [*said, ok("environment", shown or "nothing set that changes training")]


def _slowing(relevant: Mapping[str, str]) -> list[Finding]:
    off = ("", "0", "OFF", "INFO")
    return [
        warning("environment", f"{name}={relevant[name]}: {cost}", f"unset {name}, unless you are looking for a fault")
        for name, cost in SLOW.items()
        if relevant.get(name, "") not in off
    ]


def _connections(relevant: Mapping[str, str]) -> list[Finding]:
    value = relevant.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if value == "1":
        return []  # the trainer's own default
    found = f"CUDA_DEVICE_MAX_CONNECTIONS={value}: communication of tensor and context parallelism may not overlap with computation"
    return [warning("environment", found, "unset CUDA_DEVICE_MAX_CONNECTIONS; tpt train then sets 1")]


def _interfaces(relevant: Mapping[str, str]) -> list[Finding]:
    """NCCL_SOCKET_IFNAME is a list of prefixes, of names after `=`, or of what not to take after `^`."""
    value = relevant.get("NCCL_SOCKET_IFNAME", "")
    if not value or value.startswith("^"):
        return []
    exact, wanted = value.startswith("="), [name.split(":")[0] for name in value.lstrip("=").split(",")]
    here = sorted(psutil.net_if_addrs())
    if any(name == given or (not exact and name.startswith(given)) for name in here for given in wanted):
        return []
    return [warning("environment", f"NCCL_SOCKET_IFNAME={value} names no network interface of this machine", f"unset it, or name one of {', '.join(here)}")]


def _threads(relevant: Mapping[str, str]) -> list[Finding]:
    value, ranks, processors = relevant.get("OMP_NUM_THREADS", ""), local_ranks(), usable_processors()
    if not value.isdigit() or int(value) * ranks <= processors:
        return []
    found = f"OMP_NUM_THREADS={value} for {ranks} rank(s) on {processors:g} processor(s)"
    return [warning("environment", found, f"export OMP_NUM_THREADS={max(1, int(processors // ranks))}")] if int(value) > 1 else []
