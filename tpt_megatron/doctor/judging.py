"""What the measurements of ranks say: how fast they speak, and which of them is slow. Pure functions of what all ranks measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tpt_megatron.doctor.findings import Finding, listed, ok, problem, warning

SLOWER = {"cuda": 1.2, "cpu": 1.5}
"""How many times the median makes a rank slow: equal GPUs agree within some percent, ranks that share processors do not."""
SLOW_BUS = {1: 10.0, 2: 5.0}
"""GB/s of bus bandwidth on GPUs below which something is not as it should be: on one node (slower than PCIe), and across nodes."""
CLOCKS_APART_S = 2.0


def bus_bandwidth(size: float, seconds: float, ranks: int) -> float:
    """Return GB/s of an all-reduce as NCCL's tests count them: what every link must carry, whatever the number of ranks."""
    return size / seconds * 2 * (ranks - 1) / ranks / 1e9


def name(rank: int, hosts: Sequence[str]) -> str:
    """Return a rank with its host."""
    return f"rank {rank} ({hosts[rank]})"


def versions_finding(versions: Sequence[dict[str, str]], hosts: Sequence[str]) -> list[Finding]:
    """Return which packages' versions are not the same on every rank."""
    findings = []
    for package in dict.fromkeys(package for here in versions for package in here):
        ranks: dict[str, list[str]] = {}
        for rank, here in enumerate(versions):
            ranks.setdefault(here.get(package, "not installed"), []).append(name(rank, hosts))
        if len(ranks) > 1:
            usual = max(ranks, key=lambda version: len(ranks[version]))
            told = "; ".join(f"{version} on {listed(named)}" for version, named in ranks.items())
            findings.append(problem("versions", f"{package} differs: {told}", f"install the same everywhere, as in {usual}: one image, or one constraints.txt"))
    return findings or [ok("versions", f"the same on all {len(hosts)} ranks")]


def clocks_finding(clocks: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Return whether machines agree on the time."""
    usual = statistics.median_low(clocks)
    wrong = max(range(len(clocks)), key=lambda rank: abs(clocks[rank] - usual))
    apart = clocks[wrong] - usual
    if abs(apart) > CLOCKS_APART_S:
        return warning(
            "clocks", f"{hosts[wrong]} is {abs(apart):.1f} s {'ahead' if apart > 0 else 'behind'}", "set the clocks by NTP: timedatectl set-ntp true"
        )
    return ok("clocks", "all agree within 2 s")


def speed_findings(measured: Sequence[dict[str, Any]], hosts: Sequence[str], kind: str) -> list[Finding]:
    """Return bandwidth, and stragglers. measured: every rank's, in their order."""
    ranks, backend = len(measured), {"cuda": "NCCL", "cpu": "gloo"}[kind]
    sizes = list(measured[0]["all_reduce"])
    speeds = [bus_bandwidth(size * 1e6, max(one["all_reduce"][size] for one in measured), ranks) for size in sizes]
    told = ", ".join(f"{size} MB {speed:.3g} GB/s" for size, speed in zip(sizes, speeds, strict=True))
    found, bound = f"{ranks} ranks over {backend}, bus bandwidth: {told}", SLOW_BUS[min(len(set(hosts)), 2)]
    if kind == "cuda" and max(speeds) < bound:
        findings = [
            warning(
                "all-reduce",
                f"{found}; {bound:g} GB/s or more were expected",
                "run with NCCL_DEBUG=INFO and see which transport it takes: P2P, SHM, NET/IB or NET/Socket",
            )
        ]
    else:
        findings = [ok("all-reduce", found)]
    findings += _slow_ranks("matmul", [one["matmul"] for one in measured], hosts, kind)
    findings += _slow_ranks(f"all-reduce of {sizes[-1]} MB", [one["all_reduce"][sizes[-1]] for one in measured], hosts, kind)
    return findings + _slow_pairs(measured, hosts, kind)


def _slow_ranks(what: str, seconds: Sequence[float], hosts: Sequence[str], kind: str) -> list[Finding]:
    usual = statistics.median_low(seconds)  # of two the faster
    slow = [rank for rank, time in enumerate(seconds) if time > SLOWER[kind] * usual]
    told = [f"{name(rank, hosts)} takes {1e3 * seconds[rank]:.3g} ms, {seconds[rank] / usual:.1f} times the median" for rank in slow]
    if slow:
        do = (
            "on that GPU see nvidia-smi -q -d PERFORMANCE,TEMPERATURE,CLOCK; else leave it out"
            if kind == "cuda"
            else "see what else runs there: top; else leave it out"
        )
        return [warning("stragglers", f"{what}: {listed(told)}", do)]
    return [ok("stragglers", f"none in {what}: {1e3 * min(seconds):.3g} to {1e3 * max(seconds):.3g} ms a rank")]


def _slow_pairs(measured: Sequence[dict[str, Any]], hosts: Sequence[str], kind: str) -> list[Finding]:
    """Compare neighbours' exchanges, those within a machine and those between machines apart: an all-reduce is as slow for all as its slowest link."""
    pairs = {(rank, other): time for rank, one in enumerate(measured) for other, time in one["pairs"].items() if rank < other}
    findings = []
    for within in (True, False):
        alike = {pair: time for pair, time in pairs.items() if (hosts[pair[0]] == hosts[pair[1]]) == within}
        if len(alike) < 2:
            continue
        usual = statistics.median_low(alike.values())
        slow = [
            f"{name(one, hosts)} and {name(other, hosts)}, {time / usual:.1f} times the median"
            for (one, other), time in alike.items()
            if time > SLOWER[kind] * usual
        ]
        where = "within a machine" if within else "between machines"
        if slow:
            findings.append(
                warning(
                    "links", f"{where}, slow: {listed(slow)}", "what is in two slow pairs is slow itself: see its network adapter and cable (ibstat, ethtool)"
                )
            )
        else:
            findings.append(ok("links", f"{where}: {len(alike)} pairs of neighbours, none slow"))
    return findings
