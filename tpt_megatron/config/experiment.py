"""Config of `tpt experiment`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from tpt_megatron.config.load import Config

Match = Literal["tokens", "documents", "compute"]


def _tuple_of_one(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


class ExperimentArm(Config):
    """One arm: what it is trained on, and how it is asked.

    train       the token dataset that the training config's data.train becomes
    validation  the one that data.validation becomes
    max_epochs  how often training may go through `train`: 4 of little data, 1 for never twice; a run that would do so more often is refused
    override    keys of the training config that this arm has otherwise, dotted
    evaluate    config or recipe of `tpt evaluate`, whose run_dir is each run of this arm; none: the arm is not scored
    """

    train: str
    validation: str | None = None
    max_epochs: PositiveFloat | None = None
    override: dict[str, Any] = Field(default_factory=dict)
    evaluate: str | None = None


class GeneratorCost(Config):
    """What a thought cost to write: 2 FLOPs a parameter and token, of prompt and thought alike.

    parameters        of the generator; of a mixture those that a token goes through
    prompt_tokens     of the prompt, beside the document itself
    tokens_per_token  the generator's tokens for one of the dataset's, where their tokenizers differ
    thoughts_kept     the part of what was generated that passed the checks
    """

    parameters: PositiveInt
    prompt_tokens: NonNegativeFloat = 0
    tokens_per_token: PositiveFloat = 1
    thoughts_kept: float = Field(1, gt=0, le=1)


class ExperimentConfig(Config):
    """Arms, trained so that they can be compared: the same model, batch and schedule, a few seeds, and equal tokens, documents or compute.

    output       runs/, configs/, plan.json, commands.sh and a report for each `match` go there; an experiment that is found there is continued
    train        config or recipe of `tpt train` that all arms share; its length and run_dir are set here
    override     keys of it that are otherwise, dotted
    baseline     the arm that the others are held against
    tokens       training tokens of the baseline, in whole sequences
    match        what the arms have as much of as the baseline: training tokens; documents seen; or FLOPs of training and of writing the thoughts
    seeds        of each arm, a run a seed
    checkpoints  how many each run saves, evaluates and validates at
    ranks        on this machine, a run
    evaluate_with  keys of every arm's evaluation, dotted
    generator    what wrote the thoughts; needed for match: compute
    difficulty   for the reports: how hard documents are, an output of tpt losses, or record files; difficulty_field: of these
    notes        what the comparison does and does not show, for the report
    """

    output: Path
    train: str
    override: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, ExperimentArm] = Field(min_length=2)
    baseline: str = "vanilla"
    tokens: PositiveInt
    match: Annotated[tuple[Match, ...], BeforeValidator(_tuple_of_one), Field(min_length=1)] = ("tokens",)
    seeds: Annotated[tuple[int, ...], BeforeValidator(_tuple_of_one), Field(min_length=1)] = (1,)
    checkpoints: PositiveInt = 20
    ranks: PositiveInt = 1
    evaluate_with: dict[str, Any] = Field(default_factory=dict)
    generator: GeneratorCost | None = None
    difficulty: Path | None = None
    difficulty_field: str | None = None
    notes: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline={self.baseline} is none of the arms {', '.join(self.arms)}")
        if unusable := [arm for arm in self.arms if not re.fullmatch(r"[\w.+-]+", arm)]:
            raise ValueError(f"arms: {unusable[0]!r} cannot be a folder's name; use letters, digits, _, -, + and dots")
        for name, values in (("match", self.match), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has one of {', '.join(map(str, values))} twice")
        if self.difficulty_field is not None and self.difficulty is None:
            raise ValueError("difficulty_field names a field of record files; give these as difficulty")
        if "compute" in self.match and self.generator is None:
            raise ValueError("match: compute counts what the thoughts cost; give generator.parameters")
        return self
