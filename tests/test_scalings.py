from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from layercut.scalings import Filtered, Parameters, factor, factors, interpolate, literal, matches, slice_scalings
from layercut.stack import LayerRef, Scaling

DOWN, GATE = "model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.gate_proj.weight"


def parameters(scale: Any) -> Parameters:
    return Parameters.model_validate({"scale": scale})


def by(scale: Any, position: int = 0, length: int = 1, name: str = DOWN) -> float:
    """The factor that a slice with this setting gives to a tensor of one of its layers."""
    layer = LayerRef(model="m", index=3, scalings=slice_scalings([parameters(scale)], position, length))
    return factor(layer, name)


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("*", DOWN, True),
        ("*.down_proj.weight", DOWN, True),
        ("*.down_proj.weight", GATE, False),
        ("model.layers.3.*", DOWN, True),
        ("model.layers.?.mlp.*", DOWN, True),
        ("model.layers.[0-3].mlp.*", DOWN, True),
        ("model.layers.[!3].mlp.*", DOWN, False),
        ("down_proj", DOWN, False),  # the whole name, not a part of it
        ("*.DOWN_proj.weight", DOWN, False),
        ("a[b]", "a[b]", False),
    ],
)
def test_patterns(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) is fits


@given(st.text(alphabet="ab.[]*?!-0", max_size=8), st.text(alphabet="ab.[]*?!-0", max_size=8))
def test_a_literal_pattern_matches_its_text_and_no_other(one: str, other: str) -> None:
    assert matches(literal(one), one)
    assert matches(literal(one), other) is (one == other)


def test_factors_are_those_of_each_group_in_order_without_ones() -> None:
    groups = (
        (Scaling(tensors="*.down_proj.weight", by=0.5), Scaling(tensors="*", by=3)),
        (Scaling(tensors="*", by=1),),
        (Scaling(tensors="*.gate_proj.weight", by=7),),
        (Scaling(tensors="*.down_proj.weight", by=0),),
    )
    assert factors(groups, DOWN) == (0.5, 0.0)
    assert factors(groups, GATE) == (3.0, 7.0)
    assert factors(groups, "other") == (3.0,)
    assert factors((), DOWN) == ()
    layer = LayerRef(model="m", index=3, scalings=groups)
    assert (factor(layer, DOWN), factor(layer, GATE), factor(layer, "other")) == (0, 21, 3)


@pytest.mark.parametrize(
    ("value", "at", "factor"),
    [
        (0.5, 0.3, 0.5),
        ((2.0,), 0.0, 2.0),
        ((2.0,), 1.0, 2.0),
        ((0.0, 1.0), 0.0, 0.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 1.0), 1.0, 1.0),
        ((0.0, 1.0, 0.0), 0.25, 0.5),
        ((0.0, 1.0, 0.0), 0.5, 1.0),
        ((0.0, 1.0, 0.0), 0.75, 0.5),
        ((1.0, 3.0, 2.0), 1.0, 2.0),
    ],
)
def test_lists_are_interpolated(value: Any, at: float, factor: float) -> None:
    assert interpolate(value, at) == pytest.approx(factor)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6).map(tuple), st.integers(2, 20))
def test_a_list_starts_and_stops_at_its_ends_and_stays_between_its_points(values: tuple[float, ...], length: int) -> None:
    found = [interpolate(values, position / (length - 1)) for position in range(length)]
    assert (found[0], found[-1]) == (values[0], values[-1])
    assert all(min(values) - 1e-9 <= value <= max(values) + 1e-9 for value in found)


def test_a_list_is_spread_over_the_slice_and_one_layer_takes_its_last() -> None:
    assert [by([0, 1], position, 5) for position in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert by([0, 0.25], 0, 1) == 0.25
    assert [by([3, 5], position, 2) for position in range(2)] == [3, 5]
    assert by([0.5, 2], 0, 2) == 0.5  # what stands outside the stack is at position 0


def test_the_first_filter_that_matches_counts() -> None:
    scale = [{"filter": "down_proj", "value": 0.5}, {"filter": "mlp", "value": 2}, {"value": 3}, {"filter": "gate", "value": 9}]
    assert by(scale) == 0.5
    assert by(scale, name=GATE) == 2
    assert by(scale, name="model.layers.3.input_layernorm.weight") == 3
    assert by({"filter": "down_proj", "value": 0.5}, name=GATE) == 1


@pytest.mark.parametrize("everything", [None, "", "*"])
def test_filters_that_every_name_passes(everything: str | None) -> None:
    assert by({"filter": everything, "value": 0.5}) == 0.5


def test_a_filter_is_a_part_of_the_name_and_no_pattern() -> None:
    assert by({"filter": "layers.3.", "value": 0.5}) == 0.5
    assert by({"filter": "m?p", "value": 0.5}) == 1
    assert by({"filter": "[", "value": 0.5}, name="a[b") == 0.5


def test_the_nearer_level_comes_first_for_each_tensor() -> None:
    """mergekit's order: source, slice, recipe; a level that says nothing of a tensor leaves it to the next."""
    source, part, recipe = (parameters({"filter": word, "value": value}) for word, value in (("down", 2), ("mlp", 3), ("", 5)))
    layer = LayerRef(model="m", index=3, scalings=slice_scalings([source, part, recipe], 0, 1))
    assert [factor(layer, name) for name in (DOWN, GATE, "other")] == [2, 3, 5]
    layer = LayerRef(model="m", index=3, scalings=slice_scalings([None, parameters(7), recipe], 0, 1))
    assert [factor(layer, name) for name in (DOWN, "other")] == [7, 7]
    assert slice_scalings([None, Parameters(), None], 0, 1) == ()


def test_a_factor_of_one_changes_nothing() -> None:
    assert slice_scalings([parameters(1.0)], 0, 4) == ()
    assert slice_scalings([parameters([1, 2])], 0, 4) == ()
    assert slice_scalings([parameters([1, 2])], 3, 4) == ((Scaling(tensors="*", by=2),),)
    shield = slice_scalings([parameters([{"filter": "down", "value": 1}, {"value": 2}])], 0, 4)
    assert [factor(LayerRef(model="m", index=3, scalings=shield), name) for name in (DOWN, GATE)] == [1, 2]


@pytest.mark.parametrize(
    ("scale", "settings"),
    [
        (0.5, [Filtered(value=0.5)]),
        (2, [Filtered(value=2.0)]),
        ("1e-3", [Filtered(value=0.001)]),
        ([0, 1], [Filtered(value=(0.0, 1.0))]),
        ({"filter": "x", "value": 2}, [Filtered(filter="x", value=2.0)]),
        ([{"filter": "x", "value": [0, 1]}, {"value": 2}], [Filtered(filter="x", value=(0.0, 1.0)), Filtered(value=2.0)]),
    ],
)
def test_all_ways_of_writing(scale: Any, settings: list[Filtered]) -> None:
    assert parameters(scale).scale == tuple(settings)
    again = Parameters.model_validate(parameters(scale).model_dump(mode="json"))
    assert again == parameters(scale)


@pytest.mark.parametrize("scale", ["half", True, [], [0.5, "x"], [True], float("nan"), [float("inf")], {"value": None}, [[1]]])
def test_what_is_no_factor(scale: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        parameters(scale)
    message = "Value error, expected a factor such as 0.5, or a list of factors that is spread over the slice"
    assert {error["msg"] for error in caught.value.errors()} == {message}
