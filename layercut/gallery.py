"""The gallery: the starter recipes that come with the package. Finds them and reads their heads; what a recipe means it does not know."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from layercut.errors import LayercutError, did_you_mean

if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable

FOLDER = "recipes"
SCHEMA = "# yaml-language-server:"
WIDTH = 96
# A full stop that ends a sentence: the next begins with a capital letter ("et al. (arXiv …)" goes on).
SENTENCE = re.compile(r"(?<=\.) (?=[A-Z])")


class Starter(NamedTuple):
    """A starter recipe."""

    name: str
    group: str
    """The folder below the gallery that it stands in; empty for those at the top."""
    text: str
    """The recipe, ready to be saved as `NAME.yaml`."""

    @property
    def summary(self) -> str:
        """The first sentence of its head; of one that is longer than a line, what stands before the colon."""
        lines = []
        for line in self.text.splitlines():
            words = line.removeprefix("#").strip()
            if not line.startswith("#") or not words:
                break
            lines.append(words)
        sentence = SENTENCE.split(" ".join(lines))[0]
        if len(sentence) > WIDTH and ": " in sentence:
            sentence = sentence.partition(": ")[0] + "."
        return sentence if len(sentence) <= WIDTH else sentence[: WIDTH - 3].rsplit(" ", 1)[0].rstrip(" ,:;") + " ..."


def gallery_folder(package: Traversable) -> Traversable:
    """The recipes inside an installed package, or beside it in a source checkout. Raises LayercutError when neither is there."""
    inside = package / FOLDER
    if inside.is_dir():
        return inside
    if isinstance(package, Path) and (package.parent / "pyproject.toml").is_file() and (package.parent / FOLDER).is_dir():
        return package.parent / FOLDER
    raise LayercutError("the starter recipes are missing from this installation", where=str(inside), hint="install layercut again")


def starters(folder: Traversable | None = None) -> tuple[Starter, ...]:
    """All starter recipes, those at the top first, each group by name."""
    found = _read(gallery_folder(files("layercut")) if folder is None else folder, "")
    return tuple(sorted(found, key=lambda starter: (starter.group, starter.name)))


def starter(name: str, folder: Traversable | None = None) -> Starter:
    """One recipe by its name, with or without `.yaml`. Raises LayercutError when there is none, naming the nearest."""
    found = {one.name: one for one in starters(folder)}
    plain = name.removesuffix(".yaml")
    if plain not in found:
        hint = did_you_mean(plain, found) or "`layercut new` lists them"
        raise LayercutError(f"no starter recipe is named '{name}'", hint=hint)
    return found[plain]


def _read(folder: Traversable, group: str) -> Iterator[Starter]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _read(entry, f"{group}/{entry.name}".lstrip("/"))
        elif entry.name.endswith(".yaml"):
            name = entry.name.removesuffix(".yaml")
            yield Starter(name, group, _portable(entry.read_text(encoding="utf-8"), name, group))


def _portable(text: str, name: str, group: str) -> str:
    """The text without what is true in the repository only: the path of the schema, and its own path in the command."""
    lines = text.splitlines(keepends=True)
    if lines and lines[0].startswith(SCHEMA):
        lines = lines[2:] if lines[1:2] == ["#\n"] else lines[1:]
    path = "/".join(part for part in (FOLDER, group, f"{name}.yaml") if part)
    return "".join(lines).replace(f"layercut run {path}", f"layercut run {name}.yaml", 1)
