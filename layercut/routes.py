"""Routes: stacks as ways through layers. Ways that begin alike share their states. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from layercut.errors import RefusedError
from layercut.stack import LayerRef, Stack, runs

Tensor: TypeAlias = Any


class Order(NamedTuple):
    """How a stack runs: whose embeddings, which layers, whose head. Layers that add nothing are left out."""

    first: str
    layers: Stack
    last: str

    @classmethod
    def of(cls, stack: Stack) -> Order:
        """Raises RefusedError when the stack is empty."""
        if not stack:
            raise RefusedError("a stack without layers has no loss")
        return cls(stack[0].model, tuple(layer for layer in stack if not layer.identity), stack[-1].model)

    @property
    def name(self) -> str:
        """What tells it apart: layers as they are by their range, others by all that is done to them."""
        parts = [list(run) for run in runs(self.layers)]
        made = [layer.model_dump(mode="json", exclude_defaults=True) for layer in self.layers if not layer.plain]
        return json.dumps([self.first, parts, self.last, *([made] if made else [])])


@dataclass
class Node:
    """Where the ways of stacks part that began alike."""

    children: dict[LayerRef, Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)
    """Numbers of the stacks that end here."""
    size: int = 0
    """Stacks that come through here."""

    @property
    def steps(self) -> int:
        """Layers that are run in all, for a batch: each once for all stacks that come through it."""
        count, waiting = 0, [self]
        while waiting:
            children = waiting.pop().children.values()
            count += len(children)
            waiting += children
        return count

    @classmethod
    def of(cls, orders: Sequence[Order]) -> dict[str, Node]:
        """The stacks as trees, one for each model that some of them begin with."""
        roots: dict[str, Node] = {}
        for number, order in enumerate(orders):
            node = roots.setdefault(order.first, cls())
            node.size += 1
            for layer in order.layers:
                node = node.children.setdefault(layer, cls())
                node.size += 1
            node.ends.append(number)
        return roots

    def walk(self, state: Tensor, step: Callable[[LayerRef, Tensor], Tensor], end: Callable[[int, Tensor], None]) -> None:
        """Every state once, those of the fewest stacks first: so that few states wait, however many stacks there are."""
        waiting: list[tuple[Node, LayerRef | None, Tensor]] = [(self, None, state)]
        while waiting:
            node, layer, state = waiting.pop()
            if layer is not None:
                state = step(layer, state)
            for number in node.ends:
                end(number, state.clone())
            shared = len(node.children) > 1
            for layer, child in sorted(node.children.items(), key=lambda one: -one[1].size):
                waiting.append((child, layer, state.clone() if shared else state))  # a layer may change its input in place
