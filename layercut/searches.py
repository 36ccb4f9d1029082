"""Searches: strategies that run what they choose from, and the table of all strategies. One class each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count as numbers
from math import ceil
from random import Random
from typing import Literal, Protocol

from layercut.stack import Block, Stack, blocks_of
from layercut.strategies import STRATEGIES, Pricing, Strategy, Task
from layercut.trials import Attempt, Found, Loss, Losses

OFFSPRING = 16
"""Sets that each generation of `evolve` tries."""
ROUNDS = ((1 / 16, 4), (1 / 4, 1))
"""How they are sifted: on which share of the samples, and how many are left. The last one meets its parent on all of them."""
GENERATIONS = 48
"""Generations at most."""
PATIENCE = 8
"""Generations without a better set after which the search ends."""
SWITCHES = 3
"""Layers, at most, that a mutation exchanges."""
QUICK = ("block", "blocks", "rank")
"""What is compared when no strategy is named: one measurement gives all of them, and they are rarely far from the best."""
QUICK_SHARE = 0.5
"""Share of the held-out text that they are compared on then. Four stacks on all of it would take three times as long as measuring."""


class Means(Protocol):
    """What a strategy may ask."""

    @property
    def prices(self) -> Pricing:
        """What seams cost. Measured when it is first asked for."""

    @property
    def losses(self) -> Losses:
        """What stacks lose."""

    def fits(self, stack: Stack) -> bool:
        """Whether the stack will do: it keeps the budget, and a config can describe it, as that of a hybrid may not, when a cut breaks
        its pattern of layers."""


class Search(Strategy):
    """A strategy that runs stacks. `find` returns None when that many layers cannot be chosen."""

    def choose(self, task: Task, prices: Pricing) -> tuple[Block, ...] | None:
        raise AssertionError("a search needs losses")

    def find(self, task: Task, means: Means) -> Found | None:
        raise AssertionError("every search finds")


def find(strategy: Strategy, task: Task, means: Means) -> Found | None:
    """What any strategy chooses."""
    if isinstance(strategy, Search):
        return strategy.find(task, means)
    blocks = strategy.choose(task, means.prices)
    return None if blocks is None else Found(blocks)


def single(task: Task, positions: Sequence[int]) -> tuple[Block, ...]:
    """Positions as blocks: each is repeated by itself, but those that are removed side by side are one block."""
    return tuple(Block(position, position + 1) for position in sorted(positions)) if task.repeat else blocks_of(positions)


def _free(task: Task) -> list[int]:
    return [position for position in range(len(task.stack)) if position not in task.protect]


class OneShot(Search):
    """The layers whose removal, each by itself, raises the loss least (Shortened-LLaMA, arXiv 2402.02834); of equals, the first."""

    name = "loss"

    def find(self, task: Task, means: Means) -> Found | None:
        if task.count > task.longest:
            return None
        free = _free(task)
        losses = means.losses.losses([task.build(single(task, [position])) for position in free])
        order = sorted(range(len(free)), key=lambda at: (losses[at].mean, at))
        attempts = (Attempt(f"layer {free[at]}", single(task, [free[at]]), losses[at]) for at in range(len(free)))
        return Found(single(task, [free[at] for at in order[: task.count]]), tuple(attempts))


class Greedy(Search):
    """One layer after the other: each time the one whose removal then raises the loss least (SLEB, arXiv 2402.09025)."""

    name = "greedy"

    def find(self, task: Task, means: Means) -> Found | None:
        if task.count > task.longest:
            return None
        chosen: list[int] = []
        attempts: list[Attempt] = []
        for number in range(1, task.count + 1):
            free = [position for position in _free(task) if position not in chosen]
            losses = means.losses.losses([task.build(single(task, [*chosen, position])) for position in free])
            at = min(range(len(free)), key=lambda at: (losses[at].mean, at))
            chosen.append(free[at])
            attempts.append(Attempt(f"{number}: layer {free[at]}", single(task, chosen), losses[at]))
        return Found(single(task, chosen), tuple(attempts))


Layers = tuple[int, ...]


class Evolve(Search):
    """An evolutionary search over sets of layers (EvoPress, arXiv 2410.14649): mutations exchange layers, fewer survivors see more text.

    It starts from the better of the choice of `loss` and seeded random sets. Equal recipes give equal choices.
    """

    name = "evolve"

    def find(self, task: Task, means: Means) -> Found | None:
        first = OneShot().find(task, means)
        if first is None:
            return None
        free, random = _free(task), Random(f"{len(task.stack)} {task.count}")
        known = tuple(position for block in first.blocks for position in range(block.start, block.stop))
        drawn = (tuple(sorted(random.sample(free, task.count))) for _ in range(OFFSPRING))
        race = _Race(task, means.losses)
        parent, loss = race.best(known, dict.fromkeys(drawn))
        attempts = [race.attempt("start", parent, loss)]
        limit, since = min(GENERATIONS, ceil(task.count * (len(free) - task.count) / 1.5)), 0
        for generation in range(1, limit + 1):
            better, loss = race.best(parent, _offspring(parent, free, random))
            since = 0 if better != parent else since + 1
            if better != parent:
                parent = better
                attempts.append(race.attempt(f"generation {generation}", parent, loss))
            if since == PATIENCE:
                break
        return Found(single(task, parent), tuple(attempts))


class _Race:
    """Sifts sets of layers on more and more text."""

    def __init__(self, task: Task, losses: Losses) -> None:
        self._task, self._losses = task, losses

    def best(self, parent: Layers, others: Mapping[Layers, None]) -> tuple[Layers, Loss]:
        """The parent, or the one of the others that comes through all rounds and loses less on all samples."""
        left = list(others)
        for share, survivors in ROUNDS:
            order = self._ranked(left, share)
            left = [left[at] for at, _ in order[:survivors]]
        finalists = [parent, *left]
        at, loss = self._ranked(finalists, 1.0)[0]
        return finalists[at], loss

    def attempt(self, name: str, layers: Layers, loss: Loss) -> Attempt:
        return Attempt(name, single(self._task, layers), loss)

    def _ranked(self, sets: Sequence[Layers], share: float) -> list[tuple[int, Loss]]:
        stacks = [self._task.build(single(self._task, layers)) for layers in sets]
        losses = self._losses.losses(stacks, "calibration", share)
        return sorted(enumerate(losses), key=lambda one: (one[1].mean, one[0]))


def _offspring(parent: Layers, free: Sequence[int], random: Random) -> dict[Layers, None]:
    """Sets that differ from the parent by a few layers, each once; fewer than asked for where there are not so many."""
    found: dict[Layers, None] = {}
    for tries in numbers():
        if len(found) == OFFSPRING or tries == 4 * OFFSPRING:
            return found
        others = [position for position in free if position not in parent]
        most = min(SWITCHES, len(parent), len(others))
        if most == 0:
            return found
        switches = min(random.randint(1, most), random.randint(1, most))
        back, gone = random.sample(parent, switches), random.sample(others, switches)
        found.setdefault(tuple(sorted({*parent} - {*back} | {*gone})))
    raise AssertionError("numbers do not end")


class Best(Search):
    """What each of the other strategies chooses, run on held-out text; the least loss wins. All candidates stand in the plan.

    `candidates` says which strategies: all but `evolve`, which takes longest, if not given. `share` is of the text.
    """

    name = "best"

    def __init__(self, candidates: Sequence[str] = ("block", "blocks", "rank", "deepest", "loss", "greedy"), share: float = 1.0) -> None:
        self.candidates, self.share = tuple(candidates), share

    def find(self, task: Task, means: Means) -> Found | None:
        named = [(name, found) for name, found in self._candidates(task, means) if found is not None]
        named = [one for one in named if means.fits(task.build(one[1].blocks))] or named
        if not named:
            return None
        losses = means.losses.losses([task.build(found.blocks) for _, found in named], "held out", self.share)
        attempts = [Attempt(name, found.blocks, loss, "held out") for (name, found), loss in zip(named, losses, strict=True)]
        best = min(range(len(attempts)), key=lambda at: (losses[at].mean, at))
        return Found(attempts[best].blocks, tuple(attempts), self.share)

    def _candidates(self, task: Task, means: Means) -> Iterator[tuple[str, Found | None]]:
        for name in self.candidates:
            yield name, find(ALL[name], task, means)


ALL: Mapping[str, Strategy] = {**STRATEGIES, **{search.name: search for search in (OneShot(), Greedy(), Evolve(), Best())}}
Candidate = Literal["block", "blocks", "rank", "deepest", "loss", "greedy", "evolve"]
StrategyName = Literal["block", "blocks", "rank", "deepest", "loss", "greedy", "evolve", "best"]
