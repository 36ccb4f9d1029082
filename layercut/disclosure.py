"""What of a report may leave this machine: everything but its folders, where it was published before, and where it is to be."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from layercut.report import Report, ReportSource
from layercut.stated import is_repo

# An absolute path, or one below a home: from its first sign to the next blank or quote. Web addresses are none.
_PATH = re.compile(r"""(?<![\w:/.~%+…-])(?:~[\w.-]*/|/(?=[\w.~-])|[A-Za-z]:[\\/]|\\\\(?=\w))[^\s'"`<>|,;()\[\]{}]*""")
HIDDEN = "./…"
"""What stands for a folder of this machine in running text."""

_MODEL_KEYS = {"model", "base_model", "tokenizer_source", "models", "reference", "donor", "from_model", "to_model", "a", "b"}
"""Keys under which a model is named: by its reference, or by an alias that may be the same."""
_BY_MODEL = {"sources", "kept", "dropped", "dtype"}
"""Keys of what is kept by model."""
_PATH_KEYS = {"path", "dataset"}
"""Keys of places of data and of the output."""
_PROSE = {"notes", "reason", "what", "where", "chosen"}
"""Keys of sentences, in which what looks like an absolute path is one."""


def repo_of(source: ReportSource) -> str | None:
    """The repository of a source, or None for one that is not from the Hub."""
    repo = source.reference.partition("@")[0]
    return repo if source.revision is not None and is_repo(repo) else None


def stand_in(number: int) -> str:
    """What stands for the reference of a local source, in order from 1: a path that works once a folder is put there."""
    return "./local-model" if number == 1 else f"./local-model-{number}"


def disclosed(report: Report) -> Report:
    """The report as it is published: without paths of this machine, and without `upload` and `published`.

    A report that holds none of this comes out equal.
    """
    plain = report.model_dump(mode="json")
    plain["published"] = None
    plain["recipe"].pop("upload", None)
    return Report.model_validate(_Veil(report).over(plain))


def pinned(recipe: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """The recipe with every model of the Hub at the commit that was used, so that it gives the same again. Aliases stay."""
    pins = {}
    for source in report.sources.values():
        repo = repo_of(source)
        if repo is not None and source.reference not in recipe.get("models", {}):
            pins[source.reference] = f"{repo}@{source.revision}"

    def walk(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: walk(inner, key if key == "models" else name) for name, inner in value.items()}
        if isinstance(value, list):
            return [walk(inner, key) for inner in value]
        return pins.get(value, value) if key in _MODEL_KEYS and isinstance(value, str) else value

    return {key: walk(value, key) for key, value in recipe.items()}


class _Veil:
    """Replaces what names folders of this machine."""

    def __init__(self, report: Report) -> None:
        local = dict.fromkeys(source.reference for source in report.sources.values() if repo_of(source) is None)
        self.names = {reference: stand_in(number) for number, reference in enumerate(local, 1)}
        """What stands for each reference of a local source."""
        folders = dict(self.names)
        for reference, name in self.names.items():
            spread = os.path.expanduser(reference)  # noqa: PTH111 - Path.expanduser raises where there is no such user
            if "\0" not in spread:
                folders |= {os.path.abspath(spread): name, os.path.realpath(spread): name}  # noqa: PTH100 - a name may be none
        for place in (os.getcwd(), os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))):  # noqa: PTH109, PTH111
            folders.setdefault(place, HIDDEN)
        # Longest first: one may lie in another. The root and bare names are parts of words.
        places = sorted((place for place in folders if len(place) > 1 and re.search(r"[/\\]", place)), key=len, reverse=True)
        self.folders = {place: folders[place] for place in places}

    def over(self, value: Any, key: str = "", prose: bool = False) -> Any:
        """A value without them, whatever it holds; `key` is the one that it stands under."""
        if isinstance(value, dict):
            by_model = key in _BY_MODEL
            return {
                self.names.get(name, self._text(name)) if by_model else self._text(name): self.over(
                    inner, key if key == "models" else name, prose or name in _PROSE
                )
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [self.over(inner, key, prose) for inner in value]
        if not isinstance(value, str):
            return value
        if key in _MODEL_KEYS and value in self.names:
            return self.names[value]
        if key in _PATH_KEYS:
            return _inside(value)
        return _PATH.sub(HIDDEN, self._text(value)) if prose else self._text(value)

    def _text(self, text: str) -> str:
        for folder, name in self.folders.items():
            text = text.replace(folder, name)
        return text


def _inside(path: str) -> str:
    """A path of data or of an output: of one that leads out of the working folder the last part is left."""
    parts = path.replace("\\", "/").rstrip("/").split("/")
    outside = path.startswith(("/", "~", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", path)
    return f"./{parts[-1].rpartition(':')[2].strip('~.') or 'data'}" if outside else path
