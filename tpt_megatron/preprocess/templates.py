"""Chat templates: messages as one text, and which stretches of it the assistant wrote.

Templates are Jinja as Hugging Face has it: `chat_template` of a tokenizer's folder, or a file. They come with models and are not trusted,
so they run in a sandbox that lets them change nothing. What a template writes must not depend on the day: there is no `strftime_now`, and
Llama 3's templates, which ask whether it is defined, write their fixed date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tpt_megatron.errors import ConfigError, DataError, MachineError, RecordError
from tpt_megatron.files import read_json

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around what {% generation %} blocks write, while a template is at work: Unicode has no characters there, and never will."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

Message = Mapping[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template and all that it is filled with besides messages.

    name       as the config has it, for messages
    source     the template itself
    variables  the tokenizer's special tokens by their names (bos_token, ...), and the config's variables
    learn      all: every turn of the assistant's is marked; last: its last one
    """

    name: str
    source: str
    variables: Mapping[str, Any]
    learn: Literal["all", "last"] = "all"

    @property
    def has_blocks(self) -> bool:
        """Whether the template itself marks what the assistant writes, with {% generation %}."""
        return _compile(self.source)[1]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Return the text of messages, with OPEN and CLOSE around generation blocks; RecordError where the template refuses or fails."""
        import jinja2

        try:
            text = _compile(self.source)[0].render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.variables)
        except (jinja2.TemplateError, AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            # A template is a program: a message that it does not expect makes it fail as programs do.
            raise RecordError("", f"chat.template={self.name} cannot write these messages: {' '.join(str(error).split())}") from None
        return str(text)

    @property
    def alone(self) -> str:
        """The template with what it is filled with besides messages: it writes the same text for whoever knows nothing else."""
        return "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in self.variables.items()) + self.source

    def mark(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Return the text of a chat and the stretches [begin, end) of it that the assistant wrote.

        By the template's own blocks where it has any. Otherwise a turn is what stands after the generation prompt of the messages before it, up
        to where the chat goes on: for that, the text of the first messages must be how the text of all begins. RecordError where it is not.
        """
        text = self.render(messages)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.has_blocks:
            text, spans = _without_marks(text)
            return text, spans if self.learn == "all" else spans[-1:]
        return text, [self._turn(messages, number, text) for number in (turns if self.learn == "all" else turns[-1:])]

    def _turn(self, messages: Sequence[Message], number: int, text: str) -> Span:
        before = self.render(messages[:number], add_generation_prompt=True)
        until = self.render(messages[: number + 1])
        if not (text.startswith(until) and until.startswith(before)):
            hint = "" if number == len(messages) - 1 else ", or set chat.learn=last"
            raise RecordError(
                "",
                f"chat.template={self.name}: its text of the messages up to message {number + 1} is not how its text of the whole chat begins (as in "
                f"templates that drop earlier thinking), so that what the assistant wrote cannot be told; put {{% generation %}} around it{hint}",
            )
        return len(before), len(until)


def load_template(template: str, tokenizer: str, variables: Mapping[str, Any], learn: Literal["all", "last"]) -> ChatTemplate:
    """Return the template that a config names: `chatml`, `tokenizer` (what the tokenizer's folder has), or a file.

    Raises MachineError without jinja2, and ConfigError or DataError for a template that is not there or is none.
    """
    try:
        import jinja2
    except ImportError:
        raise MachineError("arms=[chat] needs jinja2, which is not installed; run: pip install 'tpt-megatron[chat]'") from None
    folder = path if (path := Path(tokenizer)).is_dir() else path.parent
    described = read_json(folder / "tokenizer_config.json") if tokenizer != "byte" and (folder / "tokenizer_config.json").is_file() else {}
    if not isinstance(described, dict):
        raise DataError(f"{folder / 'tokenizer_config.json'}: not a JSON object")
    if template == "chatml":
        source = CHATML
    elif template == "tokenizer":
        source = _of_tokenizer(folder, described, tokenizer)
    else:
        source = _of_file(Path(template))
    special = {name: _spelling(described[name]) for name in SPECIAL_TOKENS if described.get(name) is not None}
    try:
        _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat.template={template}: line {error.lineno} is no Jinja that chat templates are written in: {error.message}") from None
    return ChatTemplate(template, source, special | dict(variables), learn)


def _of_tokenizer(folder: Path, described: Mapping[str, Any], tokenizer: str) -> str:
    beside, inside = folder / "chat_template.jinja", described.get("chat_template")
    if tokenizer != "byte" and beside.is_file():
        return _of_file(beside)
    if isinstance(inside, list):  # several by name, as tokenizers of tool-using models have them
        inside = next((entry.get("template") for entry in inside if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if not isinstance(inside, str):
        raise ConfigError(
            f"chat.template=tokenizer: {tokenizer} brings no chat_template (in tokenizer_config.json or chat_template.jinja beside it); "
            "give chat.template=chatml, or a file"
        )
    return inside


def _of_file(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"chat.template={path}: no such file; give chatml, tokenizer, or the path of a Jinja template")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 at byte {error.start}") from None


def _spelling(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _without_marks(text: str) -> tuple[str, list[Span]]:
    """Return a text without OPEN and CLOSE, and where what stood between them is now; of blocks in blocks the outer ones."""
    pieces: list[str] = []
    spans: list[Span] = []
    at = depth = begin = 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", text):
        if piece == OPEN:
            begin = at if depth == 0 else begin
            depth += 1
        elif piece == CLOSE:
            depth -= 1
            if depth == 0 and at > begin:
                spans.append((begin, at))
        else:
            pieces.append(piece)
            at += len(piece)
    return "".join(pieces), spans


@cache
def _compile(source: str) -> tuple[Any, bool]:
    """Return a template, and whether it has generation blocks."""
    from jinja2.nodes import ExtensionAttribute

    environment = _environment()
    return environment.from_string(source), next(environment.parse(source).find_all(ExtensionAttribute), None) is not None


def _environment() -> Any:
    """Return Jinja as chat templates expect it: Hugging Face's settings, filters and functions."""
    from jinja2.ext import Extension
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %} ... {% endgeneration %}: what the assistant wrote."""

        tags = {"generation"}  # noqa: RUF012 - so Jinja has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return JSON as it is read by models: without what Jinja's own filter does for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _literal(value: Any) -> str:
    """Return a value as Jinja spells it."""
    return "none" if value is None else json.dumps(value)
