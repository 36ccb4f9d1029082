"""JSON text whose values can be replaced in place: every byte that is not asked for keeps its spelling and order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]  # documented nowhere, there since Python 2.6
from typing import Any, NamedTuple

Path = tuple[str, ...]
BLANK = re.compile(r"[ \t\r\n]*")


class Span(NamedTuple):
    """Where a member of an object stands: its key, and its value."""

    key: int
    start: int
    stop: int


def spans(text: str, at: Path = ()) -> dict[str, Span]:
    """Positions of the members of the object at `at`, in order.

    The text must be valid JSON without duplicate keys. KeyError when `at` is no object.
    """
    start = 0
    for part in at:
        start = _members(text, start)[part].start
    return _members(text, start)


def _members(text: str, start: int) -> dict[str, Span]:
    decoder = json.JSONDecoder()
    position = _skip(text, start)
    if text[position] != "{":
        raise KeyError("not an object")
    found: dict[str, Span] = {}
    position = _skip(text, position + 1)
    while text[position] != "}":
        key, after = scanstring(text, position + 1, True)
        value = _skip(text, _skip(text, after) + 1)
        _, stop = decoder.raw_decode(text, value)
        found[key] = Span(position, value, stop)
        position = _skip(text, stop)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return found


def replace(text: str, values: Mapping[Path, Any]) -> str:
    """Write new values over old ones, in the layout that the old ones had; a new key goes to the end of its object.

    KeyError when a path leads through something that is no object.
    """
    changes = []
    for path, value in values.items():
        span = spans(text, path[:-1]).get(path[-1])
        if span is not None:
            changes.append((span.start, span.stop, _format(value, text[span.start : span.stop])))
    for start, stop, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[stop:]
    for path, value in values.items():
        found = spans(text, path[:-1])
        if path[-1] not in found:
            text = _insert(text, path, value, list(found.values()))
    return text


def _insert(text: str, path: Path, value: Any, members: Sequence[Span]) -> str:
    """Add a member behind the last one, separated as the first one is from its brace."""
    entry = f"{json.dumps(path[-1], ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
    if not members:
        raise KeyError(f"no member to write {path[-1]} after")
    blank = re.search(r"[ \t\r\n]*$", text[: members[0].key])
    last = members[-1].stop
    return f"{text[:last]},{blank[0] if blank is not None and blank[0] else ' '}{entry}{text[last:]}"


def _format(value: Any, old: str) -> str:
    """Spell `value` as `old` was spelled: one element a line when it was, with the same indentation."""
    lines = re.match(r"[\[{](\s*\n\s*)\S", old)
    if lines is None or not isinstance(value, list | dict) or not value:
        return json.dumps(value, ensure_ascii=False)
    inner, outer = lines[1], old[len(old[:-1].rstrip()) : -1]
    pieces: Sequence[str] = (
        [json.dumps(item, ensure_ascii=False) for item in value]
        if isinstance(value, list)
        else [f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(item, ensure_ascii=False)}" for key, item in value.items()]
    )
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return opening + inner + f",{inner}".join(pieces) + outer + closing


def _skip(text: str, position: int) -> int:
    match = BLANK.match(text, position)
    return position if match is None else match.end()
