"""Selectors: how a recipe names layers of the stack, and how many. Knows positions, not what is done with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Annotated, Protocol

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag

from layercut.errors import LayercutError
from layercut.stack import Record

DASH = r"^-?[0-9]{1,9}--?[0-9]{1,9}$"
PERCENTAGE = r"^[0-9]{1,9}(\.[0-9]{1,9})?%$"
Dash = Annotated[str, StringConstraints(pattern=DASH)]
Percentage = Annotated[str, StringConstraints(pattern=PERCENTAGE)]


def _check_count(value: object) -> object:
    """One message instead of one for each kind of value."""
    if isinstance(value, str) and re.fullmatch(PERCENTAGE, value):
        if not 0 < Fraction(value[:-1]) <= 100:
            raise ValueError("a percentage of the layers is above 0% and at most 100%")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("expected a number of layers such as 6, or a percentage such as 25%")
    elif value < 1:
        raise ValueError("a number of layers is at least 1")
    return value


Count = Annotated[Annotated[int, Field(ge=1)] | Percentage, BeforeValidator(_check_count)]


class Every(Record):
    """Every n-th position of a range."""

    every: int = Field(ge=1, strict=True)
    """Step between positions."""
    start: int = Field(default=0, alias="from", strict=True)
    """First position."""
    stop: int = Field(default=-1, alias="to", strict=True)
    """Last position, inclusive."""


def _form(value: object) -> str | None:
    """Which form a selector is written in, so that a fault is told once and not for every form."""
    if isinstance(value, Mapping | Every):
        return "<every>"
    if isinstance(value, str):
        return "<range>" if re.fullmatch(DASH, value) else None
    return "<index>" if isinstance(value, int) and not isinstance(value, bool) else None


def _one_or_many(value: object) -> str:
    return "<many>" if isinstance(value, list | tuple) else "<one>"


_FORMS = 'expected a layer such as 3, a range such as "20-24", or {every: 2, from: 8, to: 24}'
Selector = Annotated[
    Annotated[int, Tag("<index>")] | Annotated[Dash, Tag("<range>")] | Annotated[Every, Tag("<every>")],
    Discriminator(_form, custom_error_type="selector", custom_error_message=_FORMS),
]
Selectors = Annotated[
    Annotated[Selector, Tag("<one>")] | Annotated[tuple[Selector, ...], Field(min_length=1), Tag("<many>")], Discriminator(_one_or_many)
]


class Place(Protocol):
    """Where something stands in a recipe."""

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        """An error at a key below the place."""


MAX_HEIGHT = 20_000
"""Layers of a stack: a few lines of a recipe could ask for millions, and every tensor of each takes memory."""


def check_height(height: int, place: Place) -> None:
    """Refuse a stack that no machine could run."""
    if height > MAX_HEIGHT:
        raise place.error(f"{height} layers are too many: a stack has {MAX_HEIGHT} at most")


def positions(at: Selectors, depth: int, place: Place, key: str = "at") -> list[int]:
    """Positions that the selectors under `key` name in a stack of `depth` layers, in the order written; each may stand once."""
    found: list[int] = []
    for number, item in enumerate(at if isinstance(at, tuple) else (at,)):
        path = (key, number) if isinstance(at, tuple) else (key,)
        for position in _expand(item, depth, path, place):
            if not 0 <= position < depth:
                raise _missing(position, depth, path, place)
            if position in found:
                raise place.error(f"layer {position} is named twice", *path)
            found.append(position)
    if not found:
        raise place.error("names no layer", key)
    return found


def _expand(item: Selector, depth: int, path: tuple[str | int, ...], place: Place) -> Iterator[int]:
    if isinstance(item, int):
        yield _absolute(item, depth)
        return
    if isinstance(item, str):
        cut = item.index("-", 1)
        first, last, step = int(item[:cut]), int(item[cut + 1 :]), 1
    else:
        first, last, step = item.start, item.stop, item.every
    first, last = _absolute(first, depth), _absolute(last, depth)
    if last < first:
        raise place.error(f"the range {first} to {last} is empty: it ends before it starts", *path)
    if last >= depth:  # said before a huge range is written out
        raise _missing(last, depth, path, place)
    yield from range(first, last + 1, step)


def _missing(position: int, depth: int, path: tuple[str | int, ...], place: Place) -> LayercutError:
    written = position if position >= 0 else position - depth
    return place.error(f"layer {written} does not exist: the stack has layers 0 to {depth - 1} here", *path)


def _absolute(position: int, depth: int) -> int:
    return position + depth if position < 0 else position


def count_of(layers: int | str, depth: int, place: Place) -> int:
    """A number of layers from a count, or from a percentage of the stack rounded down."""
    if isinstance(layers, int):
        return layers
    count = math.floor(depth * Fraction(layers.rstrip("%")) / 100)
    if count < 1:
        raise place.error(f"{layers} of {depth} layers is less than one layer", "layers")
    return count
