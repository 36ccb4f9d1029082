from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.blockscores import BlockScore, best_blocks, csv_text, least, markdown, normalised, triangle
from layercut.plan import Table


def table(mean: list[list[float]], stderr: list[list[float]] | None = None) -> Table:
    rows = tuple(map(tuple, mean))
    return Table(metric="angular[last]", a="m", b="m", mean=rows, stderr=rows if stderr is None else tuple(map(tuple, stderr)))


def planted(depth: int, start: int, size: int) -> list[list[float]]:
    """Distances in which the block [start, start + size) does nothing, and every other layer a step of 1."""
    place = [min(at, start) + max(0, at - start - size) for at in range(depth + 1)]
    return [[float(abs(a - b)) for b in place] for a in place]


def test_rows_are_block_sizes() -> None:
    """Four boundaries, three layers: blocks of one and of two; all three cannot go."""
    matrix = [[0, 1, 4, 9], [1, 0, 2, 6], [4, 2, 0, 3], [9, 6, 3, 0]]
    assert triangle(matrix) == [[1, 2, 3], [4, 6]]


def test_every_start_counts() -> None:
    """The last block of each size, which ends at the last layer, can be the best."""
    matrix = [[0, 5, 9, 9], [5, 0, 4, 7], [9, 4, 0, 1], [9, 7, 1, 0]]
    assert [(block.size, block.start, block.stop, block.score) for block in best_blocks(table(matrix))] == [(1, 2, 3, 1), (2, 1, 3, 7)]


@given(
    st.integers(2, 12).flatmap(
        lambda depth: st.tuples(st.just(depth), st.integers(1, depth - 1)).flatmap(
            lambda both: st.tuples(st.just(both[0]), st.integers(0, both[0] - both[1]), st.just(both[1]))
        )
    )
)
def test_a_planted_block_is_found(case: tuple[int, int, int]) -> None:
    depth, start, size = case
    found = best_blocks(table(planted(depth, start, size)))
    assert [block.size for block in found] == list(range(1, depth))
    assert (found[size - 1].start, found[size - 1].stop, found[size - 1].score) == (start, start + size, 0)


def test_of_equals_the_first() -> None:
    assert least([3.0, 1.0, 1.0]) == 1
    assert [block.start for block in best_blocks(table([[0.0] * 5] * 5))] == [0, 0, 0]


def test_standard_errors_belong_to_the_chosen_block() -> None:
    found = best_blocks(table([[0, 2, 5], [2, 0, 1], [5, 1, 0]], [[0, 20, 50], [20, 0, 10], [50, 10, 0]]))
    assert found == (BlockScore(size=1, start=1, stop=2, score=1, stderr=10),)


def test_a_model_of_one_layer_has_no_blocks() -> None:
    assert best_blocks(table([[0, 1], [1, 0]])) == ()


def test_rows_are_normalised_by_themselves() -> None:
    assert normalised([[2, 4, 3], [10, 10]]) == [[0, 1, 0.5], [0, 0]]


@given(st.lists(st.lists(st.floats(0, 1e6), min_size=1, max_size=6), min_size=1, max_size=5))
def test_normalised_rows_keep_their_order(rows: list[list[float]]) -> None:
    for row, scaled in zip(rows, normalised(rows), strict=True):
        assert all(0 <= value <= 1 for value in scaled)
        assert least(scaled) == least(row) or row[least(scaled)] == pytest.approx(min(row))


BLOCKS = (
    BlockScore(size=1, start=25, stop=26, score=0.12345, stderr=0.001),
    BlockScore(size=3, start=25, stop=28, score=0.181, stderr=0.0),
)


def test_markdown_is_the_table_of_short_transformers() -> None:
    assert markdown(BLOCKS) == (
        "| Block_size | Removed_layers | Score (avg dist) | Standard error |\n"
        "| ---: | :---: | ---: | ---: |\n"
        "| 1 | 25-25 | 0.1235 | 0.0010 |\n"
        "| 3 | 25-27 | 0.1810 | 0.0000 |\n"
    )


def test_csv_can_be_read_back() -> None:
    name = 'a,"odd"\nname'
    rows = list(csv.DictReader(io.StringIO(csv_text((name, "angular[last]", block) for block in BLOCKS))))
    assert rows[1] == {
        "model": name, "metric": "angular[last]", "block_size": "3", "start": "25", "stop": "28", "removed_layers": "25-27",
        "score": "0.181", "stderr": "0.0",
    }  # fmt: skip
