from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import pytest

from layercut.plan import Distance, Measurement, Table
from layercut.seams import Cost, Prices, Window, choose_boundaries, least_length
from layercut.stack import Boundary, LayerRef, Stack

METRIC = "angular[last]"
Matrix = Sequence[Sequence[float]]


def table(a: str, b: str, mean: Matrix, stderr: float = 0.0, metric: str = METRIC) -> Table:
    return Table(metric=metric, a=a, b=b, mean=tuple(map(tuple, mean)), stderr=tuple(tuple(stderr for _ in row) for row in mean))


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


def all_boundaries(windows: Sequence[Window], depth: int, depths: Mapping[str, int]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every way to fill the windows, written as plain loops: empty slices only where one model gives all of them."""
    least = 0 if len({window.model for window in windows}) == 1 else 1
    options = []
    for model, start, stop in windows:
        starts = range(depths[model] + 1) if start is None else [start]
        stops = range(depths[model] + 1) if stop is None else [stop]
        options.append([(a, b) for a in starts for b in stops if b - a >= least])
    for bounds in itertools.product(*options):
        if sum(b - a for a, b in bounds) == depth:
            yield bounds


def random_windows(dice: random.Random, depths: Mapping[str, int]) -> list[Window]:
    windows = []
    for _ in range(dice.randint(2, 4)):
        model = dice.choice(list(depths))
        start = dice.choice([None, dice.randint(0, depths[model] - 1)])
        stop = dice.choice([None, dice.randint(1, depths[model])])
        if start is not None and stop is not None and stop <= start:
            start, stop = stop - 1, start + 1
        windows.append(Window(model, start, stop))
    return windows


def test_boundaries_are_those_of_brute_force() -> None:
    dice = random.Random(20)
    kinds: dict[tuple[int, int], int] = {}
    while sum(kinds.values()) < 600:
        depths = {model: dice.randint(2, 5) for model in "abc"[: dice.choice([1, 1, 2, 3])]}
        windows, depth = random_windows(dice, depths), dice.randint(1, 12)
        candidates = list(all_boundaries(windows, depth, depths))
        if not candidates:
            continue
        known = random_prices(dice, depths, [0.0, 0.1, 0.25, 0.5] if dice.random() < 0.8 else [0.1 * k for k in range(40)])
        costs = {bounds: known.cost(stack_of(windows, bounds)).ticks for bounds in candidates}
        best = min(costs.values())
        expected = min(bounds for bounds in candidates if costs[bounds] == best)
        assert tuple(choose_boundaries(windows, depth, known)) == expected, (windows, depth)
        key = len({window.model for window in windows}), len(windows)
        kinds[key] = kinds.get(key, 0) + 1
    assert set(kinds) == {(1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4), (3, 3), (3, 4)}
    assert min(kinds.values()) >= 5


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


def test_a_deep_stack_is_searched_in_reasonable_time() -> None:
    depth = 50
    mean = [[abs(i - j) / depth for j in range(depth + 1)] for i in range(depth + 1)]
    known = prices({"m": depth}, table("m", "m", mean))
    windows = [Window("m", 0, None), Window("m", None, None), Window("m", None, depth)]
    assert choose_boundaries(windows, 40, known) == [(0, 0), (0, 0), (10, 50)]


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


def test_least_length() -> None:
    assert least_length([Window("m", 0, None), Window("m", None, 3)]) == 0
    assert least_length([Window("m", 0, None), Window("n", None, 3)]) == 1


def test_a_table_is_read_in_both_directions() -> None:
    mean = [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    known = prices({"a": 1, "b": 2}, table("a", "b", mean, stderr=0.05))
    assert known.distance(Boundary("a", 1), Boundary("b", 2)) == Distance(mean=0.6, stderr=0.05)
    assert known.distance(Boundary("b", 2), Boundary("a", 1)) == Distance(mean=0.6, stderr=0.05)
    assert known.ticks(Boundary("b", 0), Boundary("a", 1)) == 400_000_000_000


def test_only_tables_of_the_metric_count() -> None:
    known = prices({"m": 1}, table("m", "m", [[0.0, 0.9], [0.9, 0.0]], metric="cosine[all]"), table("m", "m", [[0.0, 0.2], [0.2, 0.0]]))
    assert known.distance(Boundary("m", 0), Boundary("m", 1)).mean == 0.2
    with pytest.raises(KeyError):
        known.distance(Boundary("m", 0), Boundary("n", 1))


def test_the_same_state_costs_nothing_whatever_was_measured() -> None:
    known = prices({"m": 1}, table("m", "m", [[5e-9, 0.2], [0.2, 5e-9]]))
    assert known.ticks(Boundary("m", 1), Boundary("m", 1)) == 0
    assert known.cost(stack_of([Window("m", 0, 1)], [(0, 1)])) == Cost(0, 0)


def test_cost_adds_seams_and_variances() -> None:
    mean = [[abs(i - j) / 10 for j in range(5)] for i in range(5)]
    known = prices({"m": 4}, table("m", "m", mean, stderr=0.3))
    stack = tuple(LayerRef(model="m", index=index) for index in (1, 3, 2))
    cost = known.cost(stack)  # seams 0→1, 2→3, 4→2, 3→4
    assert cost.ticks == 500_000_000_000
    assert cost.value == 0.5
    assert cost.variance == pytest.approx(4 * 0.09)
    assert cost.stderr == pytest.approx(0.6)


def test_sums_do_not_depend_on_their_order() -> None:
    """0.1 + 0.2 + 0.3 differs from 0.3 + 0.2 + 0.1 in floats; both stacks must tie."""
    mean = [[0.0] * 5 for _ in range(5)]
    for i, j, value in ((0, 1, 0.1), (2, 3, 0.2), (4, 2, 0.3), (3, 4, 0.3)):
        mean[i][j] = mean[j][i] = value
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1
    known = prices({"m": 4}, table("m", "m", mean))
    one = known.ticks(Boundary("m", 0), Boundary("m", 1)) + known.ticks(Boundary("m", 2), Boundary("m", 3)) + 300_000_000_000
    two = 300_000_000_000 + known.ticks(Boundary("m", 3), Boundary("m", 2)) + known.ticks(Boundary("m", 1), Boundary("m", 0))
    assert one == two == 600_000_000_000
