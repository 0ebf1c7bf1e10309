"""One line of what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found about a topic. `do`: what mends it, a command where there is one. `where`: hosts, in a job of several ranks."""

    topic: str
    status: Status
    found: str
    do: str = ""
    where: str = ""


def ok(topic: str, found: str, do: str = "") -> Finding:
    """Return a finding that nothing needs to be done about."""
    return Finding(topic, "ok", found, do)


def warning(topic: str, found: str, do: str) -> Finding:
    """Return a finding with which something is slow, dangerous or not possible, and other things are."""
    return Finding(topic, "warning", found, do)


def problem(topic: str, found: str, do: str) -> Finding:
    """Return a finding with which this machine does not work."""
    return Finding(topic, "problem", found, do)


def healthy(findings: Iterable[Finding]) -> bool:
    """Say whether none is a problem."""
    return all(finding.status != "problem" for finding in findings)


def as_record(finding: Finding) -> dict[str, Any]:
    """Return the finding as JSON has it."""
    return dataclasses.asdict(finding)


def merge_hosts(findings: Sequence[tuple[str, Finding]]) -> list[Finding]:
    """Return findings of (host, finding), those that several hosts share once; the order is that of their first."""
    hosts: dict[Finding, list[str]] = {}
    for host, finding in findings:
        named = hosts.setdefault(finding, [])
        if host not in named:
            named.append(host)
    topics = list(dict.fromkeys(finding.topic for finding in hosts))
    merged = [dataclasses.replace(finding, where=listed(named)) for finding, named in hosts.items()]
    return sorted(merged, key=lambda finding: topics.index(finding.topic))


def listed(names: Sequence[str], most: int = 4) -> str:
    """Return names with commas; of many the first ones, and how many more there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def in_bytes(size: float) -> str:
    """Return a size as people read it."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,.0f} bytes"
