"""Runs of the command `tpt augment` as processes, for tests that kill, stop or watch them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpt_megatron.bad_records import BadRecords, LineCounts, read_records
from tpt_megatron.record_files import expand_inputs
from tpt_megatron.records import AugmentedDocument, read_augmented

DOCUMENT_PATTERN = r"Document number (\d+)"
"""For the scripted server: what tells documents apart in its log."""


def write_documents(path: Path, count: int) -> None:
    """Write documents that name their number, as a file of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for i in range(count):
            file.write(json.dumps({"id": str(i), "text": f"Document number {i} is about the number {i * i}, its square."}) + "\n")


def write_config(path: Path, source: str, output: str, url: str | list[str], *, generator: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a config that asks a scripted server; no tokenizer, so whole documents are shown."""
    asked = {"kind": "openai", "model": "scripted", "base_urls": url, "concurrency": {"initial": 16, "maximum": 16}} | (generator or {})
    path.write_text(json.dumps({"input": source, "output": output, "document_tokens": None, "generator": asked} | changes))
    return path


def start(config: Path, *overrides: str, own_group: bool = False) -> subprocess.Popen[str]:
    """Start the command, if so wished as the leader of a process group."""
    words = [sys.executable, "-m", "tpt_megatron.cli", "augment", str(config), *overrides]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=own_group)


def run(config: Path, *overrides: str, exit_code: int = 0, timeout_s: float = 300) -> str:
    """Run the command to its end, check its exit code, and return all that it said."""
    with start(config, *overrides) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == exit_code, f"exit code {process.returncode}\n{out}\n{err}"
    return out + err


def output_of(folder: str | Path) -> Iterator[AugmentedDocument]:
    """Yield the augmented documents of a finished output."""
    for place in expand_inputs((str(folder),)):
        yield from read_records(place, read_augmented, BadRecords("fail"), LineCounts())
