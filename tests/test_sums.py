"""Running sums: by hand, against plain numpy, and merged in any way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layercut.metric import Scores
from layercut.sums import Sums

SAMPLES = st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 5)), min_size=2, max_size=12).filter(
    lambda samples: any(count for _, count in samples)
)


def test_sums_by_hand() -> None:
    # Two samples of one cell: 2 tokens with sum 1.0 and 3 tokens with sum 3.0. mean = 4/5 = 0.8.
    # Residuals: 1.0 - 0.8*2 = -0.6 and 3.0 - 0.8*3 = 0.6; squares 0.36 + 0.36 = 0.72; * K/(K-1) = 2 -> 1.44; sqrt = 1.2; / 5 = 0.24
    for parts in ([[0, 1]], [[0], [1]]):
        sums = Sums()
        values, counts = torch.tensor([[[1.0]], [[3.0]]], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)
        for part in parts:
            sums.add(values[part], counts[part])
        assert sums.scores().value.item() == pytest.approx(0.8, abs=1e-15)
        assert sums.scores().stderr.item() == pytest.approx(0.24, abs=1e-15)


def test_sums_keep_small_spreads() -> None:
    # mean 1 and spread 1e-9: sums of raw squares would lose it, 1 + 1e-18 == 1 in float64
    values = 1 + 1e-9 * torch.tensor([-1.0, 1.0] * 50, dtype=torch.float64)
    sums = Sums()
    for value in values:
        sums.add(value.reshape(1, 1, 1), torch.ones(1, dtype=torch.float64))
    assert sums.scores().stderr.item() == pytest.approx(1e-9 / math.sqrt(99), rel=1e-5)  # s/sqrt(K), s = 1e-9 sqrt(100/99)


def fed(samples: list[tuple[float, int]]) -> Sums:
    sums = Sums()
    for value, count in samples:
        sums.add(torch.tensor([[[value * count]]], dtype=torch.float64), torch.tensor([float(count)], dtype=torch.float64))
    return sums


def plain(samples: list[tuple[float, int]]) -> tuple[float, float]:
    """The two formulas of the docstring, in plain Python."""
    kept = [(value * count, count) for value, count in samples if count]
    total = sum(count for _, count in kept)
    mean = sum(value for value, _ in kept) / total
    if len(kept) == 1:
        return mean, 0.0
    spread = sum((value - mean * count) ** 2 for value, count in kept)
    return mean, math.sqrt(len(kept) / (len(kept) - 1) * spread) / total


def close(scores: Scores, expected: tuple[float, float]) -> bool:
    found = (scores.value.item(), scores.stderr.item())
    return all(abs(a - b) <= 1e-6 for a, b in zip(found, expected, strict=True))


@given(SAMPLES)
def test_equals_the_formulas_and_leaves_out_samples_without_tokens(samples: list[tuple[float, int]]) -> None:
    sums = fed(samples)
    assert sums.samples == sum(count > 0 for _, count in samples)
    assert close(sums.scores(), plain(samples))


@given(SAMPLES, st.integers(0, 12), st.integers(0, 12))
def test_merging_parts_equals_the_whole(samples: list[tuple[float, int]], one: int, two: int) -> None:
    first, second = sorted((one, two))
    total = Sums()
    for part in (samples[:first], samples[first:second], samples[second:]):
        total.merge(fed(part).state())
    assert total.samples == fed(samples).samples
    assert close(total.scores(), plain(samples))


def test_merging_keeps_small_spreads() -> None:
    # two halves that share a mean of a million and a spread of 1e-3
    values = [(1e6 + 1e-3 * (-1) ** number, 1) for number in range(100)]
    total = fed(values[:50])
    total.merge(fed(values[50:]).state())
    assert total.scores().stderr.item() == pytest.approx(1e-3 / math.sqrt(99), rel=1e-4)


def test_state_holds_plain_tensors_and_is_a_copy_of_nothing_shared() -> None:
    sums = fed([(1.0, 2), (3.0, 1)])
    state = sums.state()
    assert sorted(state) == ["counts", "cross", "first", "shift", "square"]
    assert {value.dtype for value in state.values()} == {torch.float64}
    assert state["counts"].tolist() == [2, 3, 5]
    fresh = Sums()
    fresh.merge(state)
    fresh.add(torch.tensor([[[5.0]]], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64))
    assert sums.samples == 2
    assert torch.equal(state["counts"], torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64))
    assert fresh.samples == 3


def test_an_empty_part_changes_nothing() -> None:
    sums = fed([(1.0, 2), (3.0, 1)])
    before = sums.scores()
    sums.merge(Sums().state())
    assert all(torch.equal(a, b) for a, b in zip(sums.scores(), before, strict=True))
