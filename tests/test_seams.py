from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.plan import Distance, Measurement, Table
from layercut.seams import TICKS, Cost, Prices
from layercut.stack import Boundary, LayerRef, Stack

METRIC = "angular[last]"
Matrix = Sequence[Sequence[float]]


def table(a: str, b: str, mean: Matrix, stderr: float = 0.0, metric: str = METRIC) -> Table:
    return Table(metric=metric, a=a, b=b, mean=tuple(map(tuple, mean)), stderr=tuple(tuple(stderr for _ in row) for row in mean))


def prices(depths: Mapping[str, int], *tables: Table) -> Prices:
    return Prices(Measurement(tables=tables, samples=1, tokens=1, details={}), METRIC, depths)


def whole(depth: int, model: str = "m") -> Stack:
    return tuple(LayerRef(model=model, index=index) for index in range(depth))


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
    assert known.cost(whole(1)) == Cost(0, 0)


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


def test_a_layer_that_adds_nothing_costs_nothing() -> None:
    mean = [[abs(i - j) / 10 for j in range(5)] for i in range(5)]
    known = prices({"m": 4}, table("m", "m", mean))
    silent = LayerRef(model="m", index=1, identity=True)
    assert known.cost((*whole(2), silent, silent, *whole(4)[2:])).ticks == 0
    assert known.cost((*whole(1), silent, *whole(4)[2:])).value == 0.1


def test_a_head_of_another_model_is_a_seam_even_behind_a_silent_layer() -> None:
    """Embeddings and head belong to the first and the last layer, whatever these add."""
    cross = [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.25]]
    known = prices({"a": 2, "b": 2}, table("a", "b", cross))
    assert known.cost((*whole(2, "a"), LayerRef(model="b", index=1, identity=True))).value == 0.25
    assert known.cost((LayerRef(model="b", index=1, identity=True), *whole(2, "a"))).value == 0.5


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.7, 1e-9]), min_size=3, max_size=8))
def test_equal_seams_in_another_order_cost_the_same(values: list[float]) -> None:
    """A stack whose seams have these costs, and the same seams in another order."""
    depth = len(values)
    for order in itertools.islice(itertools.permutations(values), 6):
        mean = [[0.0] * (depth + 1) for _ in range(depth + 1)]
        for i, value in enumerate(order):  # repeating layer i makes the seam i + 1 to i
            mean[i + 1][i] = mean[i][i + 1] = value
        known = prices({"m": depth}, table("m", "m", mean))
        doubled = tuple(layer for layer in whole(depth) for _ in range(2))
        assert known.cost(doubled).ticks == sum(round(value * TICKS) for value in values)


def test_a_metric_may_have_a_table_for_either_direction() -> None:
    known = prices({"a": 1, "b": 1}, table("a", "b", [[0.1, 0.2], [0.3, 0.4]]), table("b", "a", [[0.5, 0.6], [0.7, 0.8]]))
    assert known.distance(Boundary("a", 0), Boundary("b", 1)).mean == 0.2
    assert known.distance(Boundary("b", 1), Boundary("a", 0)).mean == 0.7
