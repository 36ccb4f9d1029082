"""Faults of a recipe in words: what pydantic found becomes one clear line for each mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core.core_schema import ErrorType

from layercut.errors import RecipeError, did_you_mean
from layercut.yamltext import Key, YamlText

MOST = 12
"""Mistakes that are told at once."""

Origin = Callable[[Sequence[Key]], tuple[Key, ...]]


def fault_lines(error: ValidationError, text: YamlText, root: type[BaseModel], origin: Origin = tuple) -> list[str]:
    """One line for each mistake: place in the text, what was found, what to do.

    `root` is the model that was validated; `origin` tells where in the text a place in the data stood.
    """
    lines = _once(dict.fromkeys(_line(fault, text, root, origin) for fault in _causes(error.errors())))
    more = len(lines) - MOST
    return lines if more <= 0 else [*lines[:MOST], f"and {more} more mistake{'s' if more > 1 else ''}; is this a recipe?"]


def _once(lines: Iterable[str]) -> list[str]:
    """The lines, with what is known in one place said once."""
    told: dict[str, str] = {}
    parts = [(line, *line.rpartition("; known ")) for line in lines]
    return [head if head and told.setdefault(known, line) != line else line for line, head, _, known in parts]


def _causes(faults: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Faults that are mistakes of the writer: a list that lost its faulty entries is not too short, a misspelt key not missing too."""
    misspelt = {fault["loc"][:-1] for fault in faults if fault["type"] == "extra_forbidden"}
    for fault in faults:
        path, kind = fault["loc"], fault["type"]
        caused = kind == "too_short" and any(other["loc"][: len(path)] == path and other is not fault for other in faults)
        if not caused and not (kind == "missing" and path[:-1] in misspelt):
            yield fault


def _line(fault: ErrorDetails, text: YamlText, root: type[BaseModel], origin: Origin) -> str:
    """One line for a fault that pydantic found: place, what was found, what to do."""
    path, kind, context = fault["loc"], fault["type"], fault.get("ctx", {})
    hint = None
    if kind == "extra_forbidden":
        known = sorted(_known(path[:-1], root))
        what = ("operation", "operations") if path[:1] == ("steps",) and len(path) == 3 else ("key", "keys")
        message = f"unknown {what[0]} '{path[-1]}'"
        hint = _unknown(str(path[-1]), path, fault.get("input"), root)
        hint = hint or did_you_mean(str(path[-1]), known) or f"known {what[1]} are {', '.join(known)}"
    elif kind == "missing":
        message = f"'{path[-1]}' is missing"
    elif kind.startswith("union_tag"):
        name = context["discriminator"].strip("'")
        known = sorted(_tags(path, name, root))
        message = f"'{name}' is missing" if kind == "union_tag_not_found" else f"unknown {name} '{context['tag']}'"
        hint = did_you_mean(context.get("tag", ""), known) or f"known are {', '.join(known)}"
        path = (*path, name)
    elif kind in ("value_error", "assertion_error") or kind not in get_args(ErrorType):
        message = _with_found(str(context.get("error", fault["msg"])), fault.get("input"))
        path = (*path, context["at"]) if "at" in context else path
    else:
        shown = ".".join(str(part) for part in text.present(origin(path)))
        message = f"{shown or 'recipe'}: {_expected(fault)}, found {_shown(fault.get('input'))}"
        if kind == "literal_error" and isinstance(fault.get("input"), str):
            hint = did_you_mean(fault["input"], re.findall("'([^']+)'", context["expected"]), 0.5)
        if kind == "tuple_type" and isinstance(fault.get("input"), Mapping):
            hint = "begin each entry with a dash and a space"
    where = text.where(origin(path), key=kind == "extra_forbidden" or "at" in context)
    line = str(RecipeError(message, where=where, hint=hint))
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)


def _unknown(key: str, path: Sequence[Key], value: Any, root: type[BaseModel]) -> str | None:
    """What to do about a key that is none because of how it is written, or because it stands too far to the left."""
    if value is None and ":" in key:
        return "write a space behind the ':'"
    if value is None and re.fullmatch("-?[0-9]+(-[0-9]+)?", key.strip()):
        return "a list goes in brackets, such as [3, 4]"
    homes = [f"'{name}'" for name in root.model_fields if len(path) == 1 and key in _known((name,), root) - {*root.model_fields}]
    return f"it belongs below {' or '.join(homes)}" if homes else None


def _with_found(message: str, found: Any) -> str:
    """Add a plain value that the message does not show already."""
    return message if isinstance(found, Mapping | list | tuple) or _shown(found) in message else f"{message}, found {_shown(found)}"


EXPECTED = {
    "int_type": "expected a whole number", "int_parsing": "expected a whole number", "int_from_float": "expected a whole number",
    "string_type": "expected text", "bool_type": "expected true or false", "bool_parsing": "expected true or false",
    "tuple_type": "expected a list", "dict_type": "expected a mapping", "model_type": "expected a mapping",
    "model_attributes_type": "expected a mapping", "float_parsing": "expected a number", "too_short": "expected at least one entry",
    "string_too_short": "expected some text", "greater_than_equal": "expected at least {ge}", "less_than_equal": "expected at most {le}",
    "greater_than": "expected more than {gt:g}",
}  # fmt: skip


def _expected(fault: ErrorDetails) -> str:
    known = EXPECTED.get(fault["type"])
    text = fault["msg"].replace("Input should be", "expected") if known is None else known.format(**fault.get("ctx", {}))
    return text[0].lower() + text[1:]


def _shown(value: Any) -> str:
    text = "nothing" if value is None else f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _known(path: Iterable[Key], root: type[BaseModel]) -> set[str]:
    """Keys that are known at a place of the recipe, over all forms that it can take where the path names none of them."""
    return {field.alias or name for kind in _kinds(path, root) for name, field in kind.model_fields.items()}


def _tags(path: Iterable[Key], name: str, root: type[BaseModel]) -> set[str]:
    """Values of the key that tells the forms apart which a place of the recipe can take."""
    return {str(kind.model_fields[name].default) for kind in _kinds(path, root) if name in kind.model_fields}


def _kinds(path: Iterable[Key], root: type[BaseModel]) -> list[type[BaseModel]]:
    kinds: list[type[BaseModel]] = [root]
    for part in path:
        fields = [kind.model_fields[str(part)].annotation for kind in kinds if isinstance(part, str) and part in kind.model_fields]
        tagged = [kind for kind in kinds if any(get_args(field.annotation) == (part,) for field in kind.model_fields.values())]
        kinds = [model for field in fields for model in _models(field)] or tagged or kinds
    return kinds


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models that stand anywhere in an annotation."""
    if get_origin(annotation) is not None:
        for part in get_args(annotation):
            yield from _models(part)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
