"""Mixing: shares by largest remainder, and turns that keep the proportion."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.mixing import shares, turns


@pytest.mark.parametrize(
    ("weights", "total", "found"),
    [
        ([1], 7, [7]),
        ([2, 1], 64, [43, 21]),  # 42.67 and 21.33
        ([1, 1, 1], 8, [3, 3, 2]),  # equal remainders: the first get more
        ([1, 1, 1, 1], 2, [1, 1, 0, 0]),
        ([0.1, 0.3], 8, [2, 6]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([1e-9, 1], 5, [0, 5]),
        ([5, 3, 1], 10, [6, 3, 1]),  # 5.56, 3.33 and 1.11
        ([3, 1], 0, [0, 0]),
    ],
)
def test_shares(weights: list[float], total: int, found: list[int]) -> None:
    assert shares(weights, total) == found


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 500))
def test_shares_are_exact_and_within_one(weights: list[int], total: int) -> None:
    found = shares(weights, total)
    assert sum(found) == total
    for weight, part in zip(weights, found, strict=True):
        assert abs(part - Fraction(total * weight, sum(weights))) < 1


@pytest.mark.parametrize(
    ("counts", "order"),
    [([3], [0, 0, 0]), ([2, 1], [0, 1, 0]), ([1, 1], [0, 1]), ([4, 2], [0, 1, 0, 0, 1, 0]), ([0, 2], [1, 1]), ([], [])],
)
def test_turns(counts: list[int], order: list[int]) -> None:
    assert turns(counts) == order


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_turns_keep_the_proportion_from_the_start(counts: list[int]) -> None:
    order = turns(counts)
    assert [order.count(source) for source in range(len(counts))] == counts
    for stop in range(len(order) + 1):
        for source, count in enumerate(counts):
            assert abs(order[:stop].count(source) - Fraction(stop * count, max(len(order), 1))) <= len(counts) / 2
