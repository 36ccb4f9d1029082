"""Searches against exhaustive search and brute force, on losses that are made up: additive ones, and ones with interactions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.searches import ALL, GENERATIONS, OFFSPRING, Best, Candidate, Search, StrategyName, find
from layercut.stack import Block, LayerRef, Stack
from layercut.strategies import STRATEGIES, Task
from layercut.trials import Found, Loss, Part

LossOf = Callable[[frozenset[int]], float]
SAMPLES = 32


class Fake:
    """Means whose losses follow from which layers are left; counts what is asked."""

    def __init__(self, loss_of: LossOf, held_out: LossOf | None = None, noise: float = 0.0) -> None:
        self.loss_of, self.held_out, self.noise = loss_of, held_out or loss_of, noise
        self.asked: list[tuple[Part, float, int]] = []

    @property
    def losses(self) -> Fake:
        return self

    @property
    def prices(self) -> Any:
        raise AssertionError("no distance is to be measured")

    def __call__(self, stack: Stack, part: Part = "calibration", samples: int = SAMPLES) -> Loss:
        kept = frozenset(layer.index for layer in stack)
        mean = (self.loss_of if part == "calibration" else self.held_out)(kept)
        dice = random.Random(repr(sorted(kept)))
        return Loss(tuple(10 * (mean + dice.gauss(0, self.noise)) for _ in range(samples)), (10,) * samples)

    def losses_of(self, stacks: Sequence[Stack], part: Part = "calibration", share: float = 1.0) -> list[Loss]:
        self.asked.append((part, share, len(stacks)))
        return [self(stack, part, max(1, round(SAMPLES * share))) for stack in stacks]


class Means:
    """The fake as `searches.Means`."""

    def __init__(self, fake: Fake, prices: Any = None, broken: Sequence[int] = ()) -> None:
        self._fake, self._prices, self.broken = fake, prices, set(broken)

    @property
    def prices(self) -> Any:
        assert self._prices is not None, "no distance is to be measured"
        return self._prices

    def fits(self, stack: Stack) -> bool:
        return not {layer.index for layer in stack} & self.broken

    @property
    def losses(self) -> Any:
        class Losses:
            losses = staticmethod(self._fake.losses_of)

        return Losses()


class Prices:
    """Distances by the number of layers between two boundaries."""

    depths = {"m": 6}

    def ticks(self, source: Any, target: Any) -> int:
        return abs(source.number - target.number)


def whole(depth: int) -> Stack:
    return tuple(LayerRef(model="m", index=index) for index in range(depth))


def task(count: int, depth: int = 6, protect: Sequence[int] = (), repeat: bool = False) -> Task:
    stack = whole(depth)

    def build(blocks: Sequence[Block]) -> Stack:
        chosen = {position for block in blocks for position in range(block.start, block.stop)}
        if repeat:
            return tuple(layer for at, layer in enumerate(stack) for _ in range(1 + (at in chosen)))
        return tuple(layer for at, layer in enumerate(stack) if at not in chosen)

    return Task(stack, count, build, repeat, frozenset(protect))


def layers(found: Found | None) -> tuple[int, ...]:
    assert found is not None
    return tuple(position for block in found.blocks for position in range(block.start, block.stop))


def random_loss(seed: int, depth: int = 6) -> LossOf:
    """Any loss of any set: nothing is additive."""
    table = {
        frozenset(kept): random.Random(f"{seed} {kept}").random()
        for n in range(depth + 1)
        for kept in itertools.combinations(range(depth), n)
    }
    return table.__getitem__


def additive(*costs: float) -> LossOf:
    return lambda kept: 3 + sum(cost for index, cost in enumerate(costs) if index not in kept)


def without(gone: Sequence[int], depth: int = 6) -> frozenset[int]:
    return frozenset(range(depth)) - frozenset(gone)


# One-shot


def test_loss_takes_the_layers_that_cost_least_by_themselves() -> None:
    found = find(ALL["loss"], task(3), Means(Fake(additive(0.5, 0.1, 0.4, 0.1, 0.3, 0.9))))
    assert layers(found) == (1, 3, 4)
    assert found is not None and found.blocks == (Block(1, 2), Block(3, 5))
    assert [(attempt.name, attempt.blocks) for attempt in found.attempts] == [(f"layer {at}", (Block(at, at + 1),)) for at in range(6)]
    assert [round(attempt.loss.mean, 6) for attempt in found.attempts] == [3.5, 3.1, 3.4, 3.1, 3.3, 3.9]


def test_of_equal_layers_the_first_goes() -> None:
    for name in ("loss", "greedy"):
        assert layers(find(ALL[name], task(2), Means(Fake(additive(*[0.25] * 6))))) == (0, 1)


def test_loss_asks_once() -> None:
    fake = Fake(random_loss(0))
    find(ALL["loss"], task(3, protect=[0, 5]), Means(fake))
    assert fake.asked == [("calibration", 1.0, 4)]


# Greedy


@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_brute_force_greedy(seed: int) -> None:
    loss_of, gone = random_loss(seed), []
    found = find(ALL["greedy"], task(4), Means(Fake(loss_of)))
    for _ in range(4):
        gone.append(min((at for at in range(6) if at not in gone), key=lambda at: (loss_of(without([*gone, at])), at)))
    assert layers(found) == tuple(sorted(gone))
    assert found is not None
    assert [attempt.name for attempt in found.attempts] == [f"{number}: layer {at}" for number, at in enumerate(gone, 1)]
    assert [attempt.loss.mean for attempt in found.attempts] == pytest.approx([loss_of(without(gone[:n])) for n in range(1, 5)])


def test_greedy_asks_for_what_is_left() -> None:
    fake = Fake(random_loss(1))
    find(ALL["greedy"], task(3, protect=[2]), Means(fake))
    assert [number for _, _, number in fake.asked] == [5, 4, 3]


def test_greedy_is_nested() -> None:
    fake = Fake(random_loss(5))
    sets = [set(layers(find(ALL["greedy"], task(count), Means(fake)))) for count in range(1, 6)]
    assert all(one < other for one, other in itertools.pairwise(sets))


# Evolution


@pytest.mark.parametrize("seed", range(12))
def test_evolution_finds_what_exhaustive_search_finds(seed: int) -> None:
    loss_of = random_loss(seed)
    found = find(ALL["evolve"], task(3), Means(Fake(loss_of)))
    best = min(itertools.combinations(range(6), 3), key=lambda gone: loss_of(without(gone)))
    assert layers(found) == best
    assert found is not None and found.attempts[-1].loss.mean == pytest.approx(loss_of(without(best)))


def test_evolution_gets_out_of_what_traps_greedy_search() -> None:
    """Layers 4 and 5 are cheap together only; each alone costs most."""

    def loss_of(kept: frozenset[int]) -> float:
        return 3 + 0.1 * len(without(sorted(kept)) - {4, 5}) + (0 if (4 in kept) == (5 in kept) else 1)

    means = Means(Fake(loss_of))
    assert layers(find(ALL["greedy"], task(2), means)) == (0, 1) == layers(find(ALL["loss"], task(2), means))
    assert layers(find(ALL["evolve"], task(2), means)) == (4, 5)


def test_evolution_is_the_same_every_time() -> None:
    one, other = (find(ALL["evolve"], task(4, depth=12), Means(Fake(additive(*range(12)), noise=0.5))) for _ in range(2))
    assert one == other


def test_evolution_reads_more_text_for_fewer_sets() -> None:
    fake = Fake(additive(*[index % 5 for index in range(24)]), noise=0.2)
    find(ALL["evolve"], task(8, depth=24), Means(fake))
    (_, share, sets), *rounds = fake.asked
    assert (share, sets) == (1.0, 24)  # the one-shot choice that it starts from
    assert [share for _, share, _ in rounds[:3]] == [1 / 16, 1 / 4, 1.0]
    assert [sets for _, _, sets in rounds[:3]] == [OFFSPRING, 4, 2]
    assert len(rounds) <= 3 * (GENERATIONS + 1)


def test_evolution_never_ends_worse_than_it_starts() -> None:
    for seed in range(6):
        fake = Fake(random_loss(seed))
        start, end = (find(ALL[name], task(2), Means(fake)) for name in ("loss", "evolve"))
        assert fake.loss_of(without(layers(end))) <= fake.loss_of(without(layers(start)))
        assert end is not None
        means = [attempt.loss.mean for attempt in end.attempts]
        assert means == sorted(means, reverse=True)


def test_evolution_with_nothing_to_exchange() -> None:
    assert layers(find(ALL["evolve"], task(2, protect=[0, 1, 2, 3]), Means(Fake(random_loss(0))))) == (4, 5)


# The best


def test_best_is_never_worse_than_its_candidates() -> None:
    names = ("block", "blocks", "rank", "deepest", "loss", "greedy", "evolve")
    for seed in range(8):
        fake = Fake(random_loss(seed), held_out=random_loss(100 + seed))
        found = find(Best(names), task(2), Means(fake, Prices()))
        assert found is not None and [attempt.name for attempt in found.attempts] == list(names)
        assert {attempt.part for attempt in found.attempts} == {"held out"}
        for attempt, name in zip(found.attempts, names, strict=True):
            own = find(ALL[name], task(2), Means(fake, Prices()))
            assert own is not None and own.blocks == attempt.blocks
            assert attempt.loss.mean == pytest.approx(fake.held_out(without(layers(Found(attempt.blocks)))))
        assert fake.held_out(without(layers(found))) == pytest.approx(min(attempt.loss.mean for attempt in found.attempts))


def test_best_is_chosen_on_held_out_text_only() -> None:
    fake = Fake(additive(0, 9, 9, 9, 9, 9), held_out=additive(9, 9, 9, 9, 0, 9))
    assert layers(find(Best(("loss", "deepest")), task(1), Means(fake, Prices()))) == (4,)
    assert layers(find(Best(("loss",)), task(1), Means(fake))) == (0,)
    assert fake.asked[-1] == ("held out", 1.0, 1)


def test_of_equal_candidates_the_first_is_taken() -> None:
    found = find(Best(("deepest", "loss")), task(1), Means(Fake(lambda kept: 1.0), Prices()))
    assert layers(found) == (4,)


def test_candidates_that_cannot_choose_are_left_out() -> None:
    """No two consecutive layers are free."""
    found = find(Best(("block", "loss")), task(2, protect=[1, 3, 5]), Means(Fake(random_loss(3)), Prices()))
    assert found is not None and [attempt.name for attempt in found.attempts] == ["loss"]
    assert find(Best(("block",)), task(2, protect=[1, 3, 5]), Means(Fake(random_loss(3)), Prices())) is None


def test_candidates_that_no_config_describes_are_left_out_while_others_are_there() -> None:
    """Stacks that keep layer 0 cannot be written."""
    fake = Fake(additive(5, 1, 1, 1, 1, 1))
    found = find(Best(("loss", "block", "greedy")), task(1), Means(fake, Prices(), broken=[0]))
    assert layers(found) == (0,) and found is not None and [attempt.name for attempt in found.attempts] == ["block"]
    assert layers(find(Best(("loss", "greedy")), task(1), Means(fake, Prices(), broken=[0]))) == (1,)


def test_best_leaves_evolution_out_unless_it_is_asked_for() -> None:
    best = ALL["best"]
    assert isinstance(best, Best) and "evolve" not in best.candidates
    assert {*best.candidates, "evolve", "best"} == {*ALL}


# All of them


@pytest.mark.parametrize("name", ["loss", "greedy", "evolve"])
def test_as_many_layers_as_there_are_cannot_go(name: str) -> None:
    means = Means(Fake(random_loss(0)))
    assert find(ALL[name], task(6), means) is None
    assert find(ALL[name], task(5, protect=[1, 2]), means) is None


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 6), st.sets(st.integers(0, 5), max_size=4), st.booleans())
def test_searches_choose_free_layers_as_many_as_asked_for(seed: int, count: int, protect: set[int], repeat: bool) -> None:
    for name in ("loss", "greedy", "evolve"):
        asked = task(count, protect=sorted(protect), repeat=repeat)
        fake = Fake(lambda kept: random.Random(f"{seed} {sorted(kept)}").random())
        found = find(ALL[name], asked, Means(fake))
        assert (found is None) == (count > asked.longest)
        if found is not None:
            assert len(layers(found)) == len({*layers(found)}) == count
            assert not protect & {*layers(found)}
            assert list(found.blocks) == sorted(found.blocks)
            assert not repeat or all(block.stop == block.start + 1 for block in found.blocks)


def test_layers_that_cost_nothing_are_chosen_by_all() -> None:
    for name in ("loss", "greedy", "evolve"):
        assert layers(find(ALL[name], task(3), Means(Fake(additive(1, 0, 2, 0, 0, 3))))) == (1, 3, 4)


def test_names_are_those_of_recipes() -> None:
    assert list(ALL) == list(get_args(StrategyName)) == [*get_args(Candidate), "best"]
    assert {name: ALL[name] for name in STRATEGIES} == STRATEGIES


def test_a_search_needs_losses() -> None:
    for name in ("loss", "greedy", "evolve", "best"):
        search = ALL[name]
        assert isinstance(search, Search) and search.name == name
        with pytest.raises(AssertionError, match="a search needs losses"):
            search.choose(task(1), Prices())


def test_strategies_by_distance_ask_for_no_loss() -> None:
    found = find(ALL["block"], replace(task(2)), Means(None, Prices()))  # type: ignore[arg-type]
    assert found == Found((Block(0, 2),))
