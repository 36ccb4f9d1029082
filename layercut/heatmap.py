"""Distances as a picture: a map of all boundaries in which the seams are framed, or of all blocks with the best of each size marked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from layercut.axes import spacing, ticks
from layercut.blockscores import Triangle, least
from layercut.canvas import HEIGHT, INK, LETTER, PAPER, Canvas, Colour, Point
from layercut.plan import Seam, Table

MAX_BOUNDARIES = 2000
"""Boundaries of the largest table that is drawn: more would be finer than a pixel of any screen."""
SIDE = 600
"""Pixels that a side of the field has at most, for tables of fewer boundaries than that."""
LARGEST = 24
"""Pixels of the side of a cell at most."""
MARGIN = 40
"""Pixels on every side of the field, for the numbers of the boundaries."""
APART = 36
"""Pixels between two numbers at least."""

# Points of the colour map viridis (matplotlib, CC0), from dark to bright; between them colours are mixed.
VIRIDIS = (
    Colour(68, 1, 84), Colour(71, 45, 123), Colour(59, 82, 139), Colour(44, 114, 142), Colour(33, 145, 140), Colour(40, 174, 128),
    Colour(94, 201, 98), Colour(173, 220, 48), Colour(253, 231, 37),
)  # fmt: skip
FRAME = Colour(255, 40, 40)

# The map of blocks: room around its field, for labels, and the least size of that field.
LEFT, TOP, RIGHT, BOTTOM = 96, 72, 132, 72
NARROW = 300


def draw(table: Table, seams: Iterable[Seam]) -> bytes | None:
    """The table as a PNG: boundary i of `a` downwards, boundary j of `b` to the right, near bright and far dark.

    A frame stands around the cell of every seam between the two models. None for a table that is empty or too large to draw.
    """
    height, width = len(table.mean), max(map(len, table.mean), default=0)
    if not 0 < max(height, width) <= MAX_BOUNDARIES or width == 0:
        return None
    cell = max(1, min(LARGEST, SIDE // max(height, width)))
    canvas = Canvas(2 * MARGIN + cell * width, 2 * MARGIN + cell * height)
    low, high = bounds(table)
    for i, line in enumerate(table.mean):
        for j, value in enumerate(line):
            canvas.fill(MARGIN + cell * j, MARGIN + cell * i, cell, cell, shade(1 - share(value, low, high)))
    for at in range(0, max(height, width), spacing(cell, APART)):
        if at < height:
            canvas.text(str(at), MARGIN - 6 - LETTER * len(str(at)), MARGIN + cell * at + (cell - HEIGHT) // 2)
        if at < width:
            canvas.text(str(at), MARGIN + cell * at + (cell - LETTER * len(str(at))) // 2, MARGIN - 4 - HEIGHT)
    for i, j in cells(table, seams):
        if i < height and j < width:
            canvas.frame(MARGIN + cell * j, MARGIN + cell * i, cell, cell, 4, PAPER)
            canvas.frame(MARGIN + cell * j, MARGIN + cell * i, cell, cell, 3, FRAME)
    return canvas.png()


def draw_blocks(distances: Triangle, title: str, subtitle: str = "") -> bytes | None:
    """Distances of blocks as a PNG in the style of the figures of arXiv 2403.17887: block size n over layer l, near bright and far dark.

    A dot marks the block of least distance of each size. None for a model that is too large or too shallow to draw.
    """
    sizes = len(distances)
    if not 1 <= sizes < MAX_BOUNDARIES:
        return None
    depth = sizes + 1
    cell = max(1, min(2 * LARGEST, SIDE // depth))
    wide = max(NARROW, cell * depth)
    canvas = Canvas(LEFT + wide + RIGHT, TOP + cell * sizes + BOTTOM)
    low, high = min(map(min, distances)), max(map(max, distances))
    for size, row in enumerate(distances, 1):
        top = TOP + cell * (sizes - size)
        for start, value in enumerate(row):
            gap = int(cell >= 8)
            canvas.fill(LEFT + cell * start, top, cell - gap, cell - gap, shade(1 - share(value, low, high)))
        _dot(canvas, Point(LEFT + cell * least(row) + (cell - int(cell >= 8)) / 2, top + (cell - int(cell >= 8)) / 2), cell)
    _label_blocks(canvas, depth, cell, (title, subtitle))
    _colour_bar(canvas, LEFT + wide + 24, cell * sizes, low, high)
    return canvas.png()


def _dot(canvas: Canvas, middle: Point, cell: int) -> None:
    """The mark of the nearest block, with a white edge where there is room for one."""
    wide = min(14.0, max(4.0, cell * 0.55))
    if cell >= 12:
        canvas.line([middle], wide, PAPER)
    canvas.line([middle], wide - 2 if cell >= 12 else wide, FRAME)


def _label_blocks(canvas: Canvas, depth: int, cell: int, titles: Sequence[str]) -> None:
    """Titles, axes and their numbers."""
    floor = TOP + cell * (depth - 1)
    for line, text in enumerate(titles):
        canvas.text(clipped(text, (canvas.width - LEFT) // LETTER), LEFT, 12 + 24 * line)
    for layer in range(0, depth, spacing(cell, APART)):
        canvas.fill(LEFT + cell * layer + cell // 2, floor + 1, 1, 5, INK)
        canvas.text(str(layer), LEFT + cell * layer + (cell - LETTER * len(str(layer))) // 2, floor + 8)
    step = spacing(cell, APART)
    for size in (1, *range(step, depth, step)) if step > 1 else range(1, depth):
        if size == 1 or (size - 1) * cell >= HEIGHT:
            middle = floor - cell * size + cell // 2
            canvas.fill(LEFT - 7, middle, 5, 1, INK)
            canvas.text(str(size), LEFT - 10 - LETTER * len(str(size)), middle - HEIGHT // 2)
    across, upwards = "Layer l", "Block size n"
    canvas.text(across, LEFT + (cell * depth - LETTER * len(across)) // 2, floor + 36)
    canvas.text_upwards(upwards, 12, max(TOP + LETTER * len(upwards), (TOP + floor + LETTER * len(upwards)) // 2))
    note = "nearest of each size"
    if cell * depth >= 500:  # it stands in the corner where no block is
        left = LEFT + cell * depth - LETTER * len(note)
        canvas.line([Point(left - 14, TOP + 10)], 12, FRAME)
        canvas.text(note, left, TOP)


def _colour_bar(canvas: Canvas, left: int, height: int, low: float, high: float) -> None:
    """What the colours say: a bar from `low` at its bottom, bright, to `high`."""
    for row in range(height):
        canvas.fill(left, TOP + row, 18, 1, shade(row / max(1, height - 1)))
    for value, label in ticks(low, high, max(2, height // 60)):
        at = TOP + height - 1 - round(share(value, low, high) * (height - 1))
        canvas.fill(left + 18, at, 5, 1, INK)
        canvas.text(label, left + 27, min(max(at - HEIGHT // 2, TOP - 4), TOP + height - HEIGHT + 4))


def clipped(text: str, longest: int) -> str:
    """The text in one line of at most so many letters, without its middle if need be: names end in what tells them apart."""
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    keep = max(0, longest - 3)
    return f"{line[: keep // 2]}...{line[len(line) - (keep - keep // 2) :]}"


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


def shade(place: float) -> Colour:
    """The colour at a place of the colour map, from 0 (dark) to 1 (bright)."""
    step = place * (len(VIRIDIS) - 1)
    below = min(int(step), len(VIRIDIS) - 2)
    return VIRIDIS[below + 1].over(VIRIDIS[below], step - below)


def share(value: float, low: float, high: float) -> float:
    """Where a value stands between two bounds, 0 to 1. Finite ones may lie further apart than any float: then the middle is as good."""
    span = high - low
    if span == math.inf:
        return 0.5
    return (value - low) / span if span else 0.0
