"""folding.py: products by hand, in both layouts, and with the same bits in whatever order they are summed."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layercut import folding
from layercut.folding import folded

MAP = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
WEIGHT = torch.tensor([[5.0, 6.0], [7.0, 8.0]])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_rows_are_mixed_by_the_transposed_map() -> None:
    assert folded(WEIGHT, MAP, False, torch.float32).tolist() == [[26.0, 30.0], [38.0, 44.0]]
    wide = torch.tensor([[5.0, 6.0, 1.0], [7.0, 8.0, 0.0]])
    assert folded(wide, MAP, False, torch.float32).tolist() == [[26.0, 30.0, 1.0], [38.0, 44.0, 2.0]]


def test_columns_are_mixed_by_the_map_and_a_bias_is_one_row_of_them() -> None:
    assert folded(WEIGHT, MAP, True, torch.float32).tolist() == [[23.0, 34.0], [31.0, 46.0]]
    assert folded(torch.tensor([5.0, 6.0]), MAP, True, torch.float32).tolist() == [23.0, 34.0]


def test_what_a_layer_adds_is_mapped_whichever_way_its_weight_lies() -> None:
    weight, fold, inputs = random(6, 9), random(6, 6, seed=1), random(4, 9, seed=2)
    wanted = (inputs @ weight.T).double() @ fold.double()
    for found in (inputs @ folded(weight, fold, False, torch.float32).T, inputs @ folded(weight.T, fold, True, torch.float32)):
        assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_the_identity_changes_no_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = random(7, 5, dtype=dtype)
        assert torch.equal(folded(weight, torch.eye(7), False, dtype), weight)
        assert torch.equal(folded(weight.T, torch.eye(7), True, dtype), weight.T)


numbers = st.floats(-1e6, 1e6, width=32).filter(lambda number: number == 0 or abs(number) > 1e-6)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=3, max_size=3), st.lists(numbers, min_size=3, max_size=3))
def test_products_are_those_of_exact_arithmetic(rows: list[list[float]], weight: list[float]) -> None:
    found = folded(torch.tensor(weight)[:, None], torch.tensor(rows), False, torch.float64)[:, 0].tolist()
    for column in range(3):
        parts = [Fraction(rows[at][column]) * Fraction(weight[at]) for at in range(3)]
        largest = max(abs(row[column]) for row in rows) * max(map(abs, weight))
        assert abs(Fraction(found[column]) - sum(parts)) <= Fraction(largest) * 3 / 2**50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_summing_the_threads_and_the_pieces_cannot_be_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain product in float64 depends on the order: that the test can tell is checked first."""
    size = 96
    weight, fold = random(size, 41, dtype=dtype), random(size, size, seed=1) * torch.logspace(-6, 6, size)[:, None]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(5))
    plain = [fold[way].double().T @ weight[way].double() for way in (torch.arange(size), order)]
    assert not torch.equal(*plain)
    whole = folded(weight, fold, False, torch.float64)
    assert torch.equal(folded(weight[order], fold[order], False, torch.float64), whole)
    assert torch.allclose(whole, plain[0], rtol=1e-10, atol=1e-10 * float(whole.abs().max()))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(folded(weight, fold, False, torch.float64), whole)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(folding, "CHUNK", 7)
    assert torch.equal(folded(weight, fold, False, torch.float64), whole)


def test_the_result_is_cast_as_torch_casts() -> None:
    weight, fold = random(5, 4), random(5, 5, seed=1)
    exact = folded(weight, fold, False, torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(folded(weight, fold, False, dtype), exact.to(dtype))


def test_what_is_not_finite_stays_so() -> None:
    for odd in (torch.nan, torch.inf):
        weight = random(4, 3)
        weight[1, 1] = odd
        found = folded(weight, random(4, 4, seed=1), False, torch.float32)
        assert not found[:, 1].isfinite().any() and found[:, [0, 2]].isfinite().all()


def test_zeros_and_the_smallest_numbers_are_taken_as_they_are() -> None:
    assert folded(torch.zeros(3, 2), random(3, 3), False, torch.float32).tolist() == [[0.0, 0.0]] * 3
    tiny = torch.full((2, 1), 2.0**-149)
    assert folded(tiny, torch.eye(2), False, torch.float32).tolist() == tiny.tolist()
