from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.heatmap import COLOURS, LARGEST, MARGIN, MAX_BOUNDARIES, VIRIDIS, bounds, cells, draw
from layercut.plan import Seam, Table

NEAR, FAR, RED, WHITE = VIRIDIS[0], VIRIDIS[-1], (255, 40, 40), (255, 255, 255)


class Picture(NamedTuple):
    width: int
    height: int
    pixels: list[list[tuple[int, int, int]]]


def read(png: bytes | None) -> Picture:
    """The pixels of a PNG, every part and checksum of it looked at."""
    assert png is not None and png[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = [], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(kind + data),)
        parts.append((kind, data))
        at += 12 + length
    assert [kind for kind, _ in parts] == [b"IHDR", b"PLTE", b"IDAT", b"IEND"] and at == len(png)
    width, height, *rest = struct.unpack(">IIBBBBB", parts[0][1])
    assert rest == [8, 3, 0, 0, 0]
    palette = parts[1][1]
    colours = [(palette[i], palette[i + 1], palette[i + 2]) for i in range(0, len(palette), 3)]
    data = zlib.decompress(parts[2][1])
    assert len(data) == height * (1 + width)
    rows = [data[row * (1 + width) : (row + 1) * (1 + width)] for row in range(height)]
    assert {row[0] for row in rows} == {0}
    return Picture(width, height, [[colours[pixel] for pixel in row[1:]] for row in rows])


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
    """An 8 differs from a 0 by the dots of its bar."""
    ink = COLOURS[1]
    picture = read(draw(table([[0.0] * 40] * 40), []))
    above = [row[MARGIN:] for row in picture.pixels[:MARGIN]]
    assert sum(pixel == ink for row in above for pixel in row) > 100
    assert all(pixel != ink for row in picture.pixels[MARGIN:] for pixel in row[MARGIN:])


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
