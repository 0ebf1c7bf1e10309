"""Prompts: Jinja templates that a document is put into, for a chat.

A template is the user's message. What stands in `{% block system %}...{% endblock %}`, where there is one, is the system
message instead. Variables:

    document   the text to think about: the document, its beginning, or one chunk of it
    before     what precedes it in the document, in chunked mode; else empty
    focus      a sentence of it, chosen at random by the request's seed
    record     the record, its fields named as in the output: record.id, record.text, record.source and all others; a null
               is no field. Ask for one that may be missing with `{% if record.title is defined %}`.
    and those of prompt_fields, each a field of the record that holds text

Templates run in Jinja's sandbox. A document's own braces are text.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpt_megatron.augment.engines.base import Messages
from tpt_megatron.augment.excerpt import Excerpt
from tpt_megatron.errors import ConfigError, MachineError, RecordError
from tpt_megatron.records import Document

if TYPE_CHECKING:
    import jinja2
    import jinja2.nodes

VARIABLES = ("document", "before", "focus", "record")
SYSTEM = "system"

_SENTENCE = re.compile(r"[^\n\u3002\uff01\uff1f]+?(?:[.!?]+[\"'\u2019\u201d)\]]*(?=\s)|[\u3002\uff01\uff1f]+[\u300d\u300f\u2019\u201d\uff09]*|(?=\n)|\Z)")
_SHORTEST_FOCUS, _LONGEST_FOCUS = 20, 400  # characters
_RANDOM = ("random", "lipsum")  # a filter and a function that would give another prompt each time


@dataclass(frozen=True, slots=True)
class Prompt:
    """A template. `hash`: first 16 hex digits of the SHA-256 of its text; `variables`: those that it uses."""

    name: str
    hash: str
    variables: frozenset[str]
    user: jinja2.Template
    system: jinja2.Template | None

    def render(self, document: Document, excerpt: Excerpt, fields: Mapping[str, str], seed: int, where: str) -> Messages:
        """Return the chat that asks for a thought about an excerpt of a document.

        `fields` are the prompt_fields (variable: record field); `where` is FILE:LINE. Raises RecordError when the record
        lacks what the template uses, or the template fails on it.
        """
        named = {"id": document.id, "text": document.text, "source": document.source, **document.extra}
        record = Record({name: value for name, value in named.items() if value is not None})
        values: dict[str, Any] = {"document": excerpt.text, "before": excerpt.before, "record": record}
        if "focus" in self.variables:
            values["focus"] = choose_focus(excerpt.text, seed)
        for variable in self.variables & fields.keys():
            values[variable] = self._field(record, fields[variable], where)
        user = {"role": "user", "content": self._fill(self.user, values, where)}
        if not user["content"].strip():
            raise RecordError(where, f"prompt {self.name} gives an empty message")
        if self.system is None or not (system := self._fill(self.system, values, where)).strip():
            return (user,)
        return {"role": SYSTEM, "content": system}, user

    def _field(self, record: Record, name: str, where: str) -> str:
        if name not in record:
            raise RecordError(where, f"field {name!r} is missing, which prompt {self.name} uses; the record has: {', '.join(record)}")
        value = record[name]
        if not isinstance(value, str):
            raise RecordError(where, f"field {name!r} must be a string, since prompt {self.name} uses it; found {type(value).__name__}")
        if not value.strip():
            raise RecordError(where, f"field {name!r} is empty, which prompt {self.name} uses")
        return value

    def _fill(self, template: jinja2.Template, values: Mapping[str, Any], where: str) -> str:
        import jinja2
        from jinja2.exceptions import SecurityError

        try:
            return template.render(values).strip("\n")
        except SecurityError as error:
            raise ConfigError(f"prompt {self.name}: not allowed in a template: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise RecordError(where, f"prompt {self.name} cannot be filled: {error}; the record has: {', '.join(values['record'])}") from None


class Record:
    """A record's fields for templates. Unlike a dict it has no methods, so that `record.items` is the field of that name."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)


def choose_focus(text: str, seed: int) -> str:
    """Return a sentence of `text`, the same for the same seed; one of 20 characters or more where there is any.

    A sentence of more than 400 characters is cut at a word's end.
    """
    sentences = [found for match in _SENTENCE.finditer(text) if (found := match.group().strip())]
    sentences = [sentence for sentence in sentences if len(sentence) >= _SHORTEST_FOCUS] or sentences or [text.strip()]
    # random() is the one method whose numbers Python promises to keep.
    sentence = sentences[int(random.Random(seed).random() * len(sentences))]
    if len(sentence) <= _LONGEST_FOCUS:
        return sentence
    cut = sentence.rfind(" ", _LONGEST_FOCUS // 2, _LONGEST_FOCUS)
    return sentence[: cut if cut > 0 else _LONGEST_FOCUS]


def builtin_prompts() -> list[str]:
    """Return the names of the prompts that ship with the package."""
    folder = resources.files("tpt_megatron.augment") / "templates"
    return sorted(entry.name.removesuffix(".jinja") for entry in folder.iterdir() if entry.name.endswith(".jinja"))


def load_prompts(names: tuple[str, ...], prompt_fields: Mapping[str, str]) -> list[Prompt]:
    """Load prompts by their names: those of the package, or files, which are named by their stem.

    Raises ConfigError for a file that is missing, a mistake in a template (with file and line), a variable that nothing
    fills, or two prompts of one name; MachineError when Jinja is not installed.
    """
    try:
        environment = _environment()
    except ImportError:
        raise MachineError("prompts need Jinja: install tpt-megatron[generate]") from None
    for variable in prompt_fields:
        if variable in VARIABLES or not variable.isidentifier():
            raise ConfigError(f"prompt_fields: {variable!r} cannot name a variable: it is {'taken' if variable in VARIABLES else 'no identifier'}")
    prompts: dict[str, Prompt] = {}
    for given in names:
        name, origin, text = _read(given)
        if name in prompts:
            raise ConfigError(f"prompts: {given!r} is a second prompt called {name!r}, and thoughts tell prompts apart by name; rename its file")
        prompts[name] = _compile(environment, name, origin, text, frozenset(VARIABLES) | prompt_fields.keys())
    return list(prompts.values())


def _environment() -> jinja2.Environment:
    import jinja2
    import jinja2.sandbox

    # Prompts are plain text for a model, not HTML: nothing is to be escaped in them.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(autoescape=False, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    for name in _RANDOM:
        environment.filters.pop(name, None)
        environment.globals.pop(name, None)
    return environment


def _read(given: str) -> tuple[str, str, str]:
    """Return a prompt's name, where it stands for messages, and its text."""
    if given in (known := builtin_prompts()):
        return given, f"prompt {given}", (resources.files("tpt_megatron.augment") / "templates" / f"{given}.jinja").read_text(encoding="utf-8")
    path = Path(given)
    if not path.is_file():
        raise ConfigError(f"prompts: {given}: no such file, and no prompt of that name ({', '.join(known)})")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{given}: not valid UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise ConfigError(f"{given}: an empty template")
    return path.stem, given, text


def _compile(environment: jinja2.Environment, name: str, origin: str, text: str, allowed: frozenset[str]) -> Prompt:
    import jinja2
    import jinja2.meta
    import jinja2.nodes

    try:
        tree = environment.parse(text)
        for node in tree.find_all((jinja2.nodes.Extends, jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport)):
            raise ConfigError(f"{origin}:{node.lineno}: a prompt is one file: extends, include and import do not work here")
        system = _take_system(tree, origin)
        parts = [part for part in (tree, system) if part is not None]
        variables = frozenset().union(*map(jinja2.meta.find_undeclared_variables, parts)) - environment.globals.keys()
        for unknown in sorted(variables - allowed):
            line = next(_lines_of(parts, unknown), 1)
            raise ConfigError(f"{origin}:{line}: unknown variable {unknown!r}; allowed are {', '.join(sorted(allowed))} (prompt_fields names more)")
        templates = [environment.from_string(part) for part in parts]
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{origin}:{error.lineno}: {error.message}") from None
    return Prompt(name, hashlib.sha256(text.encode()).hexdigest()[:16], variables, templates[0], templates[1] if system is not None else None)


def _take_system(tree: jinja2.nodes.Template, origin: str) -> jinja2.nodes.Template | None:
    """Take the block `system` out of a template and return it as one of its own."""
    import jinja2.nodes

    blocks = list(tree.find_all(jinja2.nodes.Block))
    for block in blocks:
        if block.name != SYSTEM or block not in tree.body:
            raise ConfigError(f"{origin}:{block.lineno}: block {block.name!r}: a prompt has no blocks but one {SYSTEM!r}, within nothing else")
    if not blocks:
        return None
    tree.body.remove(blocks[0])
    return jinja2.nodes.Template(blocks[0].body, lineno=blocks[0].lineno).set_environment(tree.environment)  # type: ignore[arg-type,return-value]


def _lines_of(parts: list[jinja2.nodes.Template], name: str) -> Iterator[int]:
    import jinja2.nodes

    return (node.lineno for part in parts for node in part.find_all(jinja2.nodes.Name) if node.name == name)
