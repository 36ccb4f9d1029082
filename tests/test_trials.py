"""Losses and their differences, against arithmetic by hand and against the formula of the distance engine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layercut.settling import paired
from layercut.trials import Attempt, Found, Loss

ROWS = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 200), st.floats(0, 200)), min_size=2, max_size=9)


def test_every_token_weighs_the_same() -> None:
    loss = Loss((2.0, 9.0), (1, 3))
    assert loss.mean == 11 / 4
    assert loss.perplexity == math.exp(11 / 4)


def test_a_perplexity_that_is_no_number() -> None:
    assert Loss((8000.0,), (10,)).perplexity == math.inf


def test_a_difference_is_paired() -> None:
    """Samples differ much from each other, and alike in both: the difference is sure."""
    hard, easy = Loss((10.0, 90.0, 40.0), (10, 10, 10)), Loss((9.0, 89.0, 39.0), (10, 10, 10))
    gap = hard.over(easy)
    assert gap.mean == pytest.approx(0.1) and gap.stderr == pytest.approx(0.0, abs=1e-12)


def test_one_sample_has_no_spread() -> None:
    assert Loss((4.0,), (2,)).over(Loss((3.0,), (2,))) == (0.5, 0.0)


@given(ROWS)
def test_differences_are_those_of_the_paired_test(rows: list[tuple[int, float, float]]) -> None:
    counts, mine, its = (tuple(column) for column in zip(*rows, strict=True))
    gap = Loss(mine, counts).over(Loss(its, counts))
    mean, stderr = paired(torch.tensor(mine, dtype=torch.float64) - torch.tensor(its, dtype=torch.float64), torch.tensor(counts))
    assert gap.mean == pytest.approx(mean, abs=1e-9) and gap.stderr == pytest.approx(stderr, abs=1e-9)


@given(ROWS)
def test_differences_turn_around(rows: list[tuple[int, float, float]]) -> None:
    counts, mine, its = (tuple(column) for column in zip(*rows, strict=True))
    there, back = Loss(mine, counts).over(Loss(its, counts)), Loss(its, counts).over(Loss(mine, counts))
    assert there.mean == -back.mean and there.stderr == back.stderr


def test_a_mean_has_a_standard_error() -> None:
    """Means of 1 and 3 around 2, each of ten tokens."""
    assert Loss((10.0, 30.0), (10, 10)).stderr == pytest.approx(1.0) and Loss((4.0,), (2,)).stderr == 0.0


@pytest.mark.parametrize(
    ("mine", "below"),
    [
        ((10.0, 30.0), False),  # the same
        ((9.0, 29.0), True),  # less in every sample
        ((5.0, 30.0), False),  # 0.25 ± 0.25 less
        ((5.0, 29.9), True),  # 0.255 ± 0.245 less
        ((11.0, 30.0), False),
    ],
)
def test_less_is_less_by_more_than_the_standard_error(mine: tuple[float, float], below: bool) -> None:
    assert Loss(mine, (10, 10)).below(Loss((10.0, 30.0), (10, 10))) is below
    assert Loss(mine[:1], (10,)).below(Loss((10.0,), (10,))) is (mine[0] < 10)


def test_samples_of_other_texts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        Loss((1.0, 2.0), (1, 1)).over(Loss((1.0,), (1,)))


def test_what_is_tried_is_tried_on_the_calibration_text_unless_said() -> None:
    loss = Loss((1.0,), (1,))
    assert Attempt("x", (), loss).part == "calibration"
    assert Found(()).attempts == ()
