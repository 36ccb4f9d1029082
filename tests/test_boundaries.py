from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest

from layercut.boundaries import Window, choose_boundaries, least_length
from layercut.plan import Measurement, Table
from layercut.seams import Prices
from layercut.stack import LayerRef, Stack

METRIC = "angular[last]"
Matrix = Sequence[Sequence[float]]
Bounds = tuple[tuple[int, int], ...]


def table(a: str, b: str, mean: Matrix) -> Table:
    rows = tuple(map(tuple, mean))
    return Table(metric=METRIC, a=a, b=b, mean=rows, stderr=tuple(tuple(0.0 for _ in row) for row in rows))


def prices(depths: Mapping[str, int], *tables: Table) -> Prices:
    return Prices(Measurement(tables=tables, samples=1, tokens=1, details={}), METRIC, depths)


def random_prices(dice: random.Random, depths: Mapping[str, int], values: Sequence[float]) -> Prices:
    """Tables with ties; a model against itself is symmetric with zeros on the diagonal. No triangle inequality."""
    tables = []
    for a, b in itertools.combinations_with_replacement(depths, 2):
        mean = [[dice.choice(values) for _ in range(depths[b] + 1)] for _ in range(depths[a] + 1)]
        if a == b:
            mean = [[0.0 if i == j else mean[max(i, j)][min(i, j)] for j in range(depths[a] + 1)] for i in range(depths[a] + 1)]
        tables.append(table(a, b, mean))
    return prices(depths, *tables)


def stack_of(windows: Sequence[Window], bounds: Sequence[tuple[int, int]]) -> Stack:
    return tuple(LayerRef(model=w.model, index=i) for w, (start, stop) in zip(windows, bounds, strict=True) for i in range(start, stop))


def fits(window: Window, start: int, stop: int) -> bool:
    """The constraints of one slice, as the recipe says them."""
    length = stop - start
    return (
        (window.least is None or length >= window.least)
        and (window.most is None or length <= window.most)
        and all(start <= layer < stop for layer in window.holds)
    )


def all_boundaries(windows: Sequence[Window], depth: int, depths: Mapping[str, int]) -> Iterator[Bounds]:
    """Every way to fill the windows, written as plain loops.

    Empty slices only where one model gives all of them and none begins with layers of the one before.
    """
    plain = len({window.model for window in windows}) == 1 and all(window.overlap is None for window in windows)
    options = []
    for window in windows:
        full = depths[window.model]
        starts = range(full + 1) if window.start is None else [window.start]
        stops = range(full + 1) if window.stop is None else [window.stop]
        fixed = window.start is not None and window.stop is not None
        options.append([(a, b) for a in starts for b in stops if b - a >= (0 if plain else 1) and (fixed or fits(window, a, b))])
    for bounds in itertools.product(*options):
        joined = zip(windows[1:], bounds, bounds[1:], strict=False)
        overlaps = all(w.overlap is None or after[0] == before[1] - w.overlap for w, before, after in joined)
        if overlaps and sum(b - a for a, b in bounds) == depth:
            yield bounds


def random_window(dice: random.Random, depths: Mapping[str, int], before: Window | None, constrained: bool) -> Window:
    model = dice.choice(list(depths))
    full = depths[model]
    start = dice.choice([None, dice.randint(0, full - 1)])
    stop = dice.choice([None, dice.randint(1, full)])
    if start is not None and stop is not None:
        start, stop = min(start, stop - 1), max(stop, start + 1)
        return Window(model, start, stop)
    if not constrained:
        return Window(model, start, stop)
    least = dice.choice([None, None, dice.randint(1, full)])
    most = dice.choice([None, None, dice.randint(least or 1, full)])
    holds = tuple(sorted(dice.sample(range(full), dice.choice([0, 0, 1, 2]))))
    overlap = dice.choice([None, dice.randint(0, 2)]) if before is not None and before.model == model and start is None else None
    return Window(model, start, stop, least, most, holds, overlap)


def random_case(dice: random.Random) -> tuple[list[Window], int, dict[str, int]]:
    depths = {model: dice.randint(2, 5) for model in "abc"[: dice.choice([1, 1, 2, 3])]}
    constrained = dice.random() < 0.6
    windows: list[Window] = []
    for _ in range(dice.choice([2, 2, 3, 3, 4, 5])):
        windows.append(random_window(dice, depths, windows[-1] if windows else None, constrained))
    return windows, dice.randint(1, 12), depths


def few(windows: Sequence[Window]) -> bool:
    """Whether plain loops come to an end soon."""
    return sum((window.start is None) + (window.stop is None) for window in windows) <= 5


def test_boundaries_are_those_of_brute_force() -> None:
    dice = random.Random(20)
    seen: dict[str, int] = {}
    for _ in range(3000):
        windows, depth, depths = random_case(dice)
        if not few(windows):
            continue
        known = random_prices(dice, depths, [0.0, 0.1, 0.25, 0.5] if dice.random() < 0.8 else [0.1 * k for k in range(40)])
        found = choose_boundaries(windows, depth, known)
        candidates = list(all_boundaries(windows, depth, depths))
        costs = [known.cost(stack_of(windows, bounds)).ticks for bounds in candidates]
        if not candidates:
            assert found is None, (windows, depth)
        else:
            best = min(costs)
            expected = min(bounds for bounds, cost in zip(candidates, costs, strict=True) if cost == best)
            assert found is not None and tuple(found) == expected, (windows, depth)
        ties = len(costs) > 1 and costs.count(min(costs)) > 1
        kinds = [
            f"{len({window.model for window in windows})} models", f"{len(windows)} slices", "none" if not candidates else "one",
            *["min"] * any(window.least is not None for window in windows), *["max"] * any(window.most is not None for window in windows),
            *["protect"] * any(window.holds for window in windows), *["overlap"] * any(window.overlap is not None for window in windows),
            *["ties"] * ties,
        ]  # fmt: skip
        for kind in kinds:
            seen[kind] = seen.get(kind, 0) + 1
    assert seen["none"] + seen["one"] >= 2000
    assert {"1 models", "2 models", "3 models", "2 slices", "3 slices", "4 slices", "5 slices"} <= set(seen)
    assert min(seen[kind] for kind in ("one", "none", "min", "max", "protect", "ties", "3 models", "5 slices")) >= 40
    assert seen["overlap"] >= 40


def test_an_empty_slice_makes_no_seam() -> None:
    """Two small steps through an empty slice must not undercut the seam that the stack really has."""
    far = [[0.0 if i == j else 0.9 for j in range(5)] for i in range(5)]
    far[1][2] = far[2][1] = far[2][3] = far[3][2] = 0.1  # 1 to 3 by way of 2 looks like 0.2
    far[2][4] = far[4][2] = 0.3
    known = prices({"m": 4}, table("m", "m", far))
    windows = [Window("m", 0, None), Window("m", None, None), Window("m", None, 4)]
    assert choose_boundaries(windows, 2, known) == [(0, 0), (0, 2), (4, 4)]
    assert known.cost(stack_of(windows, [(0, 0), (0, 2), (4, 4)])).value == 0.3
    assert known.cost(stack_of(windows, [(0, 1), (2, 2), (3, 4)])).value == 0.9


def test_planted_handover_between_two_models() -> None:
    cross = [[0.8] * 7 for _ in range(5)]
    cross[3][4] = 0.01
    known = prices({"a": 4, "b": 6}, table("a", "b", cross))
    windows = [Window("a", 0, None), Window("b", None, 6)]
    assert choose_boundaries(windows, 5, known) == [(0, 3), (4, 6)]
    assert choose_boundaries([Window("b", 0, None), Window("a", None, 4)], 5, known) == [(0, 4), (3, 4)]


def test_ties_take_the_smallest_boundaries() -> None:
    flat = [[0.0 if i == j else 0.25 for j in range(7)] for i in range(7)]
    known = prices({"m": 6}, table("m", "m", flat))
    assert choose_boundaries([Window("m", 0, None), Window("m", None, 6)], 4, known) == [(0, 0), (2, 6)]
    assert choose_boundaries([Window("m", 0, None), Window("m", None, 6)], 6, known) == [(0, 0), (0, 6)]
    assert choose_boundaries([Window("m", 0, None), Window("m", None, 6)], 8, known) == [(0, 2), (0, 6)]


def test_fixed_windows_have_one_answer() -> None:
    known = prices({"m": 6}, table("m", "m", [[0.5] * 7] * 7))
    assert choose_boundaries([Window("m", 0, 4), Window("m", 2, 6)], 8, known) == [(0, 4), (2, 6)]


FLAT = [[0.0 if i == j else 0.25 for j in range(7)] for i in range(7)]


@pytest.mark.parametrize(
    ("windows", "depth", "expected"),
    [
        ([Window("m", 0, None), Window("m", None, 6, least=2)], 4, [(0, 0), (2, 6)]),
        ([Window("m", 0, None, least=3), Window("m", None, 6)], 4, [(0, 3), (5, 6)]),
        ([Window("m", 0, None, most=1), Window("m", None, 6, most=2)], 3, [(0, 1), (4, 6)]),
        ([Window("m", 0, None, most=1), Window("m", None, 6, most=2)], 4, None),
        ([Window("m", 0, None, holds=(2,)), Window("m", None, 6)], 4, [(0, 3), (5, 6)]),
        ([Window("m", 0, None, holds=(0, 4)), Window("m", None, 6)], 4, None),
        ([Window("m", 0, None), Window("m", None, 6, holds=(1,))], 4, None),
        ([Window("m", 0, None), Window("m", None, 6, overlap=2)], 8, [(0, 2), (0, 6)]),
        ([Window("m", 0, None), Window("m", None, 6, overlap=0)], 6, [(0, 1), (1, 6)]),
        ([Window("m", 0, None), Window("m", None, 6, overlap=2)], 7, None),
        ([Window("m", 0, 2), Window("m", None, None, overlap=1), Window("m", None, 6, overlap=1)], 8, [(0, 2), (1, 2), (1, 6)]),
    ],
)
def test_constraints(windows: list[Window], depth: int, expected: list[tuple[int, int]] | None) -> None:
    known = prices({"m": 6}, table("m", "m", FLAT))
    assert choose_boundaries(windows, depth, known) == expected


def test_a_deep_stack_is_searched_in_reasonable_time() -> None:
    depth = 80
    mean = [[abs(i - j) / depth for j in range(depth + 1)] for i in range(depth + 1)]
    known = prices({"m": depth}, table("m", "m", mean))
    windows = [Window("m", 0, None), Window("m", None, None), Window("m", None, depth)]
    began = time.process_time()
    assert choose_boundaries(windows, 64, known) == [(0, 0), (0, 0), (16, 80)]
    assert time.process_time() - began < 30


@pytest.mark.parametrize(
    ("window", "lengths"),
    [
        (Window("m", 0, None), [0, 1, 2, 3]),
        (Window("m", 2, None), [0, 1]),
        (Window("m", None, 2), [0, 1, 2]),
        (Window("m", None, None), [0, 1, 2, 3]),
        (Window("m", 1, 3), [2]),
    ],
)
def test_lengths_of_windows(window: Window, lengths: list[int]) -> None:
    assert list(window.lengths(3, 0)) == lengths
    assert list(window.lengths(3, 1)) == [length for length in lengths if length >= 1]


@pytest.mark.parametrize(
    ("window", "lengths"),
    [
        (Window("m", 0, None, least=2), [2, 3, 4]),
        (Window("m", 0, None, most=2), [0, 1, 2]),
        (Window("m", None, None, 2, 3), [2, 3]),
        (Window("m", None, None, holds=(1, 3)), [3, 4]),
        (Window("m", None, 2, least=3), []),
        (Window("m", None, None, most=2, holds=(0, 3)), []),
    ],
)
def test_lengths_under_constraints(window: Window, lengths: list[int]) -> None:
    assert list(window.lengths(4, 0)) == lengths


@pytest.mark.parametrize(
    ("window", "starts", "stops"),
    [
        (Window("m", None, None), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]),
        (Window("m", 1, None), [1], [0, 1, 2, 3, 4]),
        (Window("m", None, 3), [0, 1, 2, 3, 4], [3]),
        (Window("m", None, None, holds=(1, 2)), [0, 1], [3, 4]),
        (Window("m", 2, None, holds=(1,)), [], [2, 3, 4]),
        (Window("m", None, 2, holds=(2,)), [0, 1, 2], []),
    ],
)
def test_where_windows_start_and_stop(window: Window, starts: list[int], stops: list[int]) -> None:
    assert list(window.starts(4)) == starts
    assert list(window.stops(4)) == stops


def test_least_length() -> None:
    assert least_length([Window("m", 0, None), Window("m", None, 3)]) == 0
    assert least_length([Window("m", 0, None), Window("n", None, 3)]) == 1
    assert least_length([Window("m", 0, None), Window("m", None, 3, overlap=0)]) == 1
