"""Operations on the stack: one class each. They say which layers; the distance that decides an `auto` is asked of the site."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, ClassVar, Protocol

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from layercut.errors import LayercutError
from layercut.metrics import MetricSpec
from layercut.stack import Record, Stack

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


class Site(Protocol):
    """Where an operation stands in a recipe, and how it asks for a decision."""

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        """An error at a key of the operation."""

    def block(self, length: int, count: int, build: Callable[[int], Stack], metric: MetricSpec | None, verb: str) -> int:
        """The start in 0 … count - 1 whose stack `build(start)` has the least total seam distance; the first of equals."""


def positions(at: Selectors, depth: int, site: Site) -> list[int]:
    """Positions that selectors name in a stack of `depth` layers, in the order written; each may stand once."""
    found: list[int] = []
    for number, item in enumerate(at if isinstance(at, tuple) else (at,)):
        path = ("at", number) if isinstance(at, tuple) else ("at",)
        for position in _expand(item, depth, path, site):
            if not 0 <= position < depth:
                raise _missing(position, depth, path, site)
            if position in found:
                raise site.error(f"layer {position} is named twice", *path)
            found.append(position)
    if not found:
        raise site.error("names no layer", "at")
    return found


def _expand(item: Selector, depth: int, path: tuple[str | int, ...], site: Site) -> Iterator[int]:
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
        raise site.error(f"the range {first} to {last} is empty: it ends before it starts", *path)
    if last >= depth:  # said before a huge range is written out
        raise _missing(last, depth, path, site)
    yield from range(first, last + 1, step)


def _missing(position: int, depth: int, path: tuple[str | int, ...], site: Site) -> LayercutError:
    written = position if position >= 0 else position - depth
    return site.error(f"layer {written} does not exist: the stack has layers 0 to {depth - 1} here", *path)


def _absolute(position: int, depth: int) -> int:
    return position + depth if position < 0 else position


def count_of(layers: int | str, depth: int, site: Site) -> int:
    """A number of layers from a count, or from a percentage of the stack rounded down."""
    if isinstance(layers, int):
        return layers
    count = math.floor(depth * Fraction(layers.rstrip("%")) / 100)
    if count < 1:
        raise site.error(f"{layers} of {depth} layers is less than one layer", "layers")
    return count


class Operation(Record):
    """A change of the stack. `apply` sees the stack as the earlier steps left it, and returns the new one."""

    automatic: ClassVar[str] = "layers"
    """Field whose presence leaves the choice to the planner."""

    def apply(self, stack: Stack, site: Site) -> Stack:
        raise AssertionError("every operation says what it does")

    @property
    def measured(self) -> bool:
        """Whether a distance decides."""
        return getattr(self, self.automatic, None) is not None


class Prune(Operation):
    """Remove layers: a block chosen by distance (`layers`), or the ones that are named (`at`)."""

    layers: Count | None = None
    """How many layers to remove: a count, or a percentage of the stack rounded down. The block of least total seam distance goes."""
    at: Selectors | None = None
    """Layers to remove: indices, inclusive ranges "a-b", or {every, from, to}; negative ones count from the end."""
    metric: MetricSpec | None = None
    """Metric that decides here; the first metric of the recipe if not set."""

    @model_validator(mode="after")
    def _one_way(self) -> Prune:
        if (self.layers is None) == (self.at is None):
            raise ValueError("takes either 'layers' (how many) or 'at' (which)")
        return self

    def apply(self, stack: Stack, site: Site) -> Stack:
        if self.at is not None:
            gone = frozenset(positions(self.at, len(stack), site))
            if len(gone) == len(stack):
                raise site.error(f"removes all {len(stack)} layers", "at")
            return tuple(layer for position, layer in enumerate(stack) if position not in gone)
        assert self.layers is not None
        count = count_of(self.layers, len(stack), site)
        if count >= len(stack):
            raise site.error(f"cannot remove {count} of {len(stack)} layers", "layers", hint=f"at most {len(stack) - 1}")

        def without(start: int) -> Stack:
            return stack[:start] + stack[start + count :]

        return without(site.block(count, len(stack) - count + 1, without, self.metric, "remove"))


class Keep(Operation):
    """Keep only the layers that are named, in their order."""

    at: Selectors
    """Layers to keep, written as for `prune`."""

    def apply(self, stack: Stack, site: Site) -> Stack:
        kept = frozenset(positions(self.at, len(stack), site))
        return tuple(layer for position, layer in enumerate(stack) if position in kept)


class Duplicate(Operation):
    """Repeat layers: each block of consecutive layers is followed by copies of itself."""

    layers: Count | None = None
    """Length of the block to repeat: a count, or a percentage of the stack rounded down. The block of least seam distance is taken."""
    at: Selectors | None = None
    """Layers to repeat, written as for `prune`; consecutive ones are repeated as one block."""
    times: int = Field(default=1, ge=1, le=1000, strict=True)
    """Number of copies."""
    metric: MetricSpec | None = None
    """Metric that decides here; the first metric of the recipe if not set."""

    @model_validator(mode="after")
    def _one_way(self) -> Duplicate:
        if (self.layers is None) == (self.at is None):
            raise ValueError("takes either 'layers' (how many) or 'at' (which)")
        return self

    def apply(self, stack: Stack, site: Site) -> Stack:
        if self.at is not None:
            chosen = sorted(positions(self.at, len(stack), site))
            blocks = [position for position in chosen if position + 1 not in chosen]
            result: Stack = stack
            for last in reversed(blocks):
                first = last
                while first - 1 in chosen:
                    first -= 1
                result = result[: last + 1] + stack[first : last + 1] * self.times + result[last + 1 :]
            return result
        assert self.layers is not None
        count = count_of(self.layers, len(stack), site)
        if count > len(stack):
            raise site.error(f"cannot repeat {count} of {len(stack)} layers", "layers", hint=f"at most {len(stack)}")

        def repeated(start: int) -> Stack:
            stop = start + count
            return stack[:stop] + stack[start:stop] * self.times + stack[stop:]

        return repeated(site.block(count, len(stack) - count + 1, repeated, self.metric, "repeat"))


OPERATIONS: Mapping[str, type[Operation]] = {"prune": Prune, "keep": Keep, "duplicate": Duplicate}


def apply_all(stack: Stack, steps: Sequence[tuple[Operation, Site]]) -> Stack:
    """Apply operations in order."""
    for operation, site in steps:
        stack = operation.apply(stack, site)
    return stack
