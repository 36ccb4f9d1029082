"""Metrics of single tokens: by hand, against plain loops, and the properties that their docstrings state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layercut.metric import Inner, TokenMetric
from layercut.tokenwise import Angular, Cosine, Euclidean, RelativeMagnitude

torch.set_num_threads(1)


def gram(*tokens: list[list[float]]) -> Inner:
    """Inner products of the boundary states of each token."""
    states = torch.tensor(tokens, dtype=torch.float64)
    return Inner(states @ states.transpose(1, 2))


def test_cosine_by_hand() -> None:
    # x = (3, 4), y = (4, 3): x.y = 12 + 12 = 24, |x| = |y| = 5, cos = 24/25 = 0.96, distance = 1 - 0.96 = 0.04
    distances = Cosine().distances(gram([[3, 4], [4, 3]]))
    assert distances.shape == (1, 2, 2)
    assert distances[0, 0].tolist() == pytest.approx([0.0, 0.04], abs=1e-15)
    assert distances[0, 1].tolist() == pytest.approx([0.04, 0.0], abs=1e-15)


def test_angular_by_hand() -> None:
    # the same x and y: arccos(0.96) = 0.283794109208 rad; / pi = 0.090334470601
    distances = Angular().distances(gram([[3, 4], [4, 3]]))
    assert distances[0, 0, 1].item() == pytest.approx(0.090334470601, abs=1e-12)
    assert distances[0, 1, 0].item() == distances[0, 0, 1].item()
    # x = (1, 0), y = (1, sqrt 3): cos = 1/2, an angle of 60 degrees = 1/3 of pi
    assert Angular().distances(gram([[1, 0], [1, math.sqrt(3)]]))[0, 0, 1].item() == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("other", "angular", "cosine"),
    [
        ([2.0, 0.0], 0.0, 0.0),  # the same direction, another length
        ([0.0, 7.0], 0.5, 1.0),  # a right angle
        ([-3.0, 0.0], 1.0, 2.0),  # opposite
        ([1.0, 1.0], 0.25, 1 - 1 / math.sqrt(2)),  # 45 degrees
    ],
)
def test_special_angles(other: list[float], angular: float, cosine: float) -> None:
    pair = gram([[1.0, 0.0], other])
    assert Angular().distances(pair)[0, 0, 1].item() == pytest.approx(angular, abs=1e-15)
    assert Cosine().distances(pair)[0, 0, 1].item() == pytest.approx(cosine, abs=1e-15)


def test_each_token_by_itself() -> None:
    distances = Cosine().distances(gram([[1, 0], [0, 1], [1, 0]], [[1, 0], [1, 0], [-1, 0]]))
    assert distances.tolist() == [[[0, 1, 0], [1, 0, 1], [0, 1, 0]], [[0, 0, 2], [0, 0, 2], [2, 2, 0]]]


def test_angular_is_accurate_near_zero() -> None:
    # y = (cos a, sin a) is turned from x = (1, 0) by exactly a
    for angle in (1e-2, 1e-4, 1e-6):
        found = Angular().distances(gram([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]))[0, 0, 1].item()
        assert found == pytest.approx(angle / math.pi, abs=1e-8)


def test_bf16_arithmetic_would_not_do() -> None:
    # What short-transformers does: arccos of a cosine that was rounded to bf16. 1 - 5e-5 rounds to 1.
    angle = 1e-2
    rounded = torch.tensor(math.cos(angle)).bfloat16().arccos().item() / math.pi
    assert rounded == 0.0
    assert Angular().distances(gram([[1.0, 0.0], [math.cos(angle), math.sin(angle)]]))[0, 0, 1].item() > 3e-3


def test_a_zero_state_has_no_direction() -> None:
    # zero and zero are equal: distance 0; zero and anything else: cosine 0
    zero = gram([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    assert Cosine().distances(zero).tolist() == [[[0, 1, 0], [1, 0, 1], [0, 1, 0]]]
    assert Angular().distances(zero).tolist() == [[[0, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0]]]


def test_rounding_beyond_one_is_clamped() -> None:
    beyond = torch.tensor([[[1.0, 1.0 + 1e-15], [1.0 + 1e-15, 1.0]]], dtype=torch.float64)
    assert Angular().distances(Inner(beyond)).tolist() == [[[0, 0], [0, 0]]]
    assert Angular().distances(Inner(-beyond + 2 * torch.eye(2, dtype=torch.float64)))[0, 0, 1].item() == 1.0


@pytest.mark.parametrize("metric", [Angular(), Cosine()])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(metric: TokenMetric, bad: float) -> None:
    distances = metric.distances(gram([[1.0, 0.0], [bad, 1.0], [0.0, 1.0]]))
    assert distances.isfinite().tolist() == [[[True, False, True], [False, False, False], [True, False, True]]]


def test_huge_and_tiny_states_do_not_overflow() -> None:
    # the largest and smallest magnitudes of float32 states, d = 4
    for scale in (3e38, 1e-45):
        pair = gram([[scale, scale, 0, 0], [scale, 0, 0, 0]])
        assert Angular().distances(pair)[0, 0, 1].item() == pytest.approx(0.25, abs=1e-12)


VECTORS = st.lists(st.lists(st.integers(-50, 50), min_size=3, max_size=3), min_size=2, max_size=4)


@given(VECTORS)
def test_ranges_symmetry_and_diagonal(states: list[list[int]]) -> None:
    inner = gram([[float(x) for x in state] for state in states])
    for metric, top in ((Angular(), 1.0), (Cosine(), 2.0)):
        distances = metric.distances(inner)
        assert distances.isfinite().all()
        assert distances.min() >= 0
        assert distances.max() <= top
        assert torch.equal(distances, distances.transpose(1, 2))
        assert distances.diagonal(dim1=1, dim2=2).abs().max() < 1e-7


@given(VECTORS, st.floats(0.01, 100))
def test_equals_plain_python_and_ignores_length(states: list[list[int]], scale: float) -> None:
    distances = Angular().distances(gram([[float(x) * scale for x in state] for state in states]))
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            norms = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
            if norms:
                cosine = max(-1.0, min(1.0, sum(a * b for a, b in zip(x, y, strict=True)) / norms))
                assert distances[0, i, j].item() == pytest.approx(math.acos(cosine) / math.pi, abs=1e-7)


@given(VECTORS)
def test_angular_is_a_distance(states: list[list[int]]) -> None:
    states = [state for state in states if any(state)]
    if len(states) > 2:
        d = Angular().distances(gram([[float(x) for x in state] for state in states]))[0]
        assert d[0, 2] <= d[0, 1] + d[1, 2] + 1e-7


def test_relative_magnitude_by_hand() -> None:
    # x = (3, 4), y = (3, 0): |y - x| = 4; |y| = 3, |x| = 5: from x to y 4/3, from y to x 4/5
    distances = RelativeMagnitude().distances(gram([[3, 4], [3, 0]]))
    assert distances[0].tolist() == [[0.0, pytest.approx(4 / 3, abs=1e-15)], [pytest.approx(0.8, abs=1e-15), 0.0]]


def test_relative_magnitude_of_a_layer_is_its_share_of_the_sum() -> None:
    # f(x) = (0, 3) on x = (4, 0): |f| / |x + f| = 3/5, where short-transformers has |x + f| / |2x + f| = 5 / sqrt(73) = 0.585
    assert RelativeMagnitude().distances(gram([[4, 0], [4, 3]]))[0, 0, 1].item() == pytest.approx(0.6, abs=1e-15)
    # a layer that does nothing: 0, where short-transformers has 0.5
    assert RelativeMagnitude().distances(gram([[4, 3], [4, 3]]))[0, 0, 1].item() == 0.0


def test_relative_magnitude_of_zero_states() -> None:
    # from zero to x: |x| / |x| = 1; from x to zero it counts as 1; from zero to zero as 0
    assert RelativeMagnitude().distances(gram([[0, 0], [3, 4], [0, 0]]))[0].tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]


def test_euclidean_by_hand() -> None:
    # (3, 4) and (6, 8): 5 apart, the same direction
    assert Euclidean().distances(gram([[3, 4], [6, 8]]))[0].tolist() == [[0, 5], [5, 0]]
    assert Euclidean(normalised=True).distances(gram([[3, 4], [6, 8]]))[0].tolist() == [[0, 0], [0, 0]]
    # (1, 0) and (0, 2): sqrt 5 apart; unit vectors sqrt 2
    assert Euclidean().distances(gram([[1, 0], [0, 2]]))[0, 0, 1].item() == pytest.approx(math.sqrt(5), abs=1e-15)
    assert Euclidean(normalised=True).distances(gram([[1, 0], [0, 2]]))[0, 0, 1].item() == pytest.approx(math.sqrt(2), abs=1e-15)
    # opposite unit vectors are 2 apart; zero is 1 from every unit vector and 0 from zero
    zero = Euclidean(normalised=True).distances(gram([[0, 0], [3, 4], [-3, -4], [0, 0]]))[0].tolist()
    assert zero == [[0, 1, 1, 0], [1, 0, 2, 1], [1, 2, 0, 1], [0, 1, 1, 0]]


ALL = (Angular(), Cosine(), RelativeMagnitude(), Euclidean(), Euclidean(normalised=True))


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.label)
@given(states=VECTORS, turn=st.floats(0, 6.3))
def test_one_rotation_of_all_states_changes_nothing(metric: TokenMetric, states: list[list[int]], turn: float) -> None:
    x = torch.tensor([[[float(value) for value in state] for state in states]], dtype=torch.float64)
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]], dtype=torch.float64)
    y = x @ rotation
    before, after = (metric.distances(Inner(z @ z.transpose(1, 2))) for z in (x, y))
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("metric", [Angular(), Cosine(), Euclidean(normalised=True)], ids=lambda metric: metric.label)
@given(states=VECTORS, scales=st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
def test_lengths_do_not_count(metric: TokenMetric, states: list[list[int]], scales: list[float]) -> None:
    scaled = [[value * scale for value in state] for state, scale in zip(states, scales, strict=False)]
    before, after = (metric.distances(gram([[float(value) for value in state] for state in each])) for each in (states, scaled))
    assert torch.allclose(before, after, atol=1e-6)


@given(VECTORS, st.floats(0.1, 10))
def test_relative_magnitude_does_not_change_with_one_scale(states: list[list[int]], scale: float) -> None:
    before, after = (
        RelativeMagnitude().distances(gram([[value * factor for value in state] for state in states])) for factor in (1.0, scale)
    )
    assert torch.allclose(before, after, atol=1e-6)


@given(VECTORS, st.lists(st.integers(-9, 9), min_size=3, max_size=3))
def test_euclidean_does_not_change_with_one_shift(states: list[list[int]], shift: list[int]) -> None:
    shifted = [[float(value + step) for value, step in zip(state, shift, strict=True)] for state in states]
    before, after = (Euclidean().distances(gram(each)) for each in ([[float(value) for value in state] for state in states], shifted))
    assert torch.allclose(before, after, atol=1e-5)


@given(VECTORS)
def test_equal_states_are_at_distance_zero(states: list[list[int]]) -> None:
    twice = [[float(value) for value in state] for state in [*states, *states]]
    for metric in ALL:
        distances = metric.distances(gram(twice))[0]
        count = len(states)
        assert distances.diagonal(offset=count).abs().max() == 0
        assert distances[:count, :count].equal(distances[count:, count:])


@given(VECTORS)
def test_relative_magnitude_and_euclidean_equal_plain_python(states: list[list[int]]) -> None:
    inner = gram([[float(value) for value in state] for state in states])
    gaps, ratios, units = (metric.distances(inner)[0] for metric in (Euclidean(), RelativeMagnitude(), Euclidean(normalised=True)))
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            gap = math.dist(x, y)
            long_x, long_y = math.hypot(*x), math.hypot(*y)
            assert gaps[i, j].item() == pytest.approx(gap, abs=1e-5)
            if long_y:
                assert ratios[i, j].item() == pytest.approx(gap / long_y, abs=1e-5)
            if long_x and long_y:
                unit = math.dist([value / long_x for value in x], [value / long_y for value in y])
                assert units[i, j].item() == pytest.approx(unit, abs=1e-6)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.label)
def test_nearly_equal_long_states_are_told_apart(metric: TokenMetric) -> None:
    # float32 states of an attention sink: length 1e4, one place differs by one unit in the last place
    x = torch.full((576,), 400.0)
    y = x.clone()
    y[7] = torch.nextafter(y[7], torch.tensor(1e9))
    states = torch.stack([x, y]).double()
    found = metric.distances(Inner((states @ states.T).unsqueeze(0)))[0, 0, 1].item()
    gap = float((y - x).double().norm())
    length = float(x.double().norm())
    assert length == 9600
    expected = {"euclidean[all]": gap, "relative_magnitude[all]": gap / length}.get(metric.label, 0.0)
    assert found == pytest.approx(expected, abs=1e-4 if metric.label == "euclidean[all]" else 1e-7)
