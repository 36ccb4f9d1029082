from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.axes import spacing, ticks


@pytest.mark.parametrize(
    ("low", "high", "most", "labels"),
    [
        (0, 1, 6, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 1, 5, ["0.0", "0.5", "1.0"]),
        (0, 0.4, 5, ["0.0", "0.1", "0.2", "0.3", "0.4"]),
        (0, 730, 4, ["0", "200", "400", "600"]),
        (-3, 3, 7, ["-3", "-2", "-1", "0", "1", "2", "3"]),
        (0, 3e-9, 4, ["0", "1e-09", "2e-09", "3e-09"]),
        (0, 5e12, 6, ["0", "1e+12", "2e+12", "3e+12", "4e+12", "5e+12"]),
        (0.21, 0.24, 3, ["0.22", "0.24"]),
    ],
)
def test_ticks_are_round(low: float, high: float, most: int, labels: list[str]) -> None:
    assert [tick.label for tick in ticks(low, high, most)] == labels


@pytest.mark.parametrize(("low", "high"), [(0.25, 0.25), (3, 2), (-1.7e308, 1.7e308)])
def test_a_scale_without_a_length_has_one_tick(low: float, high: float) -> None:
    assert [tick.value for tick in ticks(low, high, 5)] == [low]


@given(st.floats(-1e9, 1e9, allow_nan=False), st.floats(1e-9, 1e9, allow_nan=False), st.integers(2, 12))
def test_ticks_lie_on_the_scale_in_order(low: float, span: float, most: int) -> None:
    found = ticks(low, low + span, most)
    assert 1 <= len(found) <= most
    assert all(low - 1e-6 * (abs(low) + span) <= tick.value <= low + span + 1e-6 * (abs(low) + span) for tick in found)
    assert [tick.value for tick in found] == sorted({tick.value for tick in found})


@pytest.mark.parametrize(("pixels", "apart", "step"), [(40, 36, 1), (20, 36, 2), (10, 36, 5), (6, 36, 10), (1, 36, 50), (0.3, 36, 200)])
def test_spacing(pixels: float, apart: int, step: int) -> None:
    assert spacing(pixels, apart) == step
