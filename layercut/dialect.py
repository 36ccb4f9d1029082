"""The words of mergekit's dialect: model references, settings, numbers, dtypes. Knows nothing of slices and merge methods."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from layercut.errors import RecipeError, did_you_mean
from layercut.yamltext import Key, YamlText

Place = tuple[Key, ...]
DTYPES = ("float16", "bfloat16", "float32", "float64")
SHORT = {
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}
NUMBER = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,2})?")
BOUND = re.compile(r"[+-]?[0-9]{1,15}")
EVERY = (None, "", "*")
"""Filters that match every name: mergekit tests for a substring, and takes `*` for a lack of one."""


class Reader:
    """Reads values of one text, and keeps notes on what it ignores. Works on a copy of the data."""

    def __init__(self, text: YamlText) -> None:
        self.text = text
        self.data: dict[str, Any] = copy.deepcopy(text.data)
        self.notes: list[str] = []
        models = self.data.get("models")
        self.aliases: Collection[str] = models.keys() if isinstance(models, dict) else ()

    def error(self, message: str, *path: Key, key: bool = False, hint: str | None = None) -> RecipeError:
        """An error at the value at `path`, or at its key."""
        return RecipeError(" ".join(message.split()), where=self.text.where(path, key=key), hint=hint)

    def note(self, message: str, *path: Key, key: bool = True, hint: str | None = None) -> None:
        """A warning at the key at `path`, or at its value."""
        self.notes.append(str(self.error(message, *path, key=key, hint=hint)))

    def check_keys(self, value: dict[str, Any], path: Place, known: Sequence[str], needed: Sequence[str] = ()) -> None:
        """Note keys that nothing reads. Raises RecipeError when one is a misspelling of a needed key that is missing."""
        absent = [key for key in needed if key not in value]
        for key in value:
            if key not in known:
                self.unknown(key, path, known, absent)

    def unknown(self, key: str, path: Place, known: Sequence[str], absent: Sequence[str]) -> None:
        """Note an unknown key, or refuse it when it is near to a key that is missing."""
        hint = did_you_mean(key, known)
        if hint is not None and hint == did_you_mean(key, absent):
            raise self.error(f"unknown key '{key}'", *path, key, key=True, hint=hint)
        self.note(f"unknown key '{key}' is ignored", *path, key, hint=hint)

    def reference(self, value: Any, path: Place) -> Any:
        """A model reference as text, `path` or `path@revision`. What is neither text nor a mapping is left for `Recipe` to refuse."""
        if isinstance(value, dict):
            return self._mapped(value, path)
        if not isinstance(value, str) or value in self.aliases:
            return value
        if ("+" in value or "@" in value) and _exists(value):
            return _folder(value)
        base, plus, adapter = value.partition("+")
        if plus:
            raise self._adapter(f"no folder {shown(value)}; ", f" (+{adapter})", path)
        folder, at, revision = base.partition("@")
        return _folder(folder) + at + revision

    def _mapped(self, value: dict[str, Any], path: Place) -> Any:
        """`{path, revision}`, or `{model, lora, override_architecture}` whose model is text or such a mapping."""
        if value.get("lora") is not None:
            raise self._adapter("", "", (*path, "lora"))
        self.check_keys(value, path, ("model", "path", "revision", "lora", "override_architecture"), ("model", "path"))
        if value.get("override_architecture") is not None:
            self.note("'override_architecture' is ignored: the architecture is read from the checkpoint", *path, "override_architecture")
        name = "model" if value.get("model") is not None else "path"
        if value.get(name) is None:
            raise self.error("a model reference is text, or a mapping with 'path'", *path)
        found, revision = self.reference(value[name], (*path, name)), value.get("revision")
        if revision is None or not isinstance(found, str):
            return found
        if not isinstance(revision, str):
            raise self.error(f"'revision' is text, found {shown(revision)}", *path, "revision", hint="put it in quotes")
        if "@" in found:
            raise self.error(f"'revision' stands beside a path that has one, {shown(found)}", *path, "revision")
        return f"{found}@{revision}"

    def _adapter(self, before: str, after: str, path: Place) -> RecipeError:
        hint = "merge it into the model first, for example with peft's merge_and_unload"
        return self.error(f"{before}LoRA adapters are not applied{after}", *path, hint=hint)

    def setting(self, value: Any, path: Place) -> Any:
        """A setting in one spelling: a number, a list of numbers (a gradient), or a list of `{filter, value}`."""
        if isinstance(value, dict):
            return [self._conditional(value, path)]
        if isinstance(value, list):
            return [self._conditional(part, (*path, at)) if isinstance(part, dict) else number(part) for at, part in enumerate(value)]
        return number(value)

    def _conditional(self, entry: dict[str, Any], path: Place) -> dict[str, Any]:
        self.check_keys(entry, path, ("filter", "value"), ("filter", "value"))
        kept: dict[str, Any] = {} if entry.get("filter") in EVERY else {"filter": entry["filter"]}
        if "value" in entry:
            value = entry["value"]
            kept["value"] = [number(part) for part in value] if isinstance(value, list) else number(value)
        return kept

    def dtype(self, value: Any, *path: Key) -> str:
        """One of `DTYPES`, from any of its usual names."""
        name = value.strip().lower().removeprefix("torch.") if isinstance(value, str) else ""
        name = SHORT.get(name, name)
        if name not in DTYPES:
            hint = did_you_mean(name, DTYPES) or "leave it out to keep that of the source"
            raise self.error(f"'{path[-1]}' is one of {', '.join(DTYPES)}, found {shown(value)}", *path, hint=hint)
        return name

    def weights(self, levels: Sequence[Any], path: Place) -> list[float]:
        """Every weight that a source can take in some layer or tensor."""
        found = _reachable(levels, "weight", 1)
        for weight in found:
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
                raise self.error(f"a weight is a number, found {shown(weight)}", *path)
        return found


def is_normalised(levels: Sequence[Any]) -> bool:
    """Whether the weights of a slice are divided by their sum, for every tensor."""
    return all(value is True for value in _reachable(levels, "normalize", True))


def _reachable(levels: Sequence[Any], name: str, default: Any) -> list[Any]:
    """Every value that a parameter can take. Levels are tried in order; one whose filters all miss hands on to the next."""
    found: list[Any] = []
    for level in levels:
        setting = level.get(name) if isinstance(level, dict) else None
        if setting is None or setting == []:
            continue
        parts = setting if isinstance(setting, list) else [setting]
        for part in parts:
            value = part.get("value") if isinstance(part, dict) else part
            found += [number(single) for single in (value if isinstance(value, list) else [value])]
            if isinstance(part, dict) and part.get("filter") in EVERY:
                return found
        if not all(isinstance(part, dict) for part in parts):
            return found
    return [*found, default]


def number(value: Any) -> Any:
    """mergekit takes a number in quotes, and one that YAML 1.1 takes for text, such as 1e-3."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def bound(value: Any) -> Any:
    """mergekit takes '2' and 2.0 for a boundary."""
    if isinstance(value, str) and BOUND.fullmatch(value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def shown(value: Any) -> str:
    """A value in a message."""
    text = "nothing" if value is None else f"'{value}'" if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _exists(name: str) -> bool:
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long, a null character, no such user
        return Path(name).expanduser().exists()
    return False


def _folder(name: str) -> str:
    return name.rstrip("/") or name
