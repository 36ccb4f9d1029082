"""What the card of a model states about it: licence, languages, data, task. Cards come from anyone: only plain, short values are taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from layercut.errors import RecipeError
from layercut.header import quoted
from layercut.yamltext import YamlText

CARD = "README.md"
"""The card of a model."""
MAX_CARD = 500_000
"""Characters of a card that are looked at; the Hub shows no longer ones."""
MAX_ENTRIES = 500
"""Entries of a list of a card that are taken."""

_BLOCK = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_WORD = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,60}", re.ASCII | re.IGNORECASE)
_REPO = re.compile(r"(?=.{1,96}\Z)(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?/)?[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?", re.ASCII)
_FILE = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,100}", re.ASCII)


class Licence(NamedTuple):
    """A licence as cards write it. Without an identifier none is stated."""

    ids: tuple[str, ...] = ()
    """Identifiers of the Hub, normally one; `other` goes with a name."""
    name: str | None = None
    link: str | None = None
    """A web address, or a file of the repository."""

    def __str__(self) -> str:
        if not self.ids:
            return "states no licence"
        return f"states {', '.join(self.ids)}{'' if self.name is None else f' ({quoted(self.name)[1:-1]})'}"


class Stated(NamedTuple):
    """What a card states."""

    licence: Licence = Licence()
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    pipeline_tag: str | None = None


class Card(NamedTuple):
    """A card in two parts."""

    metadata: Mapping[str, Any]
    """Empty when there is none that can be read."""
    body: str


def split_card(text: str) -> Card:
    """Metadata and body of a card. Metadata that is no YAML mapping counts as none, and stays out of the body."""
    found = _BLOCK.match(text[:MAX_CARD])
    if found is None:
        return Card({}, text)
    try:
        data = YamlText(found.group(1), CARD).data
    except RecipeError:
        data = {}
    return Card(data, text[found.end() :])


def read_stated(text: str) -> Stated:
    """What a card states. What is not of the form that the Hub takes is passed over."""
    data = split_card(text).metadata
    tag = data.get("pipeline_tag")
    name, link = data.get("license_name"), data.get("license_link")
    return Stated(
        licence=Licence(
            ids=_list(data.get("license"), _WORD),
            name=name if isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() else None,
            link=link if isinstance(link, str) and (is_web(link) or _FILE.fullmatch(link)) else None,
        ),
        # YAML takes the code of Norwegian for a truth value.
        languages=_list(["no" if code is False else code for code in _many(data.get("language"))], _WORD),
        datasets=_list(data.get("datasets"), _REPO),
        pipeline_tag=tag if isinstance(tag, str) and _WORD.fullmatch(tag) else None,
    )


def is_repo(name: str) -> bool:
    """Whether a repository of the Hub could have this name: `org/name`, or `name` for the oldest ones."""
    return bool(_REPO.fullmatch(name)) and "--" not in name and ".." not in name and not name.endswith(".git")


def is_web(link: str) -> bool:
    """Whether a link is a plain web address."""
    if len(link) > 500 or not link.isprintable() or set(link) & set(" <>\"'`\\"):
        return False
    try:
        parts = urlsplit(link)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc


def pinned_link(link: str | None, repo: str | None, revision: str | None, files: Mapping[str, object]) -> str | None:
    """A licence link that works beside the output: a file goes along, or is the one of the source at its commit."""
    if link is None or is_web(link) or link in files:
        return link
    if repo is None:
        return None
    return f"https://huggingface.co/{repo}/blob/{quote(revision or 'main', safe='')}/{quote(link)}"


def _many(value: Any) -> list[Any]:
    """One value or a list of them, as a list."""
    return list(value[:MAX_ENTRIES]) if isinstance(value, list) else [] if value is None else [value]


def _list(value: Any, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """The entries of the right form, each once."""
    return tuple(dict.fromkeys(entry for entry in _many(value) if isinstance(entry, str) and pattern.fullmatch(entry)))
