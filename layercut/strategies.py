"""Strategies: which layers go (or are repeated) when only a number is given. One class each; all need distances only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from layercut.stack import Block, Boundary, LayerRef, Stack, blocks_of, joints


class Pricing(Protocol):
    """What seams cost under one metric (`seams.Prices`)."""

    depths: Mapping[str, int]

    def ticks(self, source: Boundary, target: Boundary) -> int:
        """Cost of one seam, in whole ticks; 0 when there is none."""


@dataclass(frozen=True)
class Task:
    """What a strategy has to choose from."""

    stack: Stack
    count: int
    """Layers to choose."""
    build: Callable[[Sequence[Block]], Stack]
    """The stack that a choice leads to."""
    repeat: bool
    """Whether the blocks are repeated, and not removed."""
    protect: frozenset[int]
    """Positions that must not be chosen."""

    def free(self, start: int, stop: int) -> bool:
        """Whether no protected layer lies in the block."""
        return not any(start <= position < stop for position in self.protect)

    @property
    def longest(self) -> int:
        """Most layers that can be chosen: when they are removed, one must be left."""
        free = len(self.stack) - len(self.protect)
        return free if self.repeat or self.protect else free - 1


class Strategy:
    """A way to choose `count` layers. `choose` returns None when that many cannot be chosen."""

    name: str

    def choose(self, task: Task, prices: Pricing) -> tuple[Block, ...] | None:
        raise AssertionError("every strategy chooses")


def total(stack: Stack, prices: Pricing) -> int:
    """Total seam distance of a stack, in ticks."""
    return sum(prices.ticks(joint.source, joint.target) for joint in joints(stack, prices.depths))


class OneBlock(Strategy):
    """One block of consecutive layers, of least total seam distance; the first of equals (Gromov et al., arXiv 2403.17887)."""

    name = "block"

    def choose(self, task: Task, prices: Pricing) -> tuple[Block, ...] | None:
        starts = list(self.starts(task))
        if not starts:
            return None
        best = min(starts, key=lambda start: (total(task.build([Block(start, start + task.count)]), prices), start))
        return (Block(best, best + task.count),)

    @staticmethod
    def starts(task: Task) -> Iterator[int]:
        """Positions where a block can start."""
        if task.count <= task.longest:
            yield from (start for start in range(len(task.stack) - task.count + 1) if task.free(start, start + task.count))


class Blocks(Strategy):
    """Any number of blocks, of least total seam distance, exactly, by dynamic programming. Of equals, the first layers."""

    name = "blocks"

    def choose(self, task: Task, prices: Pricing) -> tuple[Block, ...] | None:
        if task.count > task.longest:
            return None
        return _repeated(task, prices) if task.repeat else _removed(task, prices)


def _enter(layer: LayerRef) -> Boundary:
    return Boundary(layer.model, layer.index)


def _leave(layer: LayerRef) -> Boundary:
    return Boundary(layer.model, layer.index + layer.span)


class _Here(NamedTuple):
    """What the layers that are kept so far hand on, and the model of the last of them; neither before the first."""

    state: Boundary | None = None
    model: str = ""


# Cost of what cannot be: more than any sum of ticks.
NEVER = 1 << 200


def _keep(here: _Here, layer: LayerRef, prices: Pricing) -> tuple[_Here, int]:
    """What a kept layer hands on, and the cost of the seam before it. A layer that adds nothing hands on what it gets."""
    state = here.state or Boundary(layer.model, 0)
    if layer.identity:
        return _Here(state, layer.model), 0
    return _Here(_leave(layer), layer.model), prices.ticks(state, _enter(layer))


def _removed(task: Task, prices: Pricing) -> tuple[Block, ...] | None:
    """Least cost over all ways to keep len - count layers: after[p][here][r] is the cost from position p on with r more to remove."""
    stack, length = task.stack, len(task.stack)
    reached = [{_Here(): None}]  # dicts keep their order
    for layer in stack:
        reached.append({**reached[-1], **{_keep(here, layer, prices)[0]: None for here in reached[-1]}})
    after: list[dict[_Here, list[int]]] = [{} for _ in range(length + 1)]
    never = [NEVER] * task.count
    for here in reached[length]:
        end = NEVER if here.state is None else prices.ticks(here.state, Boundary(here.model, prices.depths[here.model]))
        after[length][here] = [end, *never]
    for position in range(length - 1, -1, -1):
        locked = position in task.protect
        for here in reached[position]:
            then, seam = _keep(here, stack[position], prices)
            kept = [seam + cost for cost in after[position + 1][then]]
            gone = never if locked else after[position + 1][here]
            after[position][here] = [kept[0], *map(min, kept[1:], gone)]
    here, left = _Here(), task.count
    if after[0][here][left] >= NEVER:
        return None
    chosen: list[int] = []
    for position, layer in enumerate(stack):
        may_go = left > 0 and position not in task.protect
        if may_go and after[position + 1][here][left - 1] == after[position][here][left]:
            chosen.append(position)
            left -= 1
        else:
            here = _keep(here, layer, prices)[0]
    return blocks_of(chosen)


def _repeated(task: Task, prices: Pricing) -> tuple[Block, ...] | None:
    """Least cost over all sets of disjoint blocks of `count` layers in all: after[p, r] is the cost from position p on with r to choose.

    Of equals, the first block starts first and then is the longest, then the second, and so on.
    """
    stack, length = task.stack, len(task.stack)
    after: dict[tuple[int, int], int] = {(length, 0): 0}

    def steps(position: int, left: int) -> Iterator[tuple[int, int]]:
        """Where the block that starts here stops (here: no block), and the cost to the end."""
        if (position + 1, left) in after:
            yield position, after[position + 1, left]
        acting: list[LayerRef] = []
        inner = 0  # seams inside the block, which a copy has too
        for stop in range(position + 1, min(position + left, length) + 1):
            if stop - 1 in task.protect:
                break
            if not stack[stop - 1].identity:
                inner += prices.ticks(_leave(acting[-1]), _enter(stack[stop - 1])) if acting else 0
                acting.append(stack[stop - 1])
            if (stop, left - (stop - position)) in after:
                seam = prices.ticks(_leave(acting[-1]), _enter(acting[0])) if acting else 0
                yield stop, seam + inner + after[stop, left - (stop - position)]

    for position in range(length - 1, -1, -1):
        for left in range(task.count + 1):
            cost = min((cost for _, cost in steps(position, left)), default=None)
            if cost is not None:
                after[position, left] = cost
    if (0, task.count) not in after:
        return None
    blocks: list[Block] = []
    position, left = 0, task.count
    while left:
        stop = max(stop for stop, cost in steps(position, left) if cost == after[position, left])
        if stop > position:
            blocks.append(Block(position, stop))
            left -= stop - position
        position = max(stop, position + 1)
    return tuple(blocks)


class Rank(Strategy):
    """The layers that change the state least, each by itself (ShortGPT, arXiv 2403.03853); of equals, the first."""

    name = "rank"

    def choose(self, task: Task, prices: Pricing) -> tuple[Block, ...] | None:
        if task.count > task.longest:
            return None
        scores = {
            position: 0 if layer.identity else prices.ticks(_enter(layer), _leave(layer))
            for position, layer in enumerate(task.stack)
            if position not in task.protect
        }
        chosen = sorted(sorted(scores, key=lambda position: (scores[position], position))[: task.count])
        return tuple(Block(position, position + 1) for position in chosen) if task.repeat else blocks_of(chosen)


class Deepest(Strategy):
    """The deepest block that leaves the last layer (Gromov et al., section 4.4). Asks for healing: without it, perplexity suffers most."""

    name = "deepest"

    def choose(self, task: Task, prices: Pricing) -> tuple[Block, ...] | None:
        stop = len(task.stack) - 1
        while stop - task.count >= 0:
            if task.free(stop - task.count, stop):
                return (Block(stop - task.count, stop),)
            stop -= 1
        return None


STRATEGIES: Mapping[str, Strategy] = {strategy.name: strategy for strategy in (OneBlock(), Blocks(), Rank(), Deepest())}
StrategyName = Literal["block", "blocks", "rank", "deepest"]
