"""Strategies against exhaustive search, on stacks that are whole, cut already, of two models, or with layers that add nothing."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest

from layercut.plan import Measurement, Table
from layercut.seams import Prices
from layercut.stack import Block, LayerRef, Stack, blocks_of
from layercut.strategies import STRATEGIES, Deepest, OneBlock, Rank, Task

METRIC = "angular[last]"
VALUES = ([0.25], [0.0, 0.5], [0.1, 0.2], [0.1, 0.2, 0.3, 0.4], [k / 97 for k in range(97)])


def random_prices(dice: random.Random, depths: Mapping[str, int]) -> Prices:
    """Distances with ties and without a triangle inequality; zeros on the diagonal of one model."""
    tables, values = [], dice.choice(VALUES)
    for a, b in itertools.combinations_with_replacement(depths, 2):
        mean = [[dice.choice(values) for _ in range(depths[b] + 1)] for _ in range(depths[a] + 1)]
        if a == b:
            mean = [[0.0 if i == j else mean[max(i, j)][min(i, j)] for j in range(depths[a] + 1)] for i in range(depths[a] + 1)]
        rows = tuple(map(tuple, mean))
        tables.append(Table(metric=METRIC, a=a, b=b, mean=rows, stderr=rows))
    return Prices(Measurement(tables=tuple(tables), samples=1, tokens=1, details={}), METRIC, depths)


def random_stack(dice: random.Random, depths: Mapping[str, int], kind: str) -> Stack:
    whole = [LayerRef(model=model, index=index) for model in depths for index in range(depths[model])]
    if kind == "cut":
        whole = sorted(dice.choices(whole, k=dice.randint(2, 6)), key=lambda layer: (layer.model, layer.index))
    if kind == "shuffled":
        dice.shuffle(whole)
    if kind == "silent":
        whole = [layer.model_copy(update={"identity": dice.random() < 0.4}) for layer in whole]
        dice.shuffle(whole)
    if kind == "wide":  # an average of two layers in the middle
        at = dice.randrange(len(whole) - 1)
        if whole[at].model == whole[at + 1].model:
            whole[at : at + 2] = [whole[at].model_copy(update={"span": 2})]
    return tuple(whole[:6])


@dataclass
class Case:
    task: Task
    prices: Prices
    kind: str

    def cost(self, blocks: Sequence[Block]) -> int:
        return self.prices.cost(self.task.build(blocks)).ticks

    def allowed(self, positions: Sequence[int]) -> bool:
        return not self.task.protect & set(positions)


def removal(stack: Stack, blocks: Sequence[Block]) -> Stack:
    return tuple(layer for at, layer in enumerate(stack) if not any(block.start <= at < block.stop for block in blocks))


def repetition(stack: Stack, blocks: Sequence[Block], times: int = 1) -> Stack:
    result: list[LayerRef] = []
    for at, layer in enumerate(stack):
        result.append(layer)
        for block in blocks:
            if block.stop == at + 1:
                result += stack[block.start : block.stop] * times
    return tuple(result)


def cases(seed: int, number: int, repeat: bool | None = None) -> Iterator[Case]:
    dice = random.Random(seed)
    for _ in range(number):
        kind = dice.choice(["whole", "cut", "shuffled", "silent", "wide"])
        depths = {"a": dice.randint(2, 6)} if dice.random() < 0.5 else {"a": dice.randint(2, 3), "b": dice.randint(2, 3)}
        stack = random_stack(dice, depths, kind)
        again = dice.random() < 0.5 if repeat is None else repeat
        times = dice.choice([1, 1, 2])

        def build(blocks: Sequence[Block], stack: Stack = stack, again: bool = again, times: int = times) -> Stack:
            return repetition(stack, blocks, times) if again else removal(stack, blocks)

        protect = frozenset(dice.sample(range(len(stack)), dice.choice([0, 0, 1, 2]) if len(stack) > 2 else 0))
        task = Task(stack, dice.randint(1, len(stack)), build, again, protect)
        yield Case(task, random_prices(dice, depths), kind)


def partitions(case: Case) -> Iterator[tuple[Block, ...]]:
    """All sets of disjoint blocks of `count` layers in all; blocks that touch are two repetitions, but one removal."""
    length, count = len(case.task.stack), case.task.count
    for chosen in itertools.combinations(range(length), count):
        if not case.allowed(chosen) or (len(chosen) == length and not case.task.repeat):
            continue
        if not case.task.repeat:
            yield blocks_of(chosen)
            continue
        gaps = [at for at in range(1, count) if chosen[at] == chosen[at - 1] + 1]
        for split in itertools.product([False, True], repeat=len(gaps)):
            cuts = {at for at, cut in zip(gaps, split, strict=True) if cut}
            blocks: list[Block] = []
            for at, position in enumerate(chosen):
                if blocks and blocks[-1].stop == position and at not in cuts:
                    blocks[-1] = Block(blocks[-1].start, position + 1)
                else:
                    blocks.append(Block(position, position + 1))
            yield tuple(blocks)


def first_layers(blocks: Sequence[Block]) -> list[int]:
    return [position for block in blocks for position in range(block.start, block.stop)]


def test_one_block_is_that_of_brute_force() -> None:
    none = 0
    for case in cases(1, 700):
        task = case.task
        starts = [
            start
            for start in range(len(task.stack) - task.count + 1)
            if case.allowed(range(start, start + task.count)) and (task.repeat or task.count < len(task.stack))
        ]
        found = OneBlock().choose(task, case.prices)
        if not starts:
            none += 1
            assert found is None, case
        else:
            best = min(starts, key=lambda start: (case.cost([Block(start, start + task.count)]), start))
            assert found == (Block(best, best + task.count),), case
    assert 50 < none < 500


@pytest.mark.parametrize("repeat", [False, True])
def test_blocks_are_those_of_brute_force(repeat: bool) -> None:
    """Same cost, and of equals: removing, the first layers; repeating, the block that starts first, then the longest."""
    seen: dict[str, int] = {}
    for case in cases(2 + repeat, 700, repeat):
        candidates = {blocks: case.cost(blocks) for blocks in partitions(case)}
        found = STRATEGIES["blocks"].choose(case.task, case.prices)
        if not candidates:
            assert found is None, case
            continue
        best = [blocks for blocks, cost in candidates.items() if cost == min(candidates.values())]
        order = (lambda blocks: [(b.start, -b.stop) for b in blocks]) if repeat else first_layers
        assert found == min(best, key=order), case
        for kind in (case.kind, *["tie"] * (len(best) > 1), *["several"] * (len(found) > 1), *["protected"] * bool(case.task.protect)):
            seen[kind] = seen.get(kind, 0) + 1
    assert set(seen) == {"whole", "cut", "shuffled", "silent", "wide", "tie", "several", "protected"}
    assert min(seen.values()) > 30


def test_blocks_never_cost_more_than_one_block() -> None:
    for case in cases(4, 200):
        one, any_ = OneBlock().choose(case.task, case.prices), STRATEGIES["blocks"].choose(case.task, case.prices)
        if one is not None:
            assert any_ is not None and case.cost(any_) <= case.cost(one)


def test_rank_takes_the_layers_that_change_least() -> None:
    for case in cases(5, 400):
        task, matrix = case.task, case.prices
        scores = {}
        for position, layer in enumerate(task.stack):
            moved = 0.0 if layer.identity else matrix._tables[layer.model, layer.model].mean[layer.index][layer.index + layer.span]
            scores[position] = round(moved * 10**12)
        free = [position for position in scores if position not in task.protect]
        if task.count > len(free) or (task.count == len(task.stack) and not task.repeat):
            assert Rank().choose(task, matrix) is None, case
            continue
        chosen = sorted(sorted(free, key=lambda position: (scores[position], position))[: task.count])
        expected = tuple(Block(position, position + 1) for position in chosen) if task.repeat else blocks_of(chosen)
        assert Rank().choose(task, matrix) == expected, case


def test_deepest_leaves_the_last_layer_and_what_is_protected() -> None:
    for case in cases(6, 300):
        task = case.task
        stops = [
            stop
            for stop in range(len(task.stack) - 1, task.count - 1, -1)
            if not any(stop - task.count <= position < stop for position in task.protect)
        ]
        expected = (Block(stops[0] - task.count, stops[0]),) if stops else None
        assert Deepest().choose(task, case.prices) == expected, case


def test_the_planted_layers_are_found() -> None:
    depth = 8
    mean = [[0.0 if i == j else 0.5 for j in range(depth + 1)] for i in range(depth + 1)]
    for i, j, value in ((1, 2, 0.01), (3, 5, 0.02), (6, 7, 0.01), (3, 6, 0.3)):
        mean[i][j] = mean[j][i] = value
    rows = tuple(map(tuple, mean))
    prices = Prices(
        Measurement(tables=(Table(metric=METRIC, a="m", b="m", mean=rows, stderr=rows),), samples=1, tokens=1, details={}),
        METRIC,
        {"m": depth},
    )
    stack = tuple(LayerRef(model="m", index=index) for index in range(depth))
    task = Task(stack, 4, lambda blocks: removal(stack, blocks), False, frozenset())
    found = {name: strategy.choose(task, prices) for name, strategy in STRATEGIES.items()}
    assert found == {
        "block": (Block(0, 4),),
        "blocks": (Block(1, 2), Block(3, 5), Block(6, 7)),
        "rank": (Block(0, 3), Block(6, 7)),
        "deepest": (Block(3, 7),),
    }


def test_a_deep_stack_is_searched_in_reasonable_time() -> None:
    depth = 120
    dice = random.Random(7)
    prices = random_prices(dice, {"m": depth})
    stack = tuple(LayerRef(model="m", index=index) for index in range(depth))
    began = time.process_time()
    for repeat in (False, True):
        task = Task(stack, 30, lambda blocks: removal(stack, blocks), repeat, frozenset({0, depth - 1}))
        found = STRATEGIES["blocks"].choose(task, prices)
        assert found is not None and sum(block.stop - block.start for block in found) == 30
    assert time.process_time() - began < 20


def test_every_strategy_goes_by_its_name() -> None:
    assert list(STRATEGIES) == ["block", "blocks", "rank", "deepest"]
    for name, strategy in STRATEGIES.items():
        assert strategy.name == name
        assert strategy.__class__.__doc__
