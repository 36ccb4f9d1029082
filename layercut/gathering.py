"""Reads tensors that are gathered from strips of others, a piece at a time, whatever their dtype. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from layercut.copying import Range, SourceFiles
from layercut.plan import Gather, Strip

PIECE = 1 << 22
"""Bytes that are gathered at once, or read at once where rows are so short that all between the strips is read too."""
FEW = 8
"""Rows that are read strip by strip."""


def gathered_pieces(gather: Gather, size: int, folders: Mapping[str, Path], opened: SourceFiles) -> Iterator[bytearray]:
    """The `size` bytes from `gather.at` on. Raises CheckpointError when a source cannot be read."""
    step = min(PIECE, max(FEW, PIECE // max(1, *(strip.stride for strip in gather.strips))) * gather.width)
    for first in range(gather.at, gather.at + size, step):
        last = min(first + step, gather.at + size)
        rows = range(first // gather.width, (last - 1) // gather.width + 1)
        whole = _strip_by_strip if len(rows) <= FEW else _row_by_row
        yield whole(gather, first, last, folders, opened)


def _strip_by_strip(gather: Gather, first: int, last: int, folders: Mapping[str, Path], opened: SourceFiles) -> bytearray:
    """A piece of few, long rows: only what it needs is read."""
    data = bytearray()
    for row in range(first // gather.width, (last - 1) // gather.width + 1):
        at = row * gather.width
        for strip in gather.strips:
            begin, end = max(first, at), min(last, at + strip.width)
            if begin < end:
                start = strip.begin + row * strip.stride + begin - at
                data += opened.read(Range(folders[strip.model] / strip.file, start, start + end - begin))
            at += strip.width
    return data


def _row_by_row(gather: Gather, first: int, last: int, folders: Mapping[str, Path], opened: SourceFiles) -> bytearray:
    """A piece of many, short rows: each strip is read with all that lies between its parts."""
    low, high = first // gather.width, (last - 1) // gather.width + 1
    data = bytearray((high - low) * gather.width)
    at = 0
    for strip in gather.strips:
        found = memoryview(_column(strip, low, high, folders, opened))
        for row in range(high - low):
            data[row * gather.width + at : row * gather.width + at + strip.width] = found[
                row * strip.stride : row * strip.stride + strip.width
            ]
        at += strip.width
    return data[first - low * gather.width : last - low * gather.width]


def _column(strip: Strip, low: int, high: int, folders: Mapping[str, Path], opened: SourceFiles) -> bytearray:
    begin = strip.begin + low * strip.stride
    return opened.read(Range(folders[strip.model] / strip.file, begin, begin + (high - 1 - low) * strip.stride + strip.width))
