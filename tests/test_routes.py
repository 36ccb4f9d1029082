"""Routes: what tells stacks apart, what they have in common, and how few states wait while all of them are walked."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest

from layercut.errors import RefusedError
from layercut.routes import Node, Order
from layercut.scalings import literal
from layercut.stack import LayerRef, Scaling, Share, Stack


def layers(*indices: int, model: str = "m") -> Stack:
    return tuple(LayerRef(model=model, index=index) for index in indices)


def removed(depth: int, *gone: int) -> Stack:
    return layers(*(index for index in range(depth) if index not in gone))


class Copied(list[int]):
    """A state that tells which layers made it."""

    def clone(self) -> Copied:
        return Copied(self)


def test_layers_that_add_nothing_are_left_out() -> None:
    zeros = LayerRef(model="m", index=3, identity=True, scalings=((Scaling(tensors=literal("x"), by=0),),))
    assert Order.of((*layers(0, 1), zeros, *layers(2))) == Order.of(layers(0, 1, 2))


def test_a_stack_without_layers() -> None:
    with pytest.raises(RefusedError, match="a stack without layers has no loss"):
        Order.of(())


def test_names_tell_stacks_apart() -> None:
    half = (Share(model="m", index=1, weight=0.5), Share(model="m", index=2, weight=0.5))
    stacks = [
        removed(4),
        removed(4, 2),
        layers(0, 1, 1, 2, 3),
        layers(0, 1, 2, 3, model="n"),
        layers(0, 1) + layers(2, 3, model="n"),
        (*layers(0), LayerRef(model="m", index=1, shares=half), *layers(2, 3)),
        (*layers(0), LayerRef(model="m", index=1, scalings=((Scaling(tensors="*", by=0.5),),)), *layers(2, 3)),
        (*layers(0), LayerRef(model="m", index=1, scalings=((Scaling(tensors="*", by=0.25),),)), *layers(2, 3)),
    ]
    names = [Order.of(stack).name for stack in stacks]
    assert len({*names}) == len(stacks) and names == [Order.of(stack).name for stack in stacks]
    assert names[0] == '["m", [["m", 0, 4]], "m"]'


def test_stacks_of_several_models_begin_with_the_embeddings_of_the_first() -> None:
    orders = [Order.of(stack) for stack in (layers(0, 1), layers(0, 1, model="n"), layers(0) + layers(1, model="n"))]
    roots = Node.of(orders)
    assert list(roots) == ["m", "n"] and (roots["m"].size, roots["n"].size) == (2, 1)
    (first,) = roots["m"].children.values()
    assert {layer.model: child.ends for layer, child in first.children.items()} == {"m": [0], "n": [2]}
    assert [order.last for order in orders] == ["m", "n", "n"]


def test_states_that_stacks_share_are_computed_once() -> None:
    """Removing each of L layers takes about half of L forward passes: L layers of the trunk, and L - 1 - l behind each gap."""
    steps: list[int] = []

    def step(layer: LayerRef, state: Any) -> Any:
        steps.append(layer.index)
        return Copied([*state, layer.index])

    orders = [Order.of(removed(8, at)) for at in range(8)]
    (root,) = Node.of(orders).values()
    seen: dict[int, list[int]] = {}

    def end(number: int, state: Any) -> None:
        seen[number] = state

    root.walk(Copied(), step, end)
    assert len(steps) == 7 + 8 * 7 / 2 == root.steps
    assert sorted(seen) == list(range(8))
    assert all(seen[number] == [layer.index for layer in order.layers] for number, order in enumerate(orders))


def test_stacks_may_be_very_deep() -> None:
    (root,) = Node.of([Order.of(removed(5000)), Order.of(removed(5000, 4000))]).values()
    assert root.steps == 5000 + 999
    ends: list[int] = []
    root.walk(Copied(), lambda layer, state: state, lambda number, state: ends.append(number))
    assert sorted(ends) == [0, 1]


def test_few_states_wait() -> None:
    """However many stacks there are: those that leave out one layer each, or two."""
    living: weakref.WeakSet[State] = weakref.WeakSet()
    most = 0

    class State:
        def __init__(self) -> None:
            living.add(self)

        def clone(self) -> State:
            return State()

    def step(layer: LayerRef, state: Any) -> Any:
        nonlocal most
        most = max(most, len(living))
        return State()

    pairs = itertools.combinations(range(16), 2)
    for orders in ([Order.of(removed(64, at)) for at in range(64)], [Order.of(removed(16, *gone)) for gone in pairs]):
        (root,) = Node.of(orders).values()
        start: Any = State()
        root.walk(start, step, lambda number, state: None)
    assert 2 <= most <= 8
