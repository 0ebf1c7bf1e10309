"""Loading a stage's config: YAML, then overrides, then the checks. Every mistake is one line that names the key."""

from __future__ import annotations

import importlib
import inspect
import json
import types
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tpt_megatron.errors import ConfigError

STAGES = ("augment", "preprocess", "train", "evaluate", "losses", "value", "experiment", "launch")


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, no NaN; what is not stated has the class's default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _tuple_of_one(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


OneOrMore = Annotated[tuple[str, ...], BeforeValidator(_tuple_of_one)]
"""A list of strings, or one string, which stands for a list of one."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML's own takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands here a second time", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


SomeConfig = TypeVar("SomeConfig", bound=Config)

_EXPECTED = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a group of keys"),
    "tuple_type": "a list",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text, in quotes",
    "path_type": "a path",
}
"""What a key should have, by pydantic's type of the mistake: its own words are Python's."""


def load_config(kind: type[SomeConfig], name: str, overrides: Sequence[str] = ()) -> SomeConfig:
    """Return the config of `kind` from a YAML file or a recipe's name, with `key=value` overrides (values are YAML).

    Raises ConfigError for a missing file, broken YAML, an unknown key, a wrong type or an impossible combination.
    """
    values, origin = read_values(name, overrides)
    return check_config(kind, values, origin)


def read_values(name: str, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Return what a YAML file or a recipe says, with overrides, unchecked; and where it stands, for messages. ConfigError as `load_config`."""
    text, origin = read_config(name)
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: 2024-99-99 looks like a date
        mark = getattr(error, "problem_mark", None)
        place = f"{origin}:{mark.line + 1}" if mark else origin
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if values is None and not overrides:
        raise ConfigError(f"{origin}: the file has no keys")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: a config is a mapping of keys to values, found a {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    return values, origin


def check_config(kind: type[SomeConfig], values: dict[str, Any], origin: str) -> SomeConfig:
    """Return `values` as a checked config; ConfigError with one line for every mistake found."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        lines = [*_unknown_keys(kind, details), *(_explain(detail) for detail in details if detail["type"] != "extra_forbidden")]
        raise ConfigError("; ".join(f"{origin}: {line}" for line in lines)) from None


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    folder = resources.files("tpt_megatron") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_config(name: str) -> tuple[str, str]:
    """Return the text of a YAML file or a recipe, and where it stands. ConfigError when there is none."""
    if not name:
        raise ConfigError("the config's name is empty; give a YAML file or a recipe")
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"{name}: a folder, and no config file")
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), name
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: not valid UTF-8 at byte {error.start}") from None
    if name in recipe_names():
        return (resources.files("tpt_megatron") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"), f"recipe {name}"
    raise ConfigError(f"{name}: no such config file, and no recipe of that name (recipes: {', '.join(recipe_names())})")


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change `values` as `key=value` says; ConfigError when it does not say that."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key=value")
    try:
        value = yaml.load(text, _Loader) if text else None
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None
    *parents, last = key.strip().split(".")
    here: Any = values
    for i, parent in enumerate(parents):
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parents[: i + 1])} is a value, not a group of keys")
    here[last] = value


def _unknown_keys(kind: type[BaseModel], details: Sequence[ErrorDetails]) -> list[str]:
    """Return a line for each place that has keys which it does not know."""
    places: dict[tuple[int | str, ...], list[str]] = {}
    for detail in details:
        if detail["type"] == "extra_forbidden":
            places.setdefault(detail["loc"][:-1], []).append(repr(_key(detail)))
    return [f"unknown key{'s' * (len(keys) > 1)} {', '.join(keys)}; allowed here: {', '.join(_keys_at(kind, place))}" for place, keys in places.items()]


def _explain(detail: ErrorDetails) -> str:
    key, mistake, context = _key(detail), detail["type"], detail.get("ctx", {})
    value = detail["input"]
    shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # null, true, false
    match mistake:
        case "missing":
            return f"key {key!r} is missing"
        case "union_tag_not_found":
            return f"key '{key}.kind' is missing"
        case "union_tag_invalid":
            return f"{key}.kind={context['tag']!r}: must be one of {context['expected_tags']}"
        case "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            return f"{key}: {message}" if key else message
        case "too_short":
            return f"{key}={shown}: expected at least {context['min_length']} of them"
        case _ if mistake in _EXPECTED:
            return f"{key}={shown}: expected {_EXPECTED[mistake]}"
        case _:
            message = detail["msg"].replace("Input should be ", "must be ")
            return f"{key}={shown}: {message[0].lower()}{message[1:]}"


def _key(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _keys_at(kind: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys allowed at a place: walks nested configs, lists and tagged unions."""
    candidates: list[type[BaseModel]] = [kind]
    for part in location:
        inner: list[type[BaseModel]] = []
        for candidate in candidates:
            if isinstance(part, str) and part in candidate.model_fields:
                inner += _models_in(candidate.model_fields[part].annotation)
        candidates = inner or candidates
        if isinstance(part, str) and not inner:  # a union's tag
            tagged = [candidate for candidate in candidates if part in _tags(candidate)]
            candidates = tagged or candidates
    return sorted({name for candidate in candidates for name in (*candidate.model_fields, *getattr(candidate, "further_keys", ()))})


def _tags(candidate: type[BaseModel]) -> tuple[Any, ...]:
    field = candidate.model_fields.get("kind")
    return get_args(field.annotation) if field else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, list, dict):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []


def describe_keys(stage: str) -> str:
    """Return the config keys of a stage, one a line with type and default, under each group's own explanation."""
    module = importlib.import_module(f"tpt_megatron.config.{stage}") if stage in STAGES else None
    if module is None:
        raise ConfigError(f"{stage!r} is no stage with a config; the stages are {', '.join(STAGES)}")
    return "\n\n".join(_describe(getattr(module, f"{stage.capitalize()}Config"), ""))


def _describe(kind: type[BaseModel], prefix: str) -> list[str]:
    shared = [base for base in kind.__mro__[1:] if issubclass(base, Config) and base is not Config]
    lines = [*(inspect.cleandoc(described.__doc__ or "") for described in (kind, *shared)), ""]
    deeper: list[str] = []
    for name, field in kind.model_fields.items():
        lines.append(f"  {prefix}{name}: {_type_name(field.annotation)} ({_default(field)})")
        for model in _models_in(field.annotation):
            deeper += _describe(model, f"{prefix}{name}.")
    return ["\n".join(lines), *deeper]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "optional group" if isinstance(default, BaseModel) else f"default {default!r}"


def _type_name(annotation: Any) -> str:
    """Return a type as a person would write it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if annotation is Ellipsis:
        return "..."
    if annotation is types.NoneType:
        return "null"
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type_name, arguments))}]" if arguments else name
