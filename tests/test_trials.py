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


def test_samples_of_other_texts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        Loss((1.0, 2.0), (1, 1)).over(Loss((1.0,), (1,)))


def test_what_is_tried_is_tried_on_the_calibration_text_unless_said() -> None:
    loss = Loss((1.0,), (1,))
    assert Attempt("x", (), loss).part == "calibration"
    assert Found(()).attempts == ()
