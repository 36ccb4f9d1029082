"""Mixing: how many samples come from each source, and in which order they take turns. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` in whole parts that are in proportion to the weights, by largest remainder; of equal remainders the first gets one more.

    Weights count as the decimals that they are written as, so that 0.1 and 0.3 are one to three.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    wanted = [total * weight / sum(exact) for weight in exact]
    found = [int(part) for part in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda at: found[at] - wanted[at])
    for at in by_remainder[: total - sum(found)]:
        found[at] += 1
    return found


def turns(counts: Sequence[int]) -> list[int]:
    """The numbers of the sources, each as often as it counts, spread evenly: any first part holds them nearly in proportion."""
    places = [(Fraction(2 * at + 1, 2 * count), source) for source, count in enumerate(counts) for at in range(count)]
    return [source for _, source in sorted(places)]
