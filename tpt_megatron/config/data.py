"""Config of what a run reads: token datasets, and how their documents become sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from tpt_megatron.config.load import Config


class LossWeights(Config):
    """How much each token's loss counts, by what the token is: 0 masks it. Of datasets without sidecars every token is document."""

    document: float = Field(1.0, ge=0)
    thinking: float = Field(1.0, ge=0)


class DataConfig(Config):
    """Token datasets (prefixes of .bin/.idx) and how documents become sequences.

    attention     document: a token sees its own document only; sequence: everything before it in the sequence
    loss_weights  of document and thinking tokens; by default all count alike, as in the paper
    """

    train: str
    validation: str | None = None
    sequence_length: PositiveInt
    attention: Literal["document", "sequence"] = "document"
    loss_weights: LossWeights = LossWeights()

    @property
    def has_uneven_weights(self) -> bool:
        """Say whether some tokens count more than others, beyond counting or not."""
        return not {self.loss_weights.document, self.loss_weights.thinking} <= {0.0, 1.0}
