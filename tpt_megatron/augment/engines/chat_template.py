"""Chats rendered with a model's own template, for engines that load the model themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpt_megatron.augment.engines.base import Messages, RequestFailed
from tpt_megatron.augment.trajectory import OPENING
from tpt_megatron.errors import ConfigError

TEMPLATE_KEY = "chat_template_kwargs"


def template_variables(extra: dict[str, Any]) -> dict[str, Any]:
    """Return the template's own variables out of `sampling.extra`; ConfigError when they are no table of names."""
    variables = extra.get(TEMPLATE_KEY, {})
    if not isinstance(variables, dict):
        raise ConfigError(f"generator.sampling.extra.{TEMPLATE_KEY}={variables!r} must be a table of names and values, such as {{enable_thinking: true}}")
    return variables


def refuse_other_keys(extra: dict[str, Any], known: set[str], engine: str) -> None:
    """Raise ConfigError when `sampling.extra` holds a key that the engine does not know: dropping it would change what is sampled."""
    if unknown := sorted(set(extra) - known):
        raise ConfigError(f"generator.sampling.extra: {engine} does not know {', '.join(unknown)}; known are {', '.join(sorted(known))}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered chat. `thought_is_open` where the template already wrote `<think>`, so that the model goes on inside the thought."""

    text: str
    thought_is_open: bool

    def complete(self, continuation: str) -> str:
        """Return the model's whole turn: a thought that the template opened gets its opening tag back, so that a cut one can be told from an answer."""
        return OPENING + continuation if self.thought_is_open else continuation


def render_chat(tokenizer: Any, messages: Messages, variables: dict[str, Any]) -> Prompt:
    """Return the prompt that asks for the next turn, by a transformers tokenizer. RequestFailed when the template refuses the messages."""
    import jinja2

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **variables)
    except jinja2.TemplateError as error:
        raise RequestFailed(f"the model's chat template refuses the messages: {error}") from None
    return Prompt(text, text.rstrip().endswith(OPENING))
