"""A table of distances as a picture: a PNG in which the seams are framed. Written with zlib alone."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

from layercut.plan import Seam, Table

MAX_BOUNDARIES = 2000
"""Boundaries of the largest table that is drawn: more would be finer than a pixel of any screen."""
SIDE = 600
"""Pixels that a side of the field has at most, for tables of fewer boundaries than that."""
LARGEST = 24
"""Pixels of the side of a cell at most."""
MARGIN = 40
"""Pixels on every side of the field, for the numbers of the boundaries."""
APART = 30
"""Pixels between two numbers at least."""

# Points of the colour map viridis (matplotlib, CC0), from near to far; between them colours are mixed.
VIRIDIS = (
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98), (173, 220, 48),
    (253, 231, 37),
)  # fmt: skip
SHADES = 200
PAPER, INK, FRAME, EDGE = SHADES, SHADES + 1, SHADES + 2, SHADES + 3
COLOURS = ((255, 255, 255), (60, 60, 60), (255, 40, 40), (255, 255, 255))

# Digits of three by five pixels, a row to each group of bits.
DIGITS = {
    "0": "111101101101111", "1": "010110010010111", "2": "111001111100111", "3": "111001111001111", "4": "101101111001001",
    "5": "111100111001111", "6": "111100111101111", "7": "111001001001001", "8": "111101111101111", "9": "111101111001111",
}  # fmt: skip
DOT = 2
"""Pixels of a dot of a digit."""


class _Canvas:
    """Pixels as indices into the palette."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows = [bytearray([PAPER]) * width for _ in range(height)]

    def fill(self, left: int, top: int, width: int, height: int, colour: int) -> None:
        """A rectangle; what lies outside the picture is not drawn."""
        start, stop = max(0, left), min(self.width, left + width)
        for row in range(max(0, top), min(self.height, top + height)):
            if stop > start:
                self.rows[row][start:stop] = bytes([colour]) * (stop - start)

    def frame(self, left: int, top: int, side: int, thick: int, colour: int) -> None:
        """The frame around a square, outside of it."""
        outer = side + 2 * thick
        for shift in (-thick, side):
            self.fill(left - thick, top + shift, outer, thick, colour)
            self.fill(left + shift, top - thick, thick, outer, colour)

    def number(self, value: int, left: int, top: int) -> None:
        """A number, its upper left corner given."""
        for place, digit in enumerate(str(value)):
            for at, bit in enumerate(DIGITS[digit]):
                if bit == "1":
                    self.fill(left + DOT * (4 * place + at % 3), top + DOT * (at // 3), DOT, DOT, INK)

    def png(self) -> bytes:
        """The picture as the bytes of a PNG file (RFC 2083), eight bits of palette a pixel."""
        palette = b"".join(bytes(colour) for colour in (*_shades(), *COLOURS))
        pixels = zlib.compress(b"".join(b"\0" + row for row in self.rows), 9)
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 3, 0, 0, 0)
        parts = ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", pixels), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def draw(table: Table, seams: Iterable[Seam]) -> bytes | None:
    """The table as a PNG: boundary i of `a` downwards, boundary j of `b` to the right, near dark and far bright.

    A frame stands around the cell of every seam between the two models. None for a table that is empty or too large to draw.
    """
    height, width = len(table.mean), max(map(len, table.mean), default=0)
    if not 0 < max(height, width) <= MAX_BOUNDARIES or width == 0:
        return None
    cell = max(1, min(LARGEST, SIDE // max(height, width)))
    canvas = _Canvas(2 * MARGIN + cell * width, 2 * MARGIN + cell * height)
    low, high = bounds(table)
    for i, line in enumerate(table.mean):
        for j, value in enumerate(line):
            canvas.fill(MARGIN + cell * j, MARGIN + cell * i, cell, cell, _shade(value, low, high))
    step = next(step for scale in (1, 10, 100, 1000) for step in (scale, 2 * scale, 5 * scale) if step * cell >= APART)
    for at in range(0, max(height, width), step):
        middle = MARGIN + cell * at + (cell - 5 * DOT) // 2
        if at < height:
            canvas.number(at, MARGIN - 6 - DOT * (4 * len(str(at)) - 1), middle)
        if at < width:
            canvas.number(at, MARGIN + cell * at + (cell - DOT * (4 * len(str(at)) - 1)) // 2, MARGIN - 6 - 5 * DOT)
    for i, j in cells(table, seams):
        if i < height and j < width:
            canvas.frame(MARGIN + cell * j, MARGIN + cell * i, cell, 4, EDGE)
            canvas.frame(MARGIN + cell * j, MARGIN + cell * i, cell, 3, FRAME)
    return canvas.png()


def bounds(table: Table) -> tuple[float, float]:
    """The smallest and the largest distance of a table that is not empty."""
    values = [value for line in table.mean for value in line]
    return min(values), max(values)


def cells(table: Table, seams: Iterable[Seam]) -> list[tuple[int, int]]:
    """The cells of the table in which seams stand. Between two models a seam may go either way; within one its cell is (from, to)."""
    found: list[tuple[int, int]] = []
    for seam in seams:
        if (seam.from_model, seam.to_model) == (table.a, table.b):
            found.append((seam.from_boundary, seam.to_boundary))
        elif (seam.to_model, seam.from_model) == (table.a, table.b):
            found.append((seam.to_boundary, seam.from_boundary))
    return found


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _shades() -> Sequence[tuple[int, int, int]]:
    found = []
    for shade in range(SHADES):
        place, part = divmod(shade * (len(VIRIDIS) - 1), SHADES - 1)
        below, above = VIRIDIS[place], VIRIDIS[min(place + 1, len(VIRIDIS) - 1)]
        mixed = [round(low + (high - low) * part / (SHADES - 1)) for low, high in zip(below, above, strict=True)]
        found.append((mixed[0], mixed[1], mixed[2]))
    return found


def _shade(value: float, low: float, high: float) -> int:
    """Finite bounds may lie further apart than any float: then the middle is as good as any shade."""
    span = high - low
    if span == 0:
        return 0
    part = (value - low) / span
    return round(part * (SHADES - 1)) if 0 <= part <= 1 else SHADES // 2
