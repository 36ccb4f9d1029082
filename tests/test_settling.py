"""Settling: paired intervals by hand, quantiles against tables, and choices that are settled when they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from layercut.errors import CalibrationError
from layercut.plan import Measurement, Table
from layercut.settling import Contest, Kept, Way, best_blocks, judge, look_sizes, paired, t_quantile
from layercut.stack import Boundary

METRIC = "angular[last]"


def kept(rows: Sequence[Sequence[float]]) -> Kept:
    """A model of three boundaries: each row is one sample's D[0][1], D[1][2] and D[0][2]."""
    sums = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    for number, (one, two, three) in enumerate(rows):
        sums[number, 0, 1], sums[number, 1, 2], sums[number, 0, 2] = one, two, three
    return Kept(sums, torch.ones(len(rows), dtype=torch.float64))


def measured(found: Kept) -> Measurement:
    mean = found.sums.sum(0) / found.counts.sum()
    rows = tuple(map(tuple, (mean + mean.T).tolist()))
    table = Table(metric=METRIC, a="m", b="m", mean=rows, stderr=rows)
    return Measurement(tables=(table,), samples=len(found.counts), tokens=len(found.counts), details={})


def seam(first: int, last: int) -> Way:
    return Way(f"[{first}, {last})", ((Boundary("m", first), Boundary("m", last)),))


def listed(measurement: Measurement) -> list[Contest]:
    mean = measurement.tables[0].mean
    ways = sorted([seam(0, 1), seam(1, 2)], key=lambda way: mean[way.seams[0][0].number][way.seams[0][1].number])
    return [Contest("prune", METRIC, ways[0], (ways[1],))]


def unlisted(measurement: Measurement) -> list[Contest]:
    return [contest._replace(rivals=None) for contest in listed(measurement)]


@pytest.mark.parametrize(
    ("least", "most", "sizes"),
    [(8, 128, [8, 16, 32, 64, 128]), (8, 100, [8, 16, 32, 64, 100]), (8, 8, [8]), (8, 3, [3]), (3, 4, [3, 4])],
)
def test_looks_double(least: int, most: int, sizes: list[int]) -> None:
    assert look_sizes(least, most) == sizes


def test_paired_by_hand() -> None:
    # Differences 1, 2, 3 over one token each: mean 2, variance 1, standard error 1 / sqrt(3).
    gap, error = paired(torch.tensor([1.0, 2.0, 3.0]).double(), torch.ones(3).double())
    assert gap == 2.0
    assert error == pytest.approx(1 / math.sqrt(3), abs=1e-15)
    # As in test_sums: 2 tokens with sum 1 and 3 tokens with sum 3.
    assert paired(torch.tensor([1.0, 3.0]).double(), torch.tensor([2.0, 3.0]).double()) == pytest.approx((0.8, 0.24), abs=1e-15)


@pytest.mark.parametrize(
    ("probability", "freedom", "value", "within"),
    # Tables of Student's t.
    [(0.975, 1, 12.7062, 1e-4), (0.975, 2, 4.3027, 1e-4), (0.975, 7, 2.3646, 1e-3), (0.9995, 7, 5.4079, 0.06), (0.9995, 15, 4.0728, 5e-3),
     (0.9995, 120, 3.3735, 1e-4), (0.975, 10**6, 1.959966, 1e-5)],
)  # fmt: skip
def test_t_quantile(probability: float, freedom: int, value: float, within: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=within)


def test_a_clear_choice_is_settled() -> None:
    found = kept([(0.1 + 0.001 * number, 0.5 - 0.002 * number, 0.9) for number in range(8)])
    (verdict,) = judge(listed, measured(found), {METRIC: found}, {"m": 0}, 5)
    assert verdict.settled
    assert verdict.text.startswith("prune: settled, [0, 1) against [1, 2) by 0.39, ")
    assert verdict.text.endswith("make it sure) after 8 samples")


def test_a_choice_within_its_interval_is_not() -> None:
    found = kept([(0.30, 0.31, 0.9), (0.30, 0.30, 0.9), (0.32, 0.31, 0.9), (0.29, 0.33, 0.9)])
    (verdict,) = judge(listed, measured(found), {METRIC: found}, {"m": 0}, 1)
    assert not verdict.settled
    assert verdict.text.endswith("after 4 samples; more text may lead to [1, 2)")


def test_samples_are_compared_with_themselves() -> None:
    """Costs that vary much, but together: unpaired intervals would overlap."""
    spread = [0.1 * number for number in range(8)]
    found = kept([(cost, cost + 0.01 + 0.0001 * (number % 2), 0.9) for number, cost in enumerate(spread)])
    (verdict,) = judge(listed, measured(found), {METRIC: found}, {"m": 0}, 5)
    assert verdict.settled


def test_more_looks_ask_for_more() -> None:
    found = kept([(0.30, 0.32 + 0.01 * (number % 3), 0.9) for number in range(8)])
    texts = [judge(listed, measured(found), {METRIC: found}, {"m": 0}, looks)[0].text for looks in (1, 10)]
    limits = [float(text.split("(")[-1].split(" make")[0]) for text in texts]
    assert limits[0] < limits[1]


def test_equal_costs_are_settled() -> None:
    """Layers that do nothing: the first of equals is chosen, whatever the text."""
    found = kept([(0.0, 0.0, 0.0)] * 4)
    (verdict,) = judge(listed, measured(found), {METRIC: found}, {"m": 0}, 5)
    assert verdict.settled


def test_one_sample_settles_nothing() -> None:
    found = kept([(0.1, 0.9, 0.9)])
    (verdict,) = judge(listed, measured(found), {METRIC: found}, {"m": 0}, 5)
    assert verdict == (False, "prune: not settled, one sample has no spread")


def test_a_choice_without_rivals_is_settled() -> None:
    found = kept([(0.1, 0.9, 0.9)] * 2)
    (verdict,) = judge(lambda _: [Contest("prune", METRIC, seam(0, 1), ())], measured(found), {METRIC: found}, {"m": 0}, 5)
    assert verdict == (True, "prune: there is no other way")


def test_choices_that_are_not_listed_are_made_again() -> None:
    clear = kept([(0.1 + 0.01 * number, 0.5, 0.9) for number in range(8)])
    (verdict,) = judge(unlisted, measured(clear), {METRIC: clear}, {"m": 0}, 5)
    assert verdict == (True, "prune: settled, [0, 1) in 200 of 200 resamplings of 8 samples")
    close = kept([(0.3, 0.3 + 0.1 * (-1) ** number + 0.001, 0.9) for number in range(8)])
    (verdict,) = judge(unlisted, measured(close), {METRIC: close}, {"m": 0}, 5)
    assert not verdict.settled
    assert verdict.text.endswith("more text may lead to [1, 2)")
    assert judge(unlisted, measured(close), {METRIC: close}, {"m": 0}, 5) == [verdict]  # seeded


def test_metrics_that_keep_no_samples() -> None:
    found = kept([(0.1, 0.9, 0.9)] * 2)
    with pytest.raises(CalibrationError, match=r"^samples: auto cannot tell whether linear\[last\] is settled \(prune\)") as caught:
        judge(lambda _: [Contest("prune", "linear[last]", seam(0, 1), ())], measured(found), {METRIC: found}, {"m": 0}, 5)
    assert "\n" not in str(caught.value)


def test_without_a_question_the_best_blocks_are_asked() -> None:
    found = kept([(0.1, 0.9, 0.9)] * 2)
    (contest,) = best_blocks(measured(found))
    assert contest == Contest("blocks of 1", METRIC, seam(0, 1), (seam(1, 2),))


def test_false_settlements_are_rare() -> None:
    """Two blocks that are truly equal: over all looks, at most about 5 in 100 runs call one of them nearer."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(200):
        noise = torch.randn(64, 2, generator=generator, dtype=torch.float64) * 0.1 + 1.0
        rows = [(one, two, 3.0) for one, two in noise.tolist()]
        sizes = look_sizes(8, 64)
        for size in sizes:
            found = kept(rows[:size])
            if judge(listed, measured(found), {METRIC: found}, {"m": 0}, len(sizes))[0].settled:
                wrong += 1
                break
    # The nearer one is chosen first and then tested, so both sides count: 2 x 5 % at most.
    assert wrong <= 24
