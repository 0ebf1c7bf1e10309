"""Config of `tpt preprocess`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tpt_megatron.config.load import Config, OneOrMore
from tpt_megatron.config.records import InputFields, OnBadRecord, part_of_work
from tpt_megatron.tokenizer import END_OF_DOCUMENT

Arm = Literal["vanilla", "append", "prepend", "interleave", "mixed", "chat"]
DocumentArm = Literal["vanilla", "append", "prepend", "interleave", "mixed"]
PlainArm = Literal["vanilla", "append", "prepend", "interleave"]


class Delimiters(Config):
    """The text around a thought: `open` inside thought inside `close`, with `between` wherever the block meets the document.

    `open` and `close` are single tokens where the tokenizer has them as added tokens, and text otherwise.
    """

    open: str = "<think>"
    close: str = "</think>"
    between: str = "\n"
    inside: str = "\n"


class NearDuplicates(Config):
    """What counts as nearly the same text: MinHash over runs of `shingle_words` words, `permutations` hashes, Jaccard similarity `threshold`."""

    threshold: float = Field(0.8, gt=0, lt=1)
    shingle_words: int = Field(5, ge=1)
    permutations: int = Field(128, ge=16, le=1024)


class ChatConfig(Config):
    """How messages become text, and which of it is the assistant's; for arms=[chat].

    template   Jinja as Hugging Face has it: tokenizer takes the chat_template that lies with the tokenizer; chatml; or the path of a file
    variables  what the template is given besides messages, special tokens and add_generation_prompt, for instance {enable_thinking: false}
    learn      all: every turn of the assistant's counts as such; last: its last one, the others are prompt
    """

    template: str = "tokenizer"
    variables: dict[str, Any] = Field(default={})
    learn: Literal["all", "last"] = "all"


class ChatFields(InputFields):
    """`messages`: of a chat, its list of {role, content}."""

    messages: str = "messages"


class KeepThoughts(Config):
    """Which thoughts stay, by a score that each has, such as `tpt value` gives. Before arms are made: all have the same documents and thoughts.

    score             where in a thought it is; dots go into groups
    min               a thought stays where its score is at least this
    best              of a document so many thoughts at most stay, those of the highest scores (the earlier of equal ones), in their order
    unscored          thoughts that have none, or null; those that are kept are not counted by `best`
    without_thoughts  documents with no thought, or none that stays: keep them, as documents only, or drop them from all arms
    """

    score: str = "value.nats_per_token"
    min: float | None = None
    best: int | None = Field(None, ge=1)
    unscored: Literal["drop", "keep"] = "drop"
    without_thoughts: Literal["keep", "drop"] = "keep"

    @model_validator(mode="after")
    def _chooses(self) -> Self:
        if self.min is None and self.best is None:
            raise ValueError("give min, best or both")
        return self


class PreprocessConfig(Config):
    """Augmented (or plain) documents in, one token dataset an arm out; or chats in, one token dataset out.

    input                record files, folders of them, or globs; local or URLs
    output               folder; each arm gets `ARM/train.*` and, with a validation_fraction, `ARM/validation.*`
    tokenizer            `byte`, a tokenizer.json, a SentencePiece .model, or a folder that holds one
    end_of_document      the token that closes every document; must be one token of the tokenizer
    arms                 vanilla: document only; append: document, then thoughts (the paper's); prepend: thoughts first;
                         interleave: each thought after the part of the document that it saw; mixed: see there;
                         chat, alone: records are chats, and their tokens are prompt or the assistant's
    mixed                weights of the arms in the arm `mixed`; a document's hash decides which one it gets
    thoughts             joined: all thoughts of a document in one sequence; samples: a sequence for each thought
    keep_thoughts        choose thoughts by score; default: all stay
    validation_fraction  share of the documents, chosen by the hash of their text (or messages), the same ones in every arm
    deduplicate          none; exact: of documents with the same text (of chats with the same messages) the first one stays; near: of nearly
                         the same text, not for chats
    engine               what tokenizes: auto takes fastokens where it gives the ids that Hugging Face's tokenizers gives
    verify               on what that is checked: sample (of the input, at start) or full (every text; as slow as `tokenizers`)
    workers              processes on this machine
    shard                3/64: do the third of 64 parts of the work; `tpt preprocess merge OUTPUT` joins them
    piece_megabytes      input is worked off in pieces of this size, which a new start re-uses; default: by the input's size
    max_record_megabytes a larger record is set aside
    """

    input: OneOrMore
    output: Path
    tokenizer: str
    end_of_document: str = END_OF_DOCUMENT
    arms: tuple[Arm, ...] = ("vanilla", "append")
    mixed: dict[PlainArm, float] = Field(default={"vanilla": 1.0, "append": 1.0})
    thoughts: Literal["joined", "samples"] = "joined"
    keep_thoughts: KeepThoughts | None = None
    delimiters: Delimiters = Delimiters()
    validation_fraction: float = Field(0.0, ge=0, lt=1)
    deduplicate: Literal["none", "exact", "near"] = "none"
    near_duplicates: NearDuplicates = NearDuplicates()
    fields: ChatFields = ChatFields()
    chat: ChatConfig = ChatConfig()
    on_bad_record: OnBadRecord = "set_aside"
    engine: Literal["auto", "fastokens", "tokenizers"] = "auto"
    verify: Literal["sample", "full"] = "sample"
    workers: int = Field(1, ge=1)
    shard: str | None = None
    piece_megabytes: float | None = Field(None, gt=0)
    max_record_megabytes: float = Field(128, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms={list(self.arms)} must name at least one arm, and each once")
        if not self.mixed or any(weight < 0 or not math.isfinite(weight) for weight in self.mixed.values()) or sum(self.mixed.values()) <= 0:
            raise ValueError(f"mixed={self.mixed} must give weights of at least 0, not all of them 0")
        if re.match(r"[a-z0-9]+:/", str(self.output)):  # Path makes one slash of two
            raise ValueError(f"output={self.output} must be a folder of this machine: training maps datasets into memory")
        self.part_of_work()
        self._chat_stands_alone()
        return self

    @property
    def reads_chats(self) -> bool:
        """Whether records are chats."""
        return "chat" in self.arms

    def _chat_stands_alone(self) -> None:
        """Refuse what chats have no use for, and what only they have."""
        if not self.reads_chats:
            if self.chat != ChatConfig():
                raise ValueError(f"chat={self.chat.model_dump(exclude_defaults=True)} is for arms=['chat'], not for arms={list(self.arms)}")
            return
        if len(self.arms) > 1:
            raise ValueError(f"arms={list(self.arms)}: chat reads chats, and the other arms read documents; give it a run and an output of its own")
        if self.thoughts != "joined":
            raise ValueError(f"thoughts={self.thoughts} is for arms of documents; arms=['chat'] has no thoughts")
        if self.keep_thoughts is not None:
            raise ValueError("keep_thoughts is for arms of documents; arms=['chat'] has no thoughts")
        if self.deduplicate == "near":
            raise ValueError("deduplicate=near compares documents; with arms=['chat'] give exact or none")
        if self.delimiters != Delimiters():
            raise ValueError(f"delimiters={self.delimiters.model_dump(exclude_defaults=True)} are for thoughts; what stands in a chat is its template's")

    def part_of_work(self) -> tuple[int, int]:
        """Return (number from 0, how many) of the parts that the work is cut into; (0, 1) without `shard`."""
        return part_of_work(self.shard)
