"""Delimiters as tokens: what they become, and whether this tokenizer can express them at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tpt_megatron.arms import DelimiterIds
from tpt_megatron.config.preprocess import Delimiters
from tpt_megatron.errors import ConfigError
from tpt_megatron.tokenizer import TokenizerLike

logger = logging.getLogger(__name__)
_SPECIAL_TOKEN = re.compile(r"<\|.*\|>|\[[A-Z_]+\]", re.DOTALL)


def delimiter_ids(delimiters: Delimiters, tokenizer: TokenizerLike) -> DelimiterIds[npt.NDArray[np.uint32]]:
    """Return the delimiters' tokens: the added token of that name where there is one, otherwise those of the text by itself.

    Since a delimiter is tokenised by itself, it is never merged with its neighbours, whatever they are.
    """
    return DelimiterIds(*(np.array(_ids(text, tokenizer), np.uint32) for text in (delimiters.open, delimiters.close, delimiters.between)))


def check_delimiters(delimiters: Delimiters, tokenizer: TokenizerLike, name: str) -> None:
    """Raise ConfigError for a delimiter that the tokenizer `name` cannot express, or that is spelled as a special token and is none.

    Logs what open and close became.
    """
    for key, text in delimiters.model_dump().items():
        if tokenizer.unknown_id is not None and tokenizer.unknown_id in _ids(text, tokenizer):
            raise ConfigError(f"delimiters.{key}={text!r} is unknown to the tokenizer {name}; give a text that its vocabulary holds")
        if _SPECIAL_TOKEN.fullmatch(text) and tokenizer.added_token_id(text) is None:
            raise ConfigError(
                f"delimiters.{key}={text!r} is spelled as a special token, but the tokenizer {name} has no such token and would read it as text; "
                "give one that it has, or a plain text"
            )
    if tokenizer.eod_id in _ids(delimiters.open, tokenizer) + _ids(delimiters.close, tokenizer):
        raise ConfigError(f"delimiters: one of them is the end-of-document token {tokenizer.end_of_document!r}, which must end documents only")
    for key, text in (("open", delimiters.open), ("close", delimiters.close)):
        ids = _ids(text, tokenizer)
        how = "one token of its own" if tokenizer.added_token_id(text) is not None else f"text of {len(ids)} token(s)"
        logger.info("delimiters.%s=%r: %s %s", key, text, how, ids)
    apart, together = _opening(delimiters, tokenizer)
    if apart != together:
        logger.info(
            "delimiters.open=%r: read in one go with its neighbours it would become %s; in the datasets it is always %s, "
            "so a prompt that spells it must be tokenised by parts too",
            delimiters.open,
            together,
            apart,
        )


def _ids(text: str, tokenizer: TokenizerLike) -> list[int]:
    token = tokenizer.added_token_id(text)
    return tokenizer.encode(text) if token is None else [token]


def _opening(delimiters: Delimiters, tokenizer: TokenizerLike) -> tuple[Sequence[int], Sequence[int]]:
    """Return the tokens of between+open+inside by parts, and in one go (where open is a text)."""
    apart = _ids(delimiters.between, tokenizer) + _ids(delimiters.open, tokenizer) + tokenizer.encode(delimiters.inside)
    if tokenizer.added_token_id(delimiters.open) is not None:
        return apart, apart
    return apart, tokenizer.encode(delimiters.between + delimiters.open + delimiters.inside)
