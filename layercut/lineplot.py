"""The line plot: one number for each layer as a PNG, with a band of one standard error."""

from __future__ import annotations

from collections.abc import Sequence

from layercut.axes import spacing, ticks
from layercut.canvas import HEIGHT, INK, LETTER, Canvas, Colour, Point
from layercut.heatmap import APART, clipped

LEFT, TOP, RIGHT, BOTTOM = 110, 72, 30, 72
WIDTH, TALL = 760, 380
"""Pixels of the field."""
LINE, BAND, GRID = Colour(44, 84, 160), Colour(214, 224, 242), Colour(228, 228, 228)


def draw_layers(values: Sequence[float], errors: Sequence[float], title: str, subtitle: str = "", name: str = "Distance") -> bytes:
    """The values of layers 0, 1, ... as a line with dots, over the band of `errors` on either side; the scale begins at 0 if it can."""
    canvas = Canvas(LEFT + WIDTH + RIGHT, TOP + TALL + BOTTOM)
    high = max((value + error for value, error in zip(values, errors, strict=True)), default=1.0)
    low = min(0.0, *(value - error for value, error in zip(values, errors, strict=True))) if values else 0.0
    high = high * 1.04 if high > low else low + 1
    step = WIDTH / max(1, len(values))

    def place(layer: int, value: float) -> Point:
        return Point(LEFT + step * (layer + 0.5), TOP + TALL * (1 - (value - low) / (high - low)))

    for value, label in ticks(low, high, 7):
        y = round(place(0, value).y)
        canvas.fill(LEFT, y, WIDTH, 1, GRID)
        canvas.text(label, LEFT - 8 - LETTER * len(label), y - HEIGHT // 2)
    _band(
        canvas,
        [place(layer, value + error) for layer, (value, error) in enumerate(zip(values, errors, strict=True))],
        [place(layer, value - error) for layer, (value, error) in enumerate(zip(values, errors, strict=True))],
    )
    points = [place(layer, value) for layer, value in enumerate(values)]
    if points:
        canvas.line(points, 2.2, LINE)
    for point in points:
        canvas.line([point], min(7.0, max(2.2, step * 0.6)), LINE)
    canvas.fill(LEFT, TOP + TALL, WIDTH, 1, INK)
    canvas.fill(LEFT, TOP, 1, TALL, INK)
    for layer in range(0, len(values), spacing(step, APART)):
        x = round(place(layer, 0).x)
        canvas.fill(x, TOP + TALL + 1, 1, 5, INK)
        canvas.text(str(layer), x - LETTER * len(str(layer)) // 2, TOP + TALL + 10)
    for line, text in enumerate((title, subtitle)):
        canvas.text(clipped(text, (canvas.width - LEFT) // LETTER), LEFT, 12 + 24 * line)
    canvas.text("Layer l", LEFT + (WIDTH - LETTER * 7) // 2, TOP + TALL + 38)
    label = clipped(name, TALL // LETTER)
    canvas.text_upwards(label, 12, TOP + (TALL + LETTER * len(label)) // 2)
    return canvas.png()


def _band(canvas: Canvas, above: Sequence[Point], below: Sequence[Point]) -> None:
    """The area between two lines of the same places."""
    for at in range(len(above) - 1):
        start, stop = above[at].x, above[at + 1].x
        for x in range(round(start), round(stop)):
            part = min(1.0, max(0.0, (x + 0.5 - start) / (stop - start)))
            top = above[at].y + part * (above[at + 1].y - above[at].y)
            bottom = below[at].y + part * (below[at + 1].y - below[at].y)
            canvas.fill(x, round(top), 1, round(bottom) - round(top), BAND)
