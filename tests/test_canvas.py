from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.canvas import HEIGHT, INK, LETTER, PAPER, Canvas, Colour, Point

RED = Colour(255, 0, 0)


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
    assert [kind for kind, _ in parts] == [b"IHDR", b"IDAT", b"IEND"] and at == len(png)
    width, height, *rest = struct.unpack(">IIBBBBB", parts[0][1])
    assert rest == [8, 2, 0, 0, 0]
    data = zlib.decompress(parts[1][1])
    assert len(data) == height * (1 + 3 * width)
    pixels, above = [], bytes(3 * width)
    for row in range(height):
        start = row * (1 + 3 * width)
        line = data[start + 1 : start + 1 + 3 * width]
        assert data[start] in (0, 2)
        above = bytes((value + up) % 256 for value, up in zip(line, above, strict=True)) if data[start] == 2 else line
        pixels.append([(above[3 * x], above[3 * x + 1], above[3 * x + 2]) for x in range(width)])
    return Picture(width, height, pixels)


def where(picture: Picture, colour: tuple[int, int, int]) -> set[tuple[int, int]]:
    return {(x, y) for y, row in enumerate(picture.pixels) for x, pixel in enumerate(row) if pixel == colour}


def test_a_new_canvas_is_paper() -> None:
    picture = read(Canvas(4, 3).png())
    assert picture == (4, 3, [[PAPER] * 4] * 3)


def test_rectangles() -> None:
    canvas = Canvas(5, 4)
    canvas.fill(1, 2, 3, 1, RED)
    assert where(read(canvas.png()), RED) == {(1, 2), (2, 2), (3, 2)}


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(-3, 9), st.integers(-3, 9))
def test_what_lies_outside_is_not_drawn(left: int, top: int, width: int, height: int) -> None:
    canvas = Canvas(4, 3)
    canvas.fill(left, top, width, height, RED)
    inside = {(x, y) for x in range(4) for y in range(3) if left <= x < left + width and top <= y < top + height}
    assert where(read(canvas.png()), RED) == inside


def test_a_frame_lies_outside_of_its_rectangle() -> None:
    canvas = Canvas(7, 6)
    canvas.frame(2, 2, 3, 2, 1, RED)
    ring = {(x, y) for x in range(1, 6) for y in range(1, 5)} - {(x, y) for x in range(2, 5) for y in range(2, 4)}
    assert where(read(canvas.png()), RED) == ring


def test_a_straight_line_covers_whole_pixels() -> None:
    canvas = Canvas(9, 5)
    canvas.line([Point(2.5, 2.5), Point(6.5, 2.5)], 1, RED)
    assert where(read(canvas.png()), RED) == {(x, 2) for x in range(2, 7)}


def test_edges_of_a_line_are_smooth() -> None:
    """A line of width 1 between two rows of pixels covers half of each."""
    canvas = Canvas(9, 4)
    canvas.line([Point(2.5, 2), Point(6.5, 2)], 1, RED)
    picture = read(canvas.png())
    assert picture.pixels[1][4] == picture.pixels[2][4] == (255, 128, 128)
    assert picture.pixels[0][4] == picture.pixels[3][4] == PAPER


def test_a_corner_is_not_drawn_twice() -> None:
    """Where two segments meet, half covered pixels stay half covered."""
    straight, bent = Canvas(12, 4), Canvas(12, 4)
    straight.line([Point(2, 2), Point(10, 2)], 1, RED)
    bent.line([Point(2, 2), Point(6, 2), Point(10, 2)], 1, RED)
    assert straight.png() == bent.png()


def test_a_line_of_one_point_is_a_dot() -> None:
    canvas = Canvas(9, 9)
    canvas.line([Point(4.5, 4.5)], 5, RED)
    picture = read(canvas.png())
    assert where(picture, RED) >= {(4, 4), (2, 4), (6, 4), (4, 2), (4, 6)}
    assert picture.pixels[2][2] not in (RED, PAPER), "the corner of a dot is partly covered"
    assert picture.pixels[0] == [PAPER] * 9


@pytest.mark.parametrize("points", [[Point(-50, -50), Point(-40, 99)], [Point(3, 3), Point(900, 900)], [Point(2, -7)]])
def test_lines_may_leave_the_canvas(points: list[Point]) -> None:
    canvas = Canvas(6, 6)
    canvas.line(points, 3, RED)
    assert read(canvas.png()).width == 6


def test_letters_are_those_of_the_font() -> None:
    canvas = Canvas(LETTER, HEIGHT)
    canvas.text("L", 0, 0)
    dots = where(read(canvas.png()), INK)
    columns = sorted({x for x, _ in dots})
    bars = {column: sum(x == column for x, _ in dots) for column in columns}
    assert [bars[column] for column in columns] == [13, 13, 1, 1, 1, 1, 1, 1], "an L is a post and a foot"
    assert {y for x, y in dots if x in columns[2:]} == {15}, "letters stand on line 15"


def test_every_letter_is_another_picture() -> None:
    seen = set()
    for code in range(32, 127):
        canvas = Canvas(LETTER, HEIGHT)
        canvas.text(chr(code), 0, 0)
        seen.add(canvas.png())
    assert len(seen) == 95


def test_letters_stand_side_by_side() -> None:
    both, first = Canvas(2 * LETTER, HEIGHT), Canvas(2 * LETTER, HEIGHT)
    both.text("ab", 0, 0)
    first.text("a", 0, 0)
    first.text("b", LETTER, 0)
    assert both.png() == first.png()


def test_unknown_letters_are_question_marks() -> None:
    odd, plain = Canvas(4 * LETTER, HEIGHT), Canvas(4 * LETTER, HEIGHT)
    odd.text("a\u00e4\n\U0001f600", 0, 0)
    plain.text("a???", 0, 0)
    assert odd.png() == plain.png()


def test_text_upwards_is_text_turned_to_the_left() -> None:
    flat, turned = Canvas(3 * LETTER, HEIGHT), Canvas(HEIGHT, 3 * LETTER)
    flat.text("n=1", 0, 0)
    turned.text_upwards("n=1", 0, 3 * LETTER)
    rows = read(flat.png()).pixels
    assert read(turned.png()).pixels == [[row[x] for row in rows] for x in reversed(range(3 * LETTER))]


def test_the_same_drawing_gives_the_same_bytes() -> None:
    def drawing() -> bytes:
        canvas = Canvas(40, 40)
        canvas.line([Point(1, 3), Point(30, 38), Point(39, 2)], 2.5, RED)
        canvas.text("ab", 3, 3)
        return canvas.png()

    assert drawing() == drawing()
