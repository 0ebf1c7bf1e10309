"""Documents that share a sequence do not see each other, through the whole model."""

from __future__ import annotations

from pathlib import Path

from tests.support.leaks import losses_before_and_after


def test_a_document_sees_no_other(tmp_path: Path) -> None:
    before, after = losses_before_and_after(tmp_path, "document")
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_a_sequence_that_is_seen_whole_would_show(tmp_path: Path) -> None:
    before, after = losses_before_and_after(tmp_path, "sequence")
    assert all(mine != theirs for mine, theirs in zip(before, after, strict=True))
