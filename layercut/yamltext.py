"""YAML text that remembers where everything stood. Knows nothing of recipes."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from layercut.errors import RecipeError, did_you_mean
from layercut.smallfile import read_small

Key = str | int
# A recipe of ten thousand lines stays below these; bombs do not.
MAX_TEXT = 500_000
MAX_NODES = 500_000
MAX_DEPTH = 60
# Longer numbers stay text: Python takes long to read them and does not print them.
MAX_NUMBER = 100
MERGE = "tag:yaml.org,2002:merge"
# What to do, by how the rest of the line begins, or by words of the parser.
HINTS = (
    ("\t", "indent with spaces, not tabs"),
    ("*", "put text that begins with '*' in quotes"),
    ("%", "a percentage is written 25%"),
    ("alphabetic or numeric", "put text that begins with '*' or '&' in quotes"),
    ("unknown escape", "in double quotes a backslash is written twice; in single quotes it stands for itself"),
    ("cannot start any token", "put the value in quotes"),
    ("mapping values are not allowed", "check the indentation, and that a space follows every ':'; text with ': ' in it goes in quotes"),
    ("expected key", "check the indentation: what belongs together begins in the same column"),
    ("expected '-' indicator", "check the indentation: what belongs together begins in the same column"),
)


class YamlText:
    """A YAML mapping as plain data, with the line and column of every value and key.

    Tags that build objects are never obeyed: only null, bool, int, float and text come out. A later duplicate of a key wins
    and is listed in `duplicates`.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.duplicates: list[tuple[str, str]] = []
        """(where, key) of every key that stood twice in one mapping."""
        self._overrides: dict[tuple[Key, ...], str] = {}
        self._sizes: dict[int, int] = {}
        self._pairs: dict[int, list[tuple[yaml.Node, yaml.Node]]] = {}
        self._scalars = yaml.constructor.SafeConstructor()
        root = self._compose(text)
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError("expected a mapping such as 'model: …'", where=name)
        self._root = root
        self._measure(root, ())
        self.data: dict[str, Any] = self._build(root)

    @classmethod
    def read(cls, path: Path) -> YamlText:
        """Read a file. Raises RecipeError when it cannot be read or is not YAML."""
        try:
            return cls(read_small(path, MAX_TEXT, RecipeError).decode(), str(path))
        except OSError as error:
            hint = _beside(path) if isinstance(error, FileNotFoundError | IsADirectoryError) else None
            raise RecipeError(f"cannot read: {error.strerror}", where=path, hint=hint) from None
        except UnicodeDecodeError as error:
            raise RecipeError(f"not UTF-8 text (byte {error.start})", where=path, hint="save it as UTF-8") from None

    def override(self, assignment: str) -> None:
        """Apply `a.0.b=value`; the value is YAML. Lists are indexed by number; missing mappings are made."""
        dotted, sign, text = assignment.partition("=")
        place = f"--set {assignment}"
        if not sign or not dotted:
            raise RecipeError("expected KEY=VALUE, for example steps.0.prune.layers=8", where=place)
        try:
            value = YamlText(f"value:\n{textwrap.indent(text, ' ')}", place).data["value"]
        except RecipeError:
            raise RecipeError("the value is not YAML", where=place) from None
        target: Any = self.data
        parts = dotted.split(".")
        path: list[Key] = []
        for number, part in enumerate(parts):
            if not isinstance(target, list | dict):
                raise RecipeError(f"nothing can stand below the plain value at '{'.'.join(parts[:number])}'", where=place)
            step: Any = _position(target, part, place) if isinstance(target, list) else part
            path.append(step)
            if number == len(parts) - 1:
                target[step] = value
            else:
                if target[step] is None if isinstance(target, list) else target.get(step) is None:
                    target[step] = {}
                target = target[step]
        self._overrides[tuple(path)] = f"--set {dotted}"

    def where(self, path: Sequence[Key], *, key: bool = False) -> str:
        """`file:line:column` of the value at `path`, or of its key; the nearest place that exists when it does not."""
        for stop in range(len(path), 0, -1):
            if tuple(path[:stop]) in self._overrides:
                return self._overrides[tuple(path[:stop])]
        node: yaml.Node = self._root
        mark, pair = node.start_mark, None
        for part in path:
            pair = self._find(node, part)
            if pair is None:  # a component that is not in the text, such as the tag of a union
                continue
            node = pair[1]
            mark = (pair[0] if key else node).start_mark
        below = next((said for place, said in self._overrides.items() if place[: len(path)] == tuple(path)), None)
        if pair is None and below is not None:  # not in the text: an override made it
            return below
        return f"{self.name}:{mark.line + 1}:{mark.column + 1}"

    def present(self, path: Sequence[Key]) -> tuple[Key, ...]:
        """The components of a path that stand in the data; others, such as the tag of a union, are left out."""
        value: Any = self.data
        found: list[Key] = []
        for part in path:
            if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
                value = value[part]  # type: ignore[index]
                found.append(part)
        return tuple(found)

    def _compose(self, text: str) -> yaml.Node | None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            return yaml.compose(text, Loader=loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self.name if mark is None else f"{self.name}:{mark.line + 1}:{mark.column + 1}"
            if "nesting depth" in str(error.problem):  # libyaml counts for itself
                raise RecipeError("nested too deeply", where=place) from None
            if error.problem == "but found another document":
                several = "split them at '---'; a later one names the output folder of an earlier one as its model"
                raise RecipeError("several recipes in one file", where=place, hint=several) from None
            problem, opening = str(error.problem or error.context), error.context_mark
            if "quoted scalar" in str(error.context) and opening is not None and "end of" in problem:  # the end says nothing
                place, problem = f"{self.name}:{opening.line + 1}:{opening.column + 1}", "this quote is not closed"
            line = "" if mark is None else "".join(text.splitlines()[mark.line : mark.line + 1])[mark.column :]
            hint = next((hint for sign, hint in HINTS if line.startswith(sign) or sign in problem), None)
            if "expected ','" in problem and mark is not None and opening is not None and opening.line < mark.line:
                hint = f"is the bracket of line {opening.line + 1} closed?"
            raise RecipeError(f"not valid YAML: {problem}", where=place, hint=hint) from None
        except yaml.YAMLError as error:
            raise RecipeError(f"not valid YAML: {error}".splitlines()[0], where=self.name) from None
        except RecursionError:
            raise RecipeError("nested too deeply", where=self.name) from None

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _children(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            return [part for pair in node.value for part in pair]
        return list(node.value) if isinstance(node, yaml.SequenceNode) else []

    def _measure(self, node: yaml.Node, above: tuple[int, ...]) -> int:
        """Number of nodes once aliases are written out; refuses loops, bombs and towers before anything is built."""
        if id(node) in above:
            raise RecipeError("an alias that contains itself", where=self._place(node))
        if len(above) > MAX_DEPTH:
            raise RecipeError("nested too deeply", where=self._place(node))
        if id(node) not in self._sizes:
            size = 1 + sum(self._measure(child, (*above, id(node))) for child in self._children(node))
            if size > MAX_NODES:
                raise RecipeError(f"aliases expand to more than {MAX_NODES:,} values", where=self._place(node))
            self._sizes[id(node)] = size
        return self._sizes[id(node)]

    def _entries(self, node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes with merge keys (`<<`) written out: own keys win, and the first of several merged mappings."""
        if id(node) in self._pairs:
            return self._pairs[id(node)]
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == MERGE:
                for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(source, yaml.MappingNode):
                        raise RecipeError("'<<' takes a mapping or a list of mappings", where=self._place(value))
                    for pair in self._entries(source):
                        merged.setdefault(pair[0].value, pair)
            elif not isinstance(key, yaml.ScalarNode):
                raise RecipeError("a key must be text", where=self._place(key))
            else:
                if key.value in own:
                    self.duplicates.append((self._place(key), key.value))
                own[key.value] = (key, value)
        pairs = list({**merged, **own}.values())
        self._pairs[id(node)] = pairs
        return pairs

    def _find(self, node: yaml.Node, part: Key) -> tuple[yaml.Node, yaml.Node] | None:
        if isinstance(node, yaml.MappingNode):
            return next((pair for pair in self._entries(node) if pair[0].value == part), None)
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and 0 <= part < len(node.value):
            return node.value[part], node.value[part]
        return None

    def _build(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return {key.value: self._build(value) for key, value in self._entries(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self._build(child) for child in node.value]
        kind = node.tag.rpartition(":")[2]
        if kind in ("null", "bool", "int", "float") and len(node.value) <= MAX_NUMBER:
            with contextlib.suppress(ValueError, LookupError):  # an explicit tag on text that is no such thing
                return self._scalars.construct_object(node)
        return node.value


class PlainData(YamlText):
    """Data that came from no text: a place is the keys that lead there, joined by dots."""

    def __init__(self, data: Mapping[str, Any], name: str = "recipe") -> None:
        super().__init__(json.dumps(data, default=str), name)

    def where(self, path: Sequence[Key], *, key: bool = False) -> str:
        """`recipe.steps.0.prune`: what of the path there is, and the key itself where it is at fault."""
        found = self.present(path[:-1]) + tuple(path[-1:]) if key else self.present(path)
        return ".".join(map(str, (self.name, *found)))


def _position(target: list[Any], part: str, place: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,6}", part) or not -len(target) <= int(part) < len(target):
        raise RecipeError(f"'{part}' is not a position in a list of {len(target)}", where=place)
    return int(part) % len(target)


def _beside(path: Path) -> str:
    """What to do about a file that is no recipe: the one that may be meant, or how to begin one."""
    near = None
    with contextlib.suppress(OSError):
        near = did_you_mean(path.name, (one.name for one in path.parent.iterdir() if one.suffix in (".yaml", ".yml", ".json")), 0.8)
    return near or "a recipe is a YAML file; `layercut new` lists some to begin with"
