"""Scored blocks: for every block size the distance of every block of that size, and the block of least distance."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from layercut.plan import Table
from layercut.record import Record

Triangle: TypeAlias = Sequence[Sequence[float]]
"""Row n - 1 holds the distances of all blocks of n layers, by their first layer; n goes from 1 to L - 1: a model keeps a layer."""


class BlockScore(Record):
    """Of all blocks of one size the one whose removal makes the nearest seam, the first of equals."""

    size: int
    """Layers of the block."""
    start: int
    """First layer of the block, from 0."""
    stop: int
    """One past its last layer."""
    score: float
    """Distance from the state that enters the block to the state that leaves it."""
    stderr: float
    """Standard error of the score, with the sample as the unit."""

    @property
    def removed(self) -> str:
        """The layers of the block as a recipe writes them: first and last, both included."""
        return f"{self.start}-{self.stop - 1}"


def triangle(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """The distances of blocks out of a matrix of all L + 1 boundaries of one model: block [l, l + n) makes the seam from l to l + n."""
    depth = len(matrix) - 1
    return [[matrix[start][start + size] for start in range(depth - size + 1)] for size in range(1, depth)]


def least(distances: Sequence[float]) -> int:
    """Place of the least distance, the first of equals."""
    return min(range(len(distances)), key=lambda place: distances[place])


def normalised(distances: Triangle) -> list[list[float]]:
    """Every row shifted and scaled to reach from 0 to 1, as in the figures of arXiv 2403.17887; 0 where all are equal."""
    found = []
    for row in distances:
        low, high = min(row), max(row)
        span = high - low
        found.append([(value - low) / span if span > 0 else 0.0 for value in row])
    return found


def best_blocks(table: Table) -> tuple[BlockScore, ...]:
    """The block of least distance of every size, from a table of distances within one model."""
    found = []
    for size, (means, errors) in enumerate(zip(triangle(table.mean), triangle(table.stderr), strict=True), 1):
        start = least(means)
        found.append(BlockScore(size=size, start=start, stop=start + size, score=means[start], stderr=errors[start]))
    return tuple(found)


def markdown(blocks: Iterable[BlockScore]) -> str:
    """The table of short-transformers (block size, removed layers, score), with standard errors."""
    lines = ["| Block_size | Removed_layers | Score (avg dist) | Standard error |", "| ---: | :---: | ---: | ---: |"]
    lines += [f"| {block.size} | {block.removed} | {block.score:.4f} | {block.stderr:.4f} |" for block in blocks]
    return "\n".join(lines) + "\n"


def csv_text(rows: Iterable[tuple[str, str, BlockScore]]) -> str:
    """Model, metric and block as comma-separated values; numbers are written in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("model", "metric", "block_size", "start", "stop", "removed_layers", "score", "stderr"))
    for model, metric, block in rows:
        writer.writerow((model, metric, block.size, block.start, block.stop, block.removed, block.score, block.stderr))
    return text.getvalue()
