"""Axes: where the ticks of a scale stand, and how their numbers are written."""

from __future__ import annotations

import math
from typing import NamedTuple


class Tick(NamedTuple):
    """A place on a scale that is labelled."""

    value: float
    label: str


def ticks(low: float, high: float, most: int) -> list[Tick]:
    """Round values from `low` to `high`, at most `most` of them, evenly spaced by 1, 2 or 5 times a power of ten; at least one."""
    span = high - low
    if not 1e-12 * max(abs(low), abs(high)) < span < math.inf:  # else neighbours are one number
        return [Tick(low, f"{low:.4g}")]
    power = 10.0 ** math.floor(math.log10(span / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if 1 <= last - first + 1 <= most:
            places = max(0, -math.floor(math.log10(step) + 1e-9))
            return [Tick(at * step, _written(at * step, places)) for at in range(first, last + 1)]
    return [Tick(low, f"{low:.4g}")]


def _written(value: float, places: int) -> str:
    """The number in as few signs as tell it from its neighbours."""
    return f"{value:.{places}f}" if places <= 6 and abs(value) < 1e6 else f"{value:.3g}"


def spacing(pixels: float, apart: int) -> int:
    """How many units of a whole-numbered scale lie between two labels, when a unit has `pixels` and labels stand `apart` at least."""
    return next(step for scale in (1, 10, 100, 1000, 10_000) for step in (scale, 2 * scale, 5 * scale) if step * pixels >= apart)
