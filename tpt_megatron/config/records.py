"""What the configs of stages that read records have in common."""

from __future__ import annotations

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
