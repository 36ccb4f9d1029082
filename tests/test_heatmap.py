from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_canvas import read, where

from layercut.blockscores import normalised, triangle
from layercut.canvas import INK, PAPER
from layercut.heatmap import (
    BOTTOM,
    FRAME,
    LARGEST,
    LEFT,
    MARGIN,
    MAX_BOUNDARIES,
    RIGHT,
    TOP,
    VIRIDIS,
    bounds,
    cells,
    clipped,
    draw,
    draw_blocks,
    shade,
    share,
)  # fmt: skip
from layercut.plan import Seam, Table

NEAR, FAR, RED, WHITE = VIRIDIS[-1], VIRIDIS[0], FRAME, PAPER


def table(mean: list[list[float]], a: str = "m", b: str = "m") -> Table:
    rows = tuple(tuple(row) for row in mean)
    return Table(metric="angular[last]", a=a, b=b, mean=rows, stderr=rows)


def seam(start: int, stop: int, a: str = "m", b: str = "m") -> Seam:
    return Seam(at=start, from_model=a, from_boundary=start, to_model=b, to_boundary=stop)


def test_cells_go_from_near_to_far() -> None:
    picture = read(draw(table([[0.0, 1.0], [1.0, 0.0]]), []))
    assert (picture.width, picture.height) == (2 * MARGIN + 2 * LARGEST, 2 * MARGIN + 2 * LARGEST)
    at = [MARGIN + LARGEST // 2, MARGIN + LARGEST + LARGEST // 2]
    assert [[picture.pixels[row][column] for column in at] for row in at] == [[NEAR, FAR], [FAR, NEAR]]
    assert picture.pixels[0][0] == WHITE


def test_boundaries_of_a_go_down_and_those_of_b_across() -> None:
    picture = read(draw(table([[0.0, 0.0, 2.0]], "a", "b"), []))
    assert (picture.width, picture.height) == (2 * MARGIN + 3 * LARGEST, 2 * MARGIN + LARGEST)
    assert picture.pixels[MARGIN + 3][MARGIN + 2 * LARGEST + 3] == FAR


def test_a_frame_stands_around_the_cell_of_a_seam() -> None:
    mean = [[float(abs(i - j)) for j in range(8)] for i in range(8)]
    plain, framed = read(draw(table(mean), [])), read(draw(table(mean), [seam(2, 5)]))
    changed = {(x, y) for y in range(plain.height) for x in range(plain.width) if plain.pixels[y][x] != framed.pixels[y][x]}
    left, top = MARGIN + LARGEST * 5, MARGIN + LARGEST * 2
    assert min(changed) == (left - 4, top - 4) and max(changed) == (left + LARGEST + 3, top + LARGEST + 3)
    assert framed.pixels[top + 5][left - 1] == framed.pixels[top - 3][left + 5] == RED
    assert framed.pixels[top][left] == plain.pixels[top][left], "the cell itself stays as it is"


def test_a_seam_of_two_models_is_found_from_either_side() -> None:
    crossing = table([[0.0] * 4] * 5, "a", "b")
    assert cells(crossing, [seam(4, 1, "a", "b"), seam(2, 3, "b", "a"), seam(1, 1, "a", "a")]) == [(4, 1), (3, 2)]
    assert cells(table([[0.0]]), [seam(7, 3)]) == [(7, 3)], "repeating a block makes a seam backwards"


def test_a_seam_outside_of_the_table_is_not_drawn() -> None:
    mean = [[0.0, 1.0], [1.0, 0.0]]
    assert draw(table(mean), [seam(7, 9)]) == draw(table(mean), [])


def test_numbers_are_drawn() -> None:
    picture = read(draw(table([[0.0] * 40] * 40), []))
    above = [row[MARGIN:] for row in picture.pixels[:MARGIN]]
    assert sum(pixel == INK for row in above for pixel in row) > 100
    assert all(pixel != INK for row in picture.pixels[MARGIN:] for pixel in row[MARGIN:])


@pytest.mark.parametrize("mean", [[], [[]], [[], []], [[0.0] * (MAX_BOUNDARIES + 1)]])
def test_no_picture_of_nothing_and_of_too_much(mean: list[list[float]]) -> None:
    assert draw(table(mean), []) is None


def test_a_large_table_is_a_pixel_a_cell() -> None:
    picture = read(draw(table([[float(i == j) for j in range(700)] for i in range(700)]), []))
    assert picture.width == 700 + 2 * MARGIN
    assert picture.pixels[MARGIN + 9][MARGIN + 9] == FAR and picture.pixels[MARGIN + 9][MARGIN + 10] == NEAR


def test_the_same_table_gives_the_same_bytes() -> None:
    mean = [[float((7 * i + j) % 5) for j in range(9)] for i in range(9)]
    assert draw(table(mean), [seam(1, 4)]) == draw(table(mean), [seam(1, 4)])


floats = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(floats, min_size=1, max_size=5), min_size=1, max_size=5), st.integers(-9, 9), st.integers(-9, 9))
def test_any_finite_table_can_be_drawn(mean: list[list[float]], start: int, stop: int) -> None:
    """Ragged rows, numbers whose difference is infinite, seams below zero: a report may come from anyone."""
    low, high = bounds(table(mean))
    assert low <= high
    assert read(draw(table(mean), [seam(start, stop)])).height == 2 * MARGIN + LARGEST * len(mean)


# Blocks


def distances(depth: int) -> list[list[float]]:
    """Row n - 1: blocks of n layers; the middle is nearest."""
    return [[size + abs(start + size / 2 - depth / 2) for start in range(depth - size + 1)] for size in range(1, depth)]


def at(start: int, size: int, depth: int, cell: int) -> tuple[int, int]:
    """A pixel of the cell of a block, away from the dot in its middle."""
    return TOP + cell * (depth - 1 - size) + 2, LEFT + cell * start + 2


def test_block_sizes_go_upwards_and_layers_to_the_right() -> None:
    rows = [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 1.0]]
    picture = read(draw_blocks(rows, "model"))
    cell = 2 * LARGEST
    assert picture.width == LEFT + max(300, 4 * cell) + RIGHT and picture.height == TOP + 3 * cell + BOTTOM
    y, x = at(2, 2, 4, cell)
    assert picture.pixels[y][x] == NEAR
    y, x = at(1, 3, 4, cell)
    assert picture.pixels[y][x] == FAR
    y, x = at(2, 3, 4, cell)
    assert picture.pixels[y][x] == WHITE, "three layers cannot start at layer 2 of 4"


def test_a_dot_marks_the_nearest_block_of_each_size() -> None:
    picture = read(draw_blocks([[3, 1, 2, 1], [5, 4, 3], [7, 8]], "model"))
    cell = 2 * LARGEST
    marked = [
        (size, start)
        for size in (1, 2, 3)
        for start in range(4 - size + 1)
        if picture.pixels[TOP + cell * (3 - size) + cell // 2][LEFT + cell * start + cell // 2] == FRAME
    ]
    assert marked == [(1, 1), (2, 2), (3, 0)]


@pytest.mark.parametrize("depth", [2, 3, 30, 200, 700])
def test_models_of_every_depth_can_be_drawn(depth: int) -> None:
    picture = read(draw_blocks(distances(depth), "model", "metric"))
    assert picture.height == TOP + max(1, min(2 * LARGEST, 600 // depth)) * (depth - 1) + BOTTOM
    assert len(where(picture, FRAME)) >= depth - 1


def test_no_picture_of_one_layer_and_of_too_many() -> None:
    assert draw_blocks([], "model") is None
    assert draw_blocks([[0.0]] * MAX_BOUNDARIES, "model") is None


def test_equal_distances_can_be_drawn() -> None:
    assert read(draw_blocks(normalised(triangle([[0.0] * 5] * 5)), "model")).pixels[TOP + 3][LEFT + 3] == NEAR


def test_titles_of_others_do_no_harm() -> None:
    assert draw_blocks(distances(3), "\x1b[31m\n" + "x" * 9000, "\u4e2d") is not None
    assert clipped("a\n  b", 9) == "a b"
    assert clipped("0123456789", 7) == "01...89" and clipped("0123456789", 10) == "0123456789"


def test_the_colour_map_ends_where_it_should() -> None:
    assert (shade(0), shade(0.5), shade(1)) == (VIRIDIS[0], VIRIDIS[4], VIRIDIS[-1])
    assert (share(3, 1, 5), share(2, 2, 2), share(0, -1.7e308, 1.7e308)) == (0.5, 0.0, 0.5)
