"""What is done with results, by the names of `short_transformers.utils`: the best block, the table, the diagram.

Results are square, one row and one column for each layer: `results[n, l]` is the distance of the block of n layers from layer l on. Row 0
and places where no block of that size starts hold zeros.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from layercut.blockscores import least, normalised
from layercut.errors import LayercutError, OutputError
from layercut.heatmap import draw_blocks

__all__ = ["draw_diagram", "get_best_pruning_start", "get_scored_blocks"]


def get_best_pruning_start(result: Any, block_size: int) -> int:
    """First layer of the block of `block_size` layers of least distance, every start considered; the first of equals."""
    rows = _rows(result)
    if type(block_size) is not int or not 1 <= block_size <= len(rows):
        raise LayercutError(f"block_size is {block_size!r}, and a model of {len(rows) + 1} layers has blocks of 1 to {len(rows)}")
    return least(rows[block_size - 1])


def get_scored_blocks(result: Any, return_md: bool = True, threshold: float = math.inf) -> str | dict[int, dict[str, Any]]:
    """The block of least distance of every size, those above `threshold` left out: a Markdown table, or start and score by block size."""
    found: dict[int, dict[str, Any]] = {}
    for size, row in enumerate(_rows(result), 1):
        start = least(row)
        if row[start] <= threshold:
            found[size] = {"start_layer": start, "score": row[start]}
    if not return_md:
        return found
    lines = ["| Block_size | Removed_layers | Score (avg dist)|", "| -------- | ------- | -------- |"]
    for size, block in found.items():
        lines.append(f"| {size} | {block['start_layer']}-{block['start_layer'] + size - 1} | {round(block['score'], 3)}|")
    return "\n".join(lines) + "\n"


def draw_diagram(results: Any, output_file_path: str | Path, title: str | None = None, normalized: bool = True) -> None:
    """Draw results in the style of arXiv 2403.17887 as a PNG: block size over layer, bright is near, each row from 0 to 1 if `normalized`.

    A path without a suffix gets `.png`.
    """
    path = Path(output_file_path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    if path.suffix.lower() != ".png":
        raise OutputError(f"pictures are written as PNG, not as '{path.suffix}'", where=path, hint=f"name it {path.stem}.png")
    rows = _rows(results)
    picture = draw_blocks(normalised(rows) if normalized else rows, title or "", "each row from 0 to 1" if normalized else "")
    if picture is None:
        raise LayercutError(f"results of {len(rows) + 1} layers cannot be drawn")
    try:
        path.write_bytes(picture)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=path) from None


def _rows(results: Any) -> list[list[float]]:
    """The distances of blocks of 1, 2, ... layers. Raises LayercutError unless they are square and finite."""
    rows = [[float(value) for value in row] for row in results]
    depth = len(rows)
    if depth == 0 or any(len(row) != depth for row in rows):
        raise LayercutError("results must be square: a row for each block size and a column for each layer")
    found = [row[: depth - size + 1] for size, row in enumerate(rows) if size]
    if not all(math.isfinite(value) for row in found for value in row):
        raise LayercutError("results hold a distance that is no finite number")
    return found
