"""Moves: values that name layers, or states between layers, follow them to their new places."""

from __future__ import annotations

from typing import Any

import pytest

from layercut.errors import RefusedError
from layercut.moves import AROUND, GENERATION, HEADS, IN_NODE, PAIRS, SOURCES, STATES, TARGETS, Moves, Remap
from layercut.stack import LayerRef


def moves(depth: int, *order: int, model: str = "m") -> Moves:
    return Moves("m", depth, tuple(LayerRef(model=model, index=index) for index in order))


@pytest.mark.parametrize(
    ("remap", "value", "order", "after"),
    [
        (SOURCES, [0, 1, 1, 3, 3, 5], (1, 2, 3, 4, 5), [0, 0, 2, 2, 4]),
        (SOURCES, [0, 1, 1, 3, 3, 5], (0, 1, 2, 1, 2), [0, 1, 1, 3, 3]),
        (SOURCES, [0, 1, 1], (0, 1, 2), None),  # not one for every layer
        (SOURCES, "011", (0,), None),
        (TARGETS, [1, 3], (1, 2, 3), [0, 2]),
        (TARGETS, [], (0,), []),
        (TARGETS, 3, (0,), None),
        (PAIRS, [[7, 1], [9, 3]], (1, 3, 5), [[7, 0], [9, 1]]),
        (PAIRS, [[7, 1, 2]], (1,), None),
        (HEADS, [[1, 4], [3, 0], [5, 2]], (0, 1, 5), [[1, 4], [2, 2]]),
        (HEADS, [[1, 4]], (1, 1), [[0, 4], [1, 4]]),
        (HEADS, [1, 4], (0,), None),
        (STATES, 2, (0, 1, 4, 5), 2),
        (STATES, 3, (0, 1, 4, 5), 2),
        (STATES, 6, (0, 1, 4, 5), 4),
        (STATES, -1, (0, 1, 4, 5), -1),
        (STATES, -2, (0, 1, 4, 5), -2),
        (STATES, [-2, 2], (0, 1, 5), [-2, 2]),
        (STATES, 99, (0, 1), None),
        (STATES, True, (0, 1), None),
        (STATES, "high", (0, 1), None),
    ],
)
def test_values_follow(remap: Remap, value: Any, order: tuple[int, ...], after: Any) -> None:
    assert remap.follow(value, moves(6, *order)) == after


@pytest.mark.parametrize(
    ("remap", "value", "order", "message"),
    [
        (SOURCES, [0, 1, 1, 3, 3, 5], (0, 2), "layer 2 reads the keys and values of layer 1, which does not stand before it any more"),
        (SOURCES, [0, 1, 1, 3, 3, 5], (2, 1), "layer 2 reads the keys and values of layer 1, which does not stand before it any more"),
        (TARGETS, [1, 3], (0, 1), "layer 3 is fed from outside the stack, and stands 0 times in the new one"),
        (TARGETS, [1], (1, 1), "layer 1 is fed from outside the stack, and stands 2 times in the new one"),
        (PAIRS, [[0, 5]], (0,), "layer 5 is fed from outside the stack, and stands 0 times in the new one"),
    ],
)
def test_what_cannot_follow(remap: Remap, value: Any, order: tuple[int, ...], message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        remap.follow(value, moves(6, *order))
    assert str(caught.value) == message


def test_layers_that_read_each_other_are_not_mixed_with_other_models() -> None:
    with pytest.raises(RefusedError, match=r"^layers of 'm' read keys and values of each other: they cannot be mixed with other models$"):
        SOURCES.follow([0, 1], moves(2, 0, 1, model="other"))


@pytest.mark.parametrize(
    ("remap", "value"),
    [(SOURCES, [0, 1, 1, 3, 3, 5]), (TARGETS, [1, 3]), (PAIRS, [[9, 1]]), (HEADS, [[2, 1]]), *((STATES, at) for at in range(-7, 7))],
)
def test_an_unchanged_stack_changes_nothing(remap: Remap, value: Any) -> None:
    assert remap.follow(value, moves(6, *range(6))) == value


def test_positions_and_boundaries() -> None:
    asked = moves(6, 0, 1, 4, 4, 5)
    assert (asked.positions(4), asked.positions(2)) == ([2, 3], [])
    assert [asked.boundary(number) for number in range(7)] == [0, 1, 2, 2, 2, 4, 5]


def test_every_remap_has_its_key() -> None:
    used = [*IN_NODE.values(), *GENERATION.values(), *(remap for keys in AROUND.values() for remap in keys.values())]
    assert {remap.reason for remap in (SOURCES, TARGETS, PAIRS, HEADS, STATES)} == {remap.reason for remap in used}
