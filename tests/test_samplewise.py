"""Metrics of many tokens: by hand, against other formulas in numpy, and the properties that their docstrings state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.metric import SampleMetric, Scores
from layercut.samplewise import CKA, Linear, Procrustes

torch.set_num_threads(1)

RAW: tuple[SampleMetric, ...] = (Linear(normalised=False), Procrustes(normalised=False), CKA(normalised=False))
UNIT: tuple[SampleMetric, ...] = (Linear(), Procrustes(), CKA())
SEEDS = st.integers(0, 10_000)


def each(*metrics: SampleMetric) -> Any:
    return pytest.mark.parametrize("metric", metrics, ids=lambda metric: f"{metric.name}{'' if metric.normalised else '-raw'}")


each_metric = each(*RAW, *UNIT)


def score(metric: SampleMetric, x: Any, y: Any, owners: Sequence[int]) -> tuple[float, float]:
    """The score of Y from X and its standard error."""
    scores = compare(metric, [x, y], owners)
    return scores.value[0, 1].item(), scores.stderr[0, 1].item()


def compare(metric: SampleMetric, states: Sequence[Any], owners: Sequence[int]) -> Scores:
    tensors = [torch.as_tensor(np.asarray(state, dtype=np.float64)) for state in states]
    wanted = torch.ones(len(tensors), len(tensors), dtype=torch.bool).triu(1)
    return metric.compare(tensors, torch.tensor(owners), wanted)


def cloud(seed: int, tokens: int = 24, hidden: int = 5) -> Any:
    return np.random.default_rng(seed).normal(size=(tokens, hidden))


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rotation(seed: int, hidden: int = 5) -> Any:
    return np.linalg.qr(np.random.default_rng(seed + 1).normal(size=(hidden, hidden)))[0]


OWNERS = [number for number in (2, 3, 7, 11, 12, 20) for _ in range(4)]
"""Six samples of four tokens; the second and the sixth of them are held out."""


def held_out(owners: Sequence[int]) -> Any:
    order = {number: place for place, number in enumerate(sorted(set(owners)))}
    return np.array([order[number] % 4 == 1 for number in owners])


# By hand


def test_linear_by_hand() -> None:
    # Fitted on (1, 0) -> (0, 1) and (-1, 0) -> (0, -1), which are centred. The best multiple is a = 0. X'X = diag(2, 0) and X'Y has a 2
    # in row 1, column 2; the mean eigenvalue of the Gram matrix [[1, -1], [-1, 1]] is 1. With ridge 1, B has 2 / (2 + 1) = 2/3 there.
    # Held out: (3, 5) -> (1, 3). Predicted is (0, 2), missed (1, 1): 2 of 1 + 9.
    x, y = [[1, 0], [-1, 0], [3, 5]], [[0, 1], [0, -1], [1, 3]]
    assert score(Linear(ridge=1, normalised=False), x, y, [0, 0, 1]) == (pytest.approx(0.2, abs=1e-15), 0.0)


def test_linear_falls_back_to_the_best_multiple() -> None:
    # Fitted on -1 -> -2 and 1 -> 2: a = 2 and nothing is left for B. Held out 3 -> 7: 6 is predicted, 1 missed of 49.
    x, y = [[-1.0, 0], [1, 0], [3, 0]], [[-2.0, 0], [2, 0], [7, 0]]
    assert score(RAW[0], x, y, [0, 0, 1])[0] == pytest.approx(1 / 49, abs=1e-15)


def test_linear_standard_error_by_hand() -> None:
    # As above, with two held-out samples, the second and the sixth: 3 -> 7 misses 1 of 49, 1 -> 4 misses 4 of 16. Ratio 5/65 = 1/13.
    # Residuals 1 - 49/13 = -36/13 and 4 - 16/13 = 36/13: sqrt(2 * 2 * (36/13)^2) / 65.
    x = [[-1.0], [3], [1], [-1], [1], [1]]
    y = [[-2.0], [7], [2], [-2], [2], [4]]
    expected = (pytest.approx(1 / 13, abs=1e-15), pytest.approx(2 * 36 / 13 / 65, abs=1e-15))
    assert score(RAW[0], x, y, [0, 1, 2, 3, 4, 5]) == expected


def test_procrustes_by_hand() -> None:
    # X the corners of a square, Y = X diag(2, 1): X'Y = diag(8, 4), |X|^2 = 8, |Y|^2 = 20. Nuclear norm 12 / sqrt(160); 1 - 144/160 = 0.1
    x = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    assert score(RAW[1], x, x @ np.diag([2, 1]), [0, 0, 1, 1])[0] == pytest.approx(0.1, abs=1e-14)


def test_cka_by_hand() -> None:
    # x = (1, -1, 1, -1), y = (1, 1, -1, -1), without diagonals: tr KL = (x.y)^2 - 4 = -4, rows of both sum to -1, so that
    # 1'KL1 = 4 and 1'K1 = 1'L1 = -4. HSIC ~ -4 + 16/(3*2) - 2/2*4 = -16/3; of x with itself: 12 + 16/6 - 4 = 32/3. CKA = -1/2.
    assert score(RAW[2], [[1], [-1], [1], [-1]], [[1], [1], [-1], [-1]], [0, 1, 2, 3])[0] == pytest.approx(1.5, abs=1e-14)


# Against other formulas


def plain_linear(metric: Linear, x: Any, y: Any, owners: Sequence[int]) -> float:
    """The ridge map itself, d x d, for one pair."""
    held = held_out(owners)
    x, y = x - x[~held].mean(0), y - y[~held].mean(0)
    a = (x[~held] * y[~held]).sum() / (x[~held] ** 2).sum() if x.shape == y.shape else 0.0
    rest = y - a * x if x.shape == y.shape else y
    ridge = metric.ridge * (x[~held] ** 2).sum() / (~held).sum()
    b = np.linalg.solve(x[~held].T @ x[~held] + ridge * np.eye(x.shape[1]), x[~held].T @ rest[~held])
    return float(((rest[held] - x[held] @ b) ** 2).sum() / (y[held] ** 2).sum())


def plain_procrustes(x: Any, y: Any) -> float:
    """What is left of Y after the rotation of the singular vectors and the best scale, padded with zeros to equal sizes."""
    width = max(x.shape[1], y.shape[1])
    x, y = (np.pad(z - z.mean(0), ((0, 0), (0, width - z.shape[1]))) for z in (x, y))
    u, _, v = np.linalg.svd(x.T @ y)
    turned = x @ u @ v
    scale = (turned * y).sum() / (turned**2).sum()
    return float(((y - scale * turned) ** 2).sum() / (y**2).sum())


def plain_cka(x: Any, y: Any) -> float:
    """The estimator of Song et al. as it is written, with loops."""
    n = len(x)

    def hsic(a: Any, b: Any) -> float:
        k, l = (np.array([[0.0 if i == j else float(z[i] @ z[j]) for j in range(n)] for i in range(n)]) for z in (a, b))  # noqa: E741
        trace = math.fsum(k[i, j] * l[j, i] for i in range(n) for j in range(n))
        cross = math.fsum(k[i, j] * l[j, m] for i in range(n) for j in range(n) for m in range(n))
        return (trace + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))

    return 1 - hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y))


def plain(metric: SampleMetric, x: Any, y: Any, owners: Sequence[int]) -> float:
    if metric.normalised:
        x, y = unit(x), unit(y)
    if isinstance(metric, Linear):
        return plain_linear(metric, x, y, owners)
    return plain_procrustes(x, y) if isinstance(metric, Procrustes) else plain_cka(x, y)


@each_metric
@settings(max_examples=25)
@given(seed=SEEDS, hidden=st.sampled_from([2, 5, 40]), other=st.sampled_from([2, 5, 40]))
def test_equals_the_plain_formula(metric: SampleMetric, seed: int, hidden: int, other: int) -> None:
    # fewer and more dimensions than tokens, equal and different
    x = cloud(seed, hidden=hidden) + 3
    y = cloud(seed + 1, hidden=other) * 2 - 1
    shared = min(hidden, other)
    y[:, :shared] += x[:, :shared]
    assert score(metric, x, y, OWNERS)[0] == pytest.approx(plain(metric, x, y, OWNERS), abs=1e-9)


@each_metric
def test_many_boundaries_at_once(metric: SampleMetric) -> None:
    states = [cloud(0) * 3]
    for seed in range(1, 5):
        states.append(states[-1] + cloud(seed) * 0.5)
    scores = compare(metric, states, OWNERS)
    for i in range(5):
        for j in range(5):
            expected = plain(metric, states[i], states[j], OWNERS) if i < j else 0.0
            assert scores.value[i, j].item() == pytest.approx(expected, abs=1e-10)
    assert (scores.stderr.triu(1) >= 0).all()
    assert scores.value[0, 1] < scores.value[0, 2] < scores.value[0, 4]


def test_cka_works_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = cloud(3), cloud(3) + cloud(4)
    whole = score(CKA(), x, y, OWNERS)
    for rows in (1, 7, 24):
        monkeypatch.setattr("layercut.samplewise.CHUNK", rows)
        assert score(CKA(), x, y, OWNERS) == pytest.approx(whole, abs=1e-12)


@each_metric
def test_states_of_any_dtype(metric: SampleMetric) -> None:
    x, y = (torch.tensor(cloud(seed)).bfloat16() for seed in (1, 2))
    wanted = torch.tensor([[False, True], [False, False]])
    low, high = (metric.compare(each, torch.tensor(OWNERS), wanted) for each in ([x, y], [x.double(), y.double()]))
    assert torch.equal(low.value, high.value)
    assert low.value.dtype == torch.float64


# Properties


@each_metric
@given(seed=SEEDS)
def test_a_layer_that_does_nothing_scores_zero(metric: SampleMetric, seed: int) -> None:
    for hidden in (5, 40):
        x = cloud(seed, hidden=hidden) * 100
        assert score(metric, x, x, OWNERS)[0] == pytest.approx(0, abs=1e-12)
        assert score(metric, x, 2.5 * x, OWNERS)[0] == pytest.approx(0, abs=1e-12)


@each(*RAW)
@given(seed=SEEDS, scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_shift_and_scale_of_either_state_change_nothing(metric: SampleMetric, seed: int, scale: float, shift: float) -> None:
    x, y = cloud(seed), cloud(seed) + 0.5 * cloud(seed + 1)
    before = score(metric, x, y, OWNERS)
    assert score(metric, scale * x + shift, y, OWNERS) == pytest.approx(before, abs=1e-7)
    assert score(metric, x, scale * y + shift, OWNERS) == pytest.approx(before, abs=1e-7)


@each(*UNIT)
@given(seed=SEEDS)
def test_lengths_of_states_change_nothing(metric: SampleMetric, seed: int) -> None:
    x, y = cloud(seed), cloud(seed) + 0.5 * cloud(seed + 1)
    lengths = np.exp(np.random.default_rng(seed).normal(size=(2, 24, 1)) * 3)
    assert score(metric, lengths[0] * x, lengths[1] * y, OWNERS) == pytest.approx(score(metric, x, y, OWNERS), abs=1e-9)


def test_a_few_huge_states_do_not_decide() -> None:
    # two states that have nothing in common but five tokens of great length, which are the same in both
    x, y = cloud(0, 400, 8), cloud(1, 400, 8)
    x[::80] = y[::80] = 1000 * cloud(2, 5, 8)
    owners = [number for number in range(40) for _ in range(10)]
    for raw, normal in zip(RAW, UNIT, strict=True):
        assert score(raw, x, y, owners)[0] < 0.1
        assert score(normal, x, y, owners)[0] > 0.8


@each_metric
@given(seed=SEEDS)
def test_one_rotation_of_both_states_changes_nothing(metric: SampleMetric, seed: int) -> None:
    x, y, turn = cloud(seed), cloud(seed) + 0.5 * cloud(seed + 1), rotation(seed)
    assert score(metric, x @ turn, y @ turn, OWNERS) == pytest.approx(score(metric, x, y, OWNERS), abs=1e-9)


@each(*RAW[1:], *UNIT[1:])
@given(seed=SEEDS)
def test_a_rotation_of_one_state_changes_nothing(metric: SampleMetric, seed: int) -> None:
    x, y = cloud(seed), cloud(seed) + 0.5 * cloud(seed + 1)
    assert score(metric, x, y @ rotation(seed), OWNERS) == pytest.approx(score(metric, x, y, OWNERS), abs=1e-9)
    assert score(metric, y, x, OWNERS) == pytest.approx(score(metric, x, y, OWNERS), abs=1e-9)  # symmetric


@each(*RAW[:2], *UNIT[:2])
@given(seed=SEEDS)
def test_ranges(metric: SampleMetric, seed: int) -> None:
    value, error = score(metric, cloud(seed), cloud(seed + 1), OWNERS)
    assert value >= 0
    assert value <= 1 or isinstance(metric, Linear)  # which a fit on 16 tokens may mislead
    assert math.isfinite(error)
    assert error >= 0


def test_linear_explains_any_linear_map_given_enough_tokens() -> None:
    x = cloud(0, tokens=800, hidden=8)
    owners = [number for number in range(20) for _ in range(40)]
    assert score(Linear(ridge=1e-6, normalised=False), x, x @ cloud(1, 8, 8), owners)[0] < 1e-10
    assert score(Linear(ridge=1e-6, normalised=False), x, np.abs(x), owners)[0] > 0.9  # nothing of it is linear


def test_linear_does_not_explain_what_it_only_remembers() -> None:
    # 18 tokens to fit, 100 dimensions, nothing in common: fitted and judged on the same tokens all of it would be explained
    x, y = cloud(0, hidden=100), cloud(1, hidden=100)
    assert score(Linear(), x, y, OWNERS)[0] > 0.95
    kept = x - x.mean(0)
    assert np.linalg.matrix_rank(kept) == len(kept) - 1  # which a map from 100 dimensions can send anywhere


def test_cka_has_no_bias() -> None:
    # nothing in common, more dimensions than tokens: the plain estimator says 0.3 or less for what should be 1
    values, plain_values = [], []
    centre = np.eye(24) - 1 / 24
    for seed in range(40):
        x, y = cloud(2 * seed, hidden=100), cloud(2 * seed + 1, hidden=100)
        values.append(score(CKA(), x, y, OWNERS)[0])
        k, l = (centre @ z @ z.T @ centre for z in (x, y))  # noqa: E741
        plain_values.append(1 - (k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))
    assert sum(values) / 40 == pytest.approx(1, abs=0.02)
    assert sum(plain_values) / 40 < 0.3


@each_metric
def test_constant_states(metric: SampleMetric) -> None:
    x, flat = cloud(0), np.ones((24, 5))
    assert score(metric, flat, flat, OWNERS) == (0.0, 0.0)
    zero = np.zeros((24, 5))
    assert score(metric, zero, zero, OWNERS) == (0.0, 0.0)
    assert score(metric, x, flat, OWNERS) == ((0.0 if isinstance(metric, Linear) else 1.0), 0.0)
    assert score(metric, flat, x, OWNERS)[0] == 1.0


@each_metric
def test_only_what_is_wanted_is_worked_out(metric: SampleMetric) -> None:
    states = [torch.tensor(cloud(seed)) for seed in range(3)]
    wanted = torch.zeros(3, 3, dtype=torch.bool)
    wanted[2, 0] = True
    scores = metric.compare(states, torch.tensor(OWNERS), wanted)
    assert scores.value.nonzero().tolist() == scores.stderr.nonzero().tolist() == [[2, 0]]


# Standard errors


@each_metric
def test_standard_error_is_that_of_repeated_draws(metric: SampleMetric) -> None:
    """Over many texts of 40 samples of 6 tokens that share a direction, the spread of the score is what the error says."""
    values, errors = [], []
    mixing = np.random.default_rng(99).normal(size=(4, 4))
    for seed in range(120):
        random = np.random.default_rng(seed)
        own = np.repeat(random.normal(size=(40, 4)), 6, axis=0)  # what the tokens of a sample share
        x = own + random.normal(size=(240, 4))
        y = x @ mixing + np.repeat(random.normal(size=(40, 4)), 6, axis=0) + random.normal(size=(240, 4))
        value, error = score(metric, x, y, [number for number in range(40) for _ in range(6)])
        values.append(value)
        errors.append(error)
    spread = float(np.std(values, ddof=1))
    assert float(np.mean(errors)) == pytest.approx(spread, rel=0.3)


@each_metric
def test_one_sample_has_no_spread(metric: SampleMetric) -> None:
    owners = [0] * 24 if not isinstance(metric, Linear) else [0] * 12 + [1] * 12
    assert score(metric, cloud(0), cloud(1), owners)[1] == 0.0
