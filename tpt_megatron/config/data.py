"""Config of what a run reads: token datasets, in which shares and stages, and how their documents become sequences."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.load import Config


class LossWeights(Config):
    """How much each token's loss counts, by what the token is: 0 masks it. Of datasets without sidecars every token is document.

    prompt, assistant  of chats: what the assistant did not write, and what it did
    """

    document: float = Field(1.0, ge=0)
    thinking: float = Field(1.0, ge=0)
    prompt: float = Field(0.0, ge=0)
    assistant: float = Field(1.0, ge=0)


class Share(Config):
    """One dataset of a blend. The shares of a list all have a weight, or all have tokens; one alone needs neither.

    path        the dataset's prefix
    weight      its part of the tokens, relative to the other weights
    tokens      its budget: shares are read in proportion to their budgets, and together they last for the sum of these; a run, or a stage,
                of more tokens is refused
    max_epochs  how often the run may go through the dataset, 1.5 for instance; a run that would do so more often is refused before it starts
    """

    path: str
    weight: PositiveFloat | None = None
    tokens: PositiveInt | None = None
    max_epochs: PositiveFloat | None = None

    @property
    def part(self) -> float | int:
        """The share, relative to the others of its list."""
        return self.tokens or self.weight or 1


def _as_shares(value: Any) -> Any:
    if isinstance(value, str):
        return ({"path": value},)
    return (value,) if isinstance(value, dict) else value


Shares = Annotated[tuple[Share, ...], BeforeValidator(_as_shares), Field(min_length=1)]
"""A list of shares; a prefix alone is one share."""


class Stage(Config):
    """A stretch of the run with its own blend. tokens: its length, rounded down to whole sequences; the last stage has none: the rest."""

    train: Shares
    tokens: PositiveInt | None = None


class DataConfig(Config):
    """Token datasets (prefixes of .bin/.idx) and how documents become sequences. Tokens are counted in whole sequences, padding included.

    train         a prefix, or a list of shares {path, weight or tokens, max_epochs}
    stages        instead of train: a list of {tokens, train}, one blend after the other; a dataset of several stages is read on, not anew
    validation    a prefix, or a mapping of names to prefixes
    packing       concatenate: documents laid end to end and cut every sequence_length; best_fit: each document, with its thoughts, whole in
                  one sequence of sequence_length + 1 tokens, which is filled up with padding: no loss is taken there, and it is not counted
    too_long      best_fit, of documents over sequence_length + 1 tokens. cut: into pieces of that many, packed like documents; drop: left out
    attention     document: a token sees its own document only; sequence: everything before it in the sequence
    loss_weights  of document and thinking tokens: by default all count alike, as in the paper; and of chats: only the assistant's count
    """

    train: Annotated[tuple[Share, ...], BeforeValidator(_as_shares)] = ()
    stages: tuple[Stage, ...] = ()
    validation: str | dict[str, str] | None = None
    sequence_length: PositiveInt
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    too_long: Literal["cut", "drop"] = "cut"
    attention: Literal["document", "sequence"] = "document"
    loss_weights: LossWeights = LossWeights()

    @model_validator(mode="after")
    def _blends_are_whole(self) -> Self:
        if bool(self.train) == bool(self.stages):
            raise ValueError("give one of train and stages" if self.train else "key 'data.train' is missing, or data.stages in its place")
        for number, stage in enumerate(self.stages):
            if (stage.tokens is None) != (number == len(self.stages) - 1):
                raise ValueError(f"stages.{number}: every stage but the last has tokens, the last has none: it is the rest of the run")
            if stage.tokens is not None and stage.tokens < self.sequence_length:
                raise ValueError(f"stages.{number}.tokens={stage.tokens} is less than one sequence of {self.sequence_length}")
        if self.too_long == "drop" and self.packing == "concatenate":
            raise ValueError("too_long=drop has no effect with packing=concatenate, which cuts where a sequence ends; set packing=best_fit")
        for stage in self.blends:
            _check_shares(stage.train)
        if self.validation == {} or (isinstance(self.validation, dict) and "" in self.validation):
            raise ValueError("validation: a mapping needs names with a dataset each")
        return self

    @property
    def has_uneven_weights(self) -> bool:
        """Say whether some tokens count more than others, beyond counting or not."""
        return not set(self.loss_weights.model_dump().values()) <= {0.0, 1.0}

    @property
    def blends(self) -> tuple[Stage, ...]:
        """The stages; a run without has one, which is all of it."""
        return self.stages or (Stage(train=self.train),)

    @property
    def train_paths(self) -> list[str]:
        """The training datasets, each once, in the order in which the config names them."""
        return list(dict.fromkeys(share.path for stage in self.blends for share in stage.train))

    @property
    def validation_sets(self) -> dict[str, str]:
        """Prefixes by name; one that was given without a name has the name ""."""
        if self.validation is None:
            return {}
        return {"": self.validation} if isinstance(self.validation, str) else self.validation

    def check_lengths(self, run_sequences: int) -> None:
        """Raise ValueError for a stage that the run does not reach, and for token budgets of a blend that do not last for the run's sequences."""
        left = run_sequences
        for number, stage in enumerate(self.blends):
            if not left:
                raise ValueError(
                    f"data.stages.{number} is never reached: the run reads {run_sequences * self.sequence_length:,} tokens, and the stages before it "
                    "have as many or more; make the run longer, lower their tokens, or leave this stage out"
                )
            sequences = left if stage.tokens is None else min(left, stage.tokens // self.sequence_length)
            left -= sequences
            budget = sum(share.tokens or 0 for share in stage.train)
            wanted = sequences * self.sequence_length
            if budget and budget < wanted:
                where, whose = (f"data.stages.{number}", "the stage") if self.stages else ("data.train", "the run")
                raise ValueError(f"{where}: the budgets add up to {budget:,} tokens, and {whose} reads {wanted:,}; raise them, or make {whose} shorter")


def _check_shares(shares: tuple[Share, ...]) -> None:
    paths = Counter(share.path for share in shares)
    for path, count in paths.items():
        if count > 1:
            raise ValueError(f"{path} is named {count} times in one blend; add its shares up")
    for share in shares:
        if share.weight is not None and share.tokens is not None:
            raise ValueError(f"{share.path}: give one of weight and tokens")
    given = {"weight" if share.weight is not None else "tokens" if share.tokens is not None else "neither" for share in shares}
    if len(shares) > 1 and (len(given) > 1 or "neither" in given):
        raise ValueError(f"the shares of a blend all need a weight, or all need tokens: {', '.join(paths)}")
