"""What was answered so far, so that a killed run does not ask again: a line of JSON for each batch, appended when it is finished.

    {"answers": {KEY: ANSWER, ...}}

A key is made of all that decides an answer: the request, the model's weights, the settings. So answers to other requests, of other weights, or under
other settings are never taken, however the file came to have them, and all of them may stay. A batch is one line, which is there or not: what is left
to ask falls into the same batches as in a run that was never killed, and sums that are rounded differently in other batches come out alike.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpt_megatron.errors import DataError
from tpt_megatron.storage import sync_folder


def request_key(**decides: Any) -> str:
    """Return the key of a request: the SHA-256 of what decides its answer, whatever the order of the names."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()


class Journal:
    """Answers on disk by key. An answer is any JSON value; minus infinity, which log-likelihoods may be, included.

    For one process at a time.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there. A last line that is not complete, of a run that was killed as it wrote, is taken away; DataError for damage elsewhere."""
        self._path = path
        self._answers: dict[str, Any] = {}
        content = path.read_bytes() if path.is_file() else b""
        lines = content.splitlines(keepends=True)
        if lines and _answers_of(lines[-1]) is None:
            os.truncate(path, len(content) - len(lines.pop()))
        for number, line in enumerate(lines, 1):
            answers = _answers_of(line)
            if answers is None:
                raise DataError(f"{path}:{number}: the journal is damaged; remove the file, and what it holds is asked again")
            self._answers.update(answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep a batch's answers. They are on disk when this returns."""
        is_new = not self._path.is_file()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"answers": answers}).encode() + b"\n"
        with open(self._path, "ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self._path.parent)
        # As they will be read again: a run that goes on must not differ from one that begins here.
        self._answers.update(json.loads(line)["answers"])


def _answers_of(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds, None when it is not complete."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    answers = value.get("answers") if isinstance(value, dict) else None
    return answers if isinstance(answers, dict) else None
