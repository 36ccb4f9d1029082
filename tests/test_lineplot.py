from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_canvas import read, where

from layercut.lineplot import BAND, LEFT, LINE, TALL, TOP, WIDTH, draw_layers


def test_the_line_goes_through_the_values() -> None:
    """The scale begins at 0 and ends 4 % above the largest value."""
    picture = read(draw_layers([0.0, 1.0, 0.5], [0.0] * 3, "model"))
    for layer, value in enumerate([0.0, 1.0, 0.5]):
        x, y = LEFT + WIDTH * (layer + 0.5) / 3, TOP + TALL * (1 - value / 1.04)
        assert picture.pixels[min(int(y), TOP + TALL - 1)][int(x)] == LINE
    top = min(y for _, y in where(picture, LINE))
    assert top == pytest.approx(TOP + TALL * (1 - 1 / 1.04), abs=5)


def test_the_band_is_one_standard_error_wide() -> None:
    picture = read(draw_layers([1.0] * 40, [0.25] * 40, "model"))
    column = [y for x, y in where(picture, BAND) if x == LEFT + WIDTH // 2]
    assert min(column) == pytest.approx(TOP + TALL * (1 - 1.25 / 1.3), abs=1)
    assert max(column) == pytest.approx(TOP + TALL * (1 - 0.75 / 1.3), abs=2)


def test_values_below_zero_stay_on_the_picture() -> None:
    picture = read(draw_layers([-2.0, 1.0], [0.5, 0.5], "model"))
    assert max(y for _, y in where(picture, LINE)) < TOP + TALL


@pytest.mark.parametrize("values", [[], [0.0], [0.3], [0.0, 0.0]])
def test_few_or_equal_values_can_be_drawn(values: list[float]) -> None:
    assert read(draw_layers(values, [0.0] * len(values), "m" * 500, "\n\x1b[31m", "x" * 500)).width > WIDTH


@settings(max_examples=15)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=6))
def test_any_values_can_be_drawn(values: list[float]) -> None:
    assert draw_layers(values, values, "model") == draw_layers(values, values, "model")
