from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import failure
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from layercut.errors import LayercutError, RecipeError
from layercut.selectors import Count, Every, Selectors, count_of, positions

SELECTORS: TypeAdapter[Any] = TypeAdapter(Selectors)
COUNT: TypeAdapter[Any] = TypeAdapter(Count)


class Place:
    """A place of which the path alone is told."""

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=".".join(map(str, path)), hint=hint)


def chosen(at: Any, depth: int = 10, key: str = "at") -> list[int]:
    return positions(SELECTORS.validate_python(at), depth, Place(), key)


def refusal(call: Callable[[], Any]) -> str:
    return failure(RecipeError, call)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (3, [3]),
        (0, [0]),
        (-1, [9]),
        (-10, [0]),
        ("3", None),
        ("2-4", [2, 3, 4]),
        ("4-4", [4]),
        ("0-9", list(range(10))),
        ("-4--1", [6, 7, 8, 9]),
        ("7--2", [7, 8]),
        ("-10-1", [0, 1]),
        ({"every": 2}, [0, 2, 4, 6, 8]),
        ({"every": 3, "from": 1}, [1, 4, 7]),
        ({"every": 2, "from": 2, "to": 6}, [2, 4, 6]),  # `to` is inclusive
        ({"every": 2, "from": 2, "to": 5}, [2, 4]),
        ({"every": 1, "to": 3}, [0, 1, 2, 3]),
        ({"every": 4, "from": -5, "to": -1}, [5, 9]),
        ({"every": 99}, [0]),
        ([5, 1, 3], [5, 1, 3]),
        ([7, "0-2", {"every": 2, "from": 4, "to": 6}, -1], [7, 0, 1, 2, 4, 6, 9]),
        ([2], [2]),
    ],
)
def test_selectors(at: Any, expected: list[int] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="expected a layer such as 3, a range such as"):
            chosen(at)
    else:
        assert chosen(at) == expected


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (10, "at: layer 10 does not exist: the stack has layers 0 to 9 here"),
        (-11, "at: layer -11 does not exist: the stack has layers 0 to 9 here"),
        ([0, 10], "at.1: layer 10 does not exist: the stack has layers 0 to 9 here"),
        ("8-10", "at: layer 10 does not exist: the stack has layers 0 to 9 here"),
        ("-12-3", "at: layer -12 does not exist: the stack has layers 0 to 9 here"),
        ("0-999999999", "at: layer 999999999 does not exist: the stack has layers 0 to 9 here"),
        ({"every": 1, "to": 10}, "at: layer 10 does not exist: the stack has layers 0 to 9 here"),
        ({"every": 1, "from": -99}, "at: layer -99 does not exist: the stack has layers 0 to 9 here"),
        ({"every": 1, "from": 10**30, "to": 10**40}, f"at: layer {10**40} does not exist: the stack has layers 0 to 9 here"),
        ("5-3", "at: the range 5 to 3 is empty: it ends before it starts"),
        ("-1--4", "at: the range 9 to 6 is empty: it ends before it starts"),
        ({"every": 2, "from": 6, "to": 4}, "at: the range 6 to 4 is empty: it ends before it starts"),
        ([3, 3], "at.1: layer 3 is named twice"),
        ([9, -1], "at.1: layer 9 is named twice"),
        (["2-5", 0, "4-6"], "at.2: layer 4 is named twice"),
    ],
)
def test_selectors_that_cannot_be(at: Any, message: str) -> None:
    assert refusal(lambda: chosen(at)) == message


def test_no_selector_names_no_layer() -> None:
    assert refusal(lambda: positions((), 10, Place())) == "at: names no layer"


@given(st.integers(1, 30), st.data())
def test_a_range_is_what_its_ends_say(depth: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    step = data.draw(st.integers(1, depth))
    expected = [position for position in range(depth) if first <= position <= last]
    assert chosen(f"{first}-{last}", depth) == expected
    assert chosen(f"{first - depth}-{last - depth}", depth) == expected
    assert chosen({"every": step, "from": first, "to": last}, depth) == [p for p in expected if (p - first) % step == 0]


@pytest.mark.parametrize(
    ("layers", "depth", "count"),
    [(6, 10, 6), ("25%", 32, 8), ("25%", 30, 7), ("100%", 7, 7), ("10%", 10, 1), ("33.3%", 3, None), ("33.4%", 3, 1), ("0.1%", 1000, 1)],
)
def test_counts(layers: int | str, depth: int, count: int | None) -> None:
    if count is None:
        assert refusal(lambda: count_of(layers, depth, Place())) == "layers: 33.3% of 3 layers is less than one layer"
    else:
        assert count_of(layers, depth, Place()) == count


@given(st.integers(1, 300), st.integers(1, 1000))
def test_percentages_are_exact(depth: int, tenths: int) -> None:
    exact = depth * tenths // 1000
    text = f"{tenths // 10}.{tenths % 10}%"
    if exact:
        assert count_of(text, depth, Place()) == exact
    else:
        assert refusal(lambda: count_of(text, depth, Place())) == f"layers: {text} of {depth} layers is less than one layer"


@pytest.mark.parametrize("value", [1, 6, 10**30, "25%", "100%", "0.5%", "33.33%"])
def test_numbers_of_layers(value: int | str) -> None:
    assert COUNT.validate_python(value) == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "a number of layers is at least 1"),
        (-3, "a number of layers is at least 1"),
        ("0%", "a percentage of the layers is above 0% and at most 100%"),
        ("100.1%", "a percentage of the layers is above 0% and at most 100%"),
        ("101%", "a percentage of the layers is above 0% and at most 100%"),
        ("6", "expected a number of layers such as 6, or a percentage such as 25%"),
        ("25", "expected a number of layers such as 6, or a percentage such as 25%"),
        ("-5%", "expected a number of layers such as 6, or a percentage such as 25%"),
        ("25 %", "expected a number of layers such as 6, or a percentage such as 25%"),
        (True, "expected a number of layers such as 6, or a percentage such as 25%"),
        (2.0, "expected a number of layers such as 6, or a percentage such as 25%"),
        (None, "expected a number of layers such as 6, or a percentage such as 25%"),
        ([1], "expected a number of layers such as 6, or a percentage such as 25%"),
    ],
)
def test_what_is_no_number_of_layers(value: Any, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        COUNT.validate_python(value)
    assert [error["msg"] for error in caught.value.errors()] == [f"Value error, {message}"]


def test_the_key_of_the_selectors_is_told() -> None:
    assert refusal(lambda: chosen([0, 12], key="protect")) == "protect.1: layer 12 does not exist: the stack has layers 0 to 9 here"
    assert refusal(lambda: chosen(12, key="to")) == "to: layer 12 does not exist: the stack has layers 0 to 9 here"


def test_every_is_a_record_with_the_names_of_the_recipe() -> None:
    every = Every.model_validate({"every": 2, "from": 1, "to": -2})
    assert (every.every, every.start, every.stop) == (2, 1, -2)
    assert every.model_dump(by_alias=True) == {"every": 2, "from": 1, "to": -2}
    assert chosen(every) == [1, 3, 5, 7]
