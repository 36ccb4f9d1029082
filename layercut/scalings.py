"""Factors for tensors: which ones a layer's scalings name, and how a recipe's `parameters.scale` becomes scalings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator

from layercut.sizes import parse_number
from layercut.stack import LayerRef, Record, Scaling

Groups = tuple[tuple[Scaling, ...], ...]
# Filters that every name passes.
EVERY = (None, "", "*")


def matches(pattern: str, name: str) -> bool:
    """Whether a shell-style pattern matches the whole name."""
    return fnmatchcase(name, pattern)


def literal(name: str) -> str:
    """A pattern that matches this text and no other."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def factors(groups: Groups, name: str) -> tuple[float, ...]:
    """The factors other than 1 for a tensor, in order: of each group the first pattern that matches."""
    found = (next((scaling.by for scaling in group if matches(scaling.tensors, name)), 1.0) for group in groups)
    return tuple(by for by in found if by != 1)


def factor(layer: LayerRef, name: str) -> float:
    """The product of all factors of a layer for one of its tensors."""
    return math.prod(factors(layer.scalings, name))


def _number_or_list(value: object) -> object:
    try:
        numbers = tuple(parse_number(item) for item in (value if isinstance(value, list | tuple) else [value]))
    except ValueError:
        numbers = ()
    if not numbers:
        raise ValueError("expected a factor such as 0.5, or a list of factors that is spread over the slice")
    return numbers if isinstance(value, list | tuple) else numbers[0]


Gradient = Annotated[float | tuple[float, ...], BeforeValidator(_number_or_list)]


class Filtered(Record):
    """A factor for the tensors whose source name contains a text."""

    filter: str | None = None
    """Text that the name contains; all tensors if not set."""
    value: Gradient
    """A factor, or a list of factors that is spread evenly over the layers of the slice."""


def _as_settings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return value
    return [{"value": value}]


Written = Gradient | Filtered | tuple[Filtered, ...]
"""What `scale` may be written as."""


class Parameters(Record):
    """mergekit's `parameters`: what is done to the tensors of a slice."""

    scale: Annotated[tuple[Filtered, ...], BeforeValidator(_as_settings, json_schema_input_type=Written)] | None = None
    """A factor, a list of factors spread over the slice, or a list of {filter, value} of which the first that matches counts."""


def slice_scalings(levels: Iterable[Parameters | None], position: int, length: int) -> Groups:
    """Scalings of one layer of a slice. `levels` go from the source to the whole recipe; for each tensor the first match counts.

    A list of factors is interpolated at position / (length - 1); the only layer of a slice takes the last factor. Tensors
    outside the stack have position 0 (mergekit's rule).
    """
    settings = [setting for level in levels if level is not None for setting in level.scale or ()]
    if not settings:
        return ()
    at = position / (length - 1) if length > 1 else 1.0
    group = tuple(Scaling(tensors="*" if s.filter in EVERY else f"*{literal(s.filter)}*", by=interpolate(s.value, at)) for s in settings)
    return () if all(scaling.by == 1 for scaling in group) else (group,)


def interpolate(value: float | tuple[float, ...], at: float) -> float:
    """A factor at `at` in 0 ... 1 of a slice, linearly between the points of a list."""
    if not isinstance(value, tuple):
        return value
    place = at * (len(value) - 1)
    low = min(int(place), len(value) - 2) if len(value) > 1 else 0
    high = min(low + 1, len(value) - 1)
    return value[low] * (1 - (place - low)) + value[high] * (place - low)
