"""What the configs of stages that read records have in common."""

from __future__ import annotations

import re
from typing import Literal

from tpt_megatron.config.load import Config
from tpt_megatron.records import FieldNames

OnBadRecord = Literal["set_aside", "fail"]


class InputFields(Config):
    """Names of the fields of an input record. A record without `id` gets one made from its text, or messages."""

    text: str = "text"
    id: str = "id"
    source: str = "source"

    def names(self) -> FieldNames:
        """Return the names as records take them."""
        return FieldNames(self.text, self.id, self.source)


def part_of_work(shard: str | None) -> tuple[int, int]:
    """Return (number from 0, how many) of the parts that a stage's work is cut into, of a config's key `shard`; (0, 1) without. ValueError for nonsense."""
    if shard is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"shard={shard!r} must be NUMBER/COUNT with 1 <= NUMBER <= COUNT, for example 3/64")
    return number - 1, count
