"""Findings for people, a line each, and as JSON."""

from __future__ import annotations

import json
import socket
import sys

from rich.console import Console
from rich.text import Text

from tpt_megatron import __version__
from tpt_megatron.doctor.findings import as_record
from tpt_megatron.doctor.run import Report

COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def print_report(report: Report) -> None:
    """Print a line for each finding, and the sum."""
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    width = max(len(finding.topic) for finding in report.findings)
    for finding in report.findings:
        line = Text(f"{finding.status:8}", style=COLOURS[finding.status])
        line.append(f"{finding.topic:{width}}  {f'{finding.where}: ' if finding.where else ''}{finding.found}", style="default")
        if finding.do:
            line.append(f" -> {finding.do}", style="bold" if finding.status != "ok" else "dim")
        console.print(line)
    counts = {status: sum(finding.status == status for finding in report.findings) for status in COLOURS}
    console.print(f"{counts['problem']} problem(s), {counts['warning']} warning(s), {counts['ok']} ok")
    sys.stdout.flush()  # before the other ranks go on


def print_json(report: Report) -> None:
    """Print the report as JSON."""
    whole = {
        "version": __version__,
        "host": socket.gethostname(),
        "ranks": report.ranks,
        "healthy": report.healthy,
        "findings": [as_record(finding) for finding in report.findings],
        "measurements": report.measurements,
    }
    print(json.dumps(whole, indent=2, ensure_ascii=False), flush=True)
