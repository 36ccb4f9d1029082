"""metric.py: labels, what inner products give, and the clouds of states that metrics of many tokens compare."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from layercut.metric import Inner, Metric, SampleMetric, Scores, TokenMetric


class Counted(TokenMetric):
    """A metric with settings of every kind."""

    name: Literal["counted"] = "counted"
    twice: bool = False
    once: bool = True
    power: float = 2.0
    mode: str = "plain"

    def distances(self, inner: Inner) -> torch.Tensor:
        return inner.gaps


class Cloud(SampleMetric):
    """A metric of many tokens that compares nothing."""

    name: Literal["cloud"] = "cloud"

    def compare(self, states: object, owners: torch.Tensor, wanted: torch.Tensor) -> Scores:
        return Scores(wanted, wanted)


def gram(*states: list[float]) -> Inner:
    """Inner products of the boundary states of one token."""
    rows = torch.tensor([states], dtype=torch.float64)
    return Inner(rows @ rows.transpose(1, 2))


# Labels and settings


@pytest.mark.parametrize(
    ("metric", "label"),
    [
        (Counted(), "counted[last]"),
        (Counted(token=-2), "counted[-2]"),
        (Counted(twice=True), "counted[last, twice]"),
        (Counted(once=False), "counted[last, once=false]"),
        (Counted(twice=True, once=False, power=0.5, mode="Odd"), "counted[last, twice, once=false, power=0.5, mode=odd]"),
        (Counted(twice=False, power=2), "counted[last]"),
        (Cloud(), "cloud[skip-first-1]"),
        (Cloud(token="all", draw=16, normalised=False), "cloud[all, draw=16, normalised=false]"),
    ],
)
def test_a_label_says_what_is_set_and_nothing_else(metric: Metric, label: str) -> None:
    assert metric.label == label


def test_labels_differ_where_settings_do() -> None:
    every = [Counted(token=token, twice=twice, power=power) for token in ("last", "all", 0) for twice in (True, False) for power in (1, 2)]
    assert len({metric.label for metric in every}) == len(every) == 12


@pytest.mark.parametrize(("kind", "sizes_may_differ"), [(Counted, False), (Cloud, True)])
def test_what_a_kind_of_metric_can_do(kind: type[Metric], sizes_may_differ: bool) -> None:
    assert (kind.directed, kind.sizes_may_differ) == (False, sizes_may_differ)


@pytest.mark.parametrize("kind", [TokenMetric, SampleMetric])
def test_a_metric_without_a_formula_is_none(kind: type[Metric]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        kind(name="x")


@pytest.mark.parametrize("draw", [15, 16385, 64.0, "64", True])
def test_a_draw_is_a_whole_number_within_bounds(draw: object) -> None:
    with pytest.raises(ValidationError, match="draw"):
        Cloud(draw=draw)  # type: ignore[arg-type]


def test_the_bounds_of_a_draw_belong_to_it() -> None:
    assert (Cloud(draw=16).draw, Cloud().draw, Cloud(draw=16384).draw) == (16, 1024, 16384)
    assert (Cloud.least_samples, Cloud.least_tokens) == (1, 4)


# Inner products


def test_squares_cosines_and_gaps() -> None:
    inner = gram([3, 4], [-4, 3], [6, 8], [1, 0])
    assert inner.squares.tolist() == [[25, 25, 100, 1]]
    assert inner.cosines.tolist() == [[[1, 0, 1, 0.6], [0, 1, 0, -0.8], [1, 0, 1, 0.6], [0.6, -0.8, 0.6, 1]]]
    expected = [[0, 50, 25, 20], [50, 0, 125, 34], [25, 125, 0, 89], [20, 34, 89, 0]]
    assert inner.gaps[0].tolist() == pytest.approx([pytest.approx([math.sqrt(square) for square in row]) for row in expected])


def test_each_is_worked_out_once() -> None:
    inner = gram([1, 2], [2, 1])
    assert inner.squares is inner.squares and inner.cosines is inner.cosines and inner.gaps is inner.gaps


def test_a_state_of_length_zero_has_no_direction() -> None:
    inner = gram([0, 0], [0, 0], [5, 0])
    assert inner.cosines.tolist() == [[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]
    assert inner.gaps.tolist() == [[[0, 0, 5], [0, 0, 5], [5, 5, 0]]]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.floats(0.5, 100))
def test_no_rounding_leads_out_of_range(state: list[float], scale: float) -> None:
    """Equal states are at cosine 1 and gap 0 exactly, opposite ones at -1; nothing is beyond, and nothing is no number."""
    inner = gram(state, state, [-value for value in state], [value * scale for value in state], [1, 2, 3])
    assert inner.cosines.abs().max() <= 1.0 and not inner.cosines.isnan().any()
    assert not inner.gaps.isnan().any() and inner.gaps.min() >= 0
    if inner.squares[0, 0] > 1e-150:
        assert inner.cosines[0, 0, 1] == 1.0 and inner.cosines[0, 0, 2] == -1.0
    assert inner.gaps[0, 0, 1] == 0.0


def test_states_that_are_equal_but_for_rounding_are_at_no_distance() -> None:
    inner = Inner(torch.tensor([[[1.0, 1 + 1e-12], [1 + 1e-12, 1.0]]], dtype=torch.float64))
    assert inner.gaps.tolist() == [[[0, 0], [0, 0]]] and inner.cosines.tolist() == [[[1, 1], [1, 1]]]


def test_what_is_not_finite_stays_so() -> None:
    inner = gram([math.inf, 0], [1, 0])
    assert not inner.gaps[0, 0, 1].isfinite() and not inner.cosines[0, 0, 1].isfinite()


# Clouds


def test_clouds_are_of_unit_vectors_in_float64() -> None:
    states = [torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16), torch.tensor([[0.0, 2.0, 0.0]])]
    vectors = list(Cloud()._vectors(states))
    assert [vector.dtype for vector in vectors] == [torch.float64] * 2
    assert [vector.tolist() for vector in vectors] == [[[0.6, 0.8], [0.0, 0.0]], [[0.0, 1.0, 0.0]]]


def test_clouds_as_they_are() -> None:
    state = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    (vector,) = Cloud(normalised=False)._vectors([state])
    assert vector.dtype == torch.float64 and vector.tolist() == state.tolist()


def test_states_are_read_one_at_a_time() -> None:
    """They may be of all boundaries, and more than fits."""
    read: list[int] = []

    def states():  # type: ignore[no-untyped-def]
        for number in range(3):
            read.append(number)
            yield torch.ones(1, 2)

    vectors = Cloud()._vectors(states())
    assert read == []
    next(vectors)
    assert read == [0]
