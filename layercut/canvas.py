"""The canvas: pixels that become a PNG. Rectangles, smooth lines and plain text, with zlib alone; knows nothing of what is drawn."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from typing import NamedTuple


class Colour(NamedTuple):
    """Red, green and blue, 0 to 255."""

    red: int
    green: int
    blue: int

    def over(self, below: Sequence[int], share: float) -> Colour:
        """This colour where it covers a share of 0 to 1 of another one."""
        red, green, blue = (round(under + (own - under) * share) for own, under in zip(self, below, strict=True))
        return Colour(red, green, blue)


PAPER = Colour(255, 255, 255)
INK = Colour(40, 40, 40)

LETTER = 10
"""Width of a letter, in pixels; all are as wide."""
HEIGHT = 20
"""Height of a line of text, in pixels."""
FIRST, LAST = " ", "~"
"""The letters that the font has; others are drawn as a question mark."""


class Point(NamedTuple):
    """A place on the canvas, in pixels from its upper left corner; pixel 0 reaches from 0 to 1."""

    x: float
    y: float


class Canvas:
    """A white canvas of `width` x `height` pixels. What lies outside of it is not drawn."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._rows = [bytearray(PAPER) * width for _ in range(height)]
        self._font: _Font | None = None

    def fill(self, left: int, top: int, width: int, height: int, colour: Colour) -> None:
        """A rectangle."""
        start, stop = max(0, left), min(self.width, left + width)
        for row in range(max(0, top), min(self.height, top + height)):
            if stop > start:
                self._rows[row][3 * start : 3 * stop] = bytes(colour) * (stop - start)

    def frame(self, left: int, top: int, width: int, height: int, thick: int, colour: Colour) -> None:
        """The frame around a rectangle, outside of it."""
        for at in (top - thick, top + height):
            self.fill(left - thick, at, width + 2 * thick, thick, colour)
        for at in (left - thick, left + width):
            self.fill(at, top - thick, thick, height + 2 * thick, colour)

    def line(self, points: Sequence[Point], thick: float, colour: Colour) -> None:
        """A line through the points, with smooth edges; of one point a dot."""
        covered: dict[tuple[int, int], float] = {}
        for begin, end in pairwise(points if len(points) > 1 else [*points, *points]):
            reach = thick / 2 + 1
            for y in range(max(0, math.floor(min(begin.y, end.y) - reach)), min(self.height, math.ceil(max(begin.y, end.y) + reach))):
                for x in range(max(0, math.floor(min(begin.x, end.x) - reach)), min(self.width, math.ceil(max(begin.x, end.x) + reach))):
                    share = thick / 2 + 0.5 - _distance(Point(x + 0.5, y + 0.5), begin, end)
                    if share > covered.get((x, y), 0.0):
                        covered[x, y] = min(share, 1.0)
        for (x, y), share in covered.items():
            self._rows[y][3 * x : 3 * x + 3] = bytes(colour.over(self._rows[y][3 * x : 3 * x + 3], share))

    def text(self, text: str, left: int, top: int, colour: Colour = INK) -> None:
        """A line of text, its upper left corner given."""
        for x, y in self._dots(text):
            self.fill(left + x, top + y, 1, 1, colour)

    def text_upwards(self, text: str, left: int, bottom: int, colour: Colour = INK) -> None:
        """A line of text turned to the left, to be read from `bottom` upwards; its letters stand to the right of `left`."""
        for x, y in self._dots(text):
            self.fill(left + y, bottom - 1 - x, 1, 1, colour)

    def _dots(self, text: str) -> list[tuple[int, int]]:
        self._font = self._font or _Font()
        return [(LETTER * place + x, y) for place, letter in enumerate(text) for x, y in self._font.dots(letter)]

    def png(self) -> bytes:
        """The picture as the bytes of a PNG file (RFC 2083)."""
        above, lines = bytearray(3 * self.width), bytearray()
        for row in self._rows:  # a row that is the one above costs nothing: filter 2, up
            lines += b"\2" + bytes(len(row)) if row == above else b"\0" + row
            above = row
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
        )


class _Font:
    """The letters of data/font.pbm: the X11 font misc-fixed 10x20, which is in the public domain."""

    def __init__(self) -> None:
        data = (resources.files("layercut") / "data" / "font.pbm").read_bytes()
        self._width = LETTER * (ord(LAST) - ord(FIRST) + 1)
        self._pitch = (self._width + 7) // 8
        self._bits = data[-self._pitch * HEIGHT :]

    def dots(self, letter: str) -> list[tuple[int, int]]:
        """The pixels of a letter, from its upper left corner."""
        place = LETTER * (ord(letter if FIRST <= letter <= LAST else "?") - ord(FIRST))
        return [(x, y) for y in range(HEIGHT) for x in range(LETTER) if self._bit(place + x, y)]

    def _bit(self, x: int, y: int) -> bool:
        return bool(self._bits[y * self._pitch + x // 8] >> (7 - x % 8) & 1)


def _distance(point: Point, begin: Point, end: Point) -> float:
    """How far a point is from a line segment."""
    along_x, along_y = end.x - begin.x, end.y - begin.y
    length = along_x * along_x + along_y * along_y
    part = 0.0
    if length:
        part = min(1.0, max(0.0, ((point.x - begin.x) * along_x + (point.y - begin.y) * along_y) / length))
    return math.hypot(point.x - begin.x - part * along_x, point.y - begin.y - part * along_y)
