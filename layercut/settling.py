"""Settling: whether more text could change a choice. Compares what was chosen with its rivals, sample by sample.

Text is taken in looks, each as long as all before it. At every look each rival must cost more than the choice by its interval: the
costs of one sample are compared with each other (a paired t test with the sample as the unit), one-sided, at a level that is divided
by the number of looks and of rivals (Bonferroni), so that looking often, and at many, does not make a choice look surer than it is.
Choices without a list of rivals are made again on resampled samples (the bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import NormalDist
from typing import Any, NamedTuple, TypeAlias

from layercut.errors import CalibrationError
from layercut.plan import Measurement
from layercut.stack import Boundary

Tensor: TypeAlias = Any

LEVEL = 0.05
"""Chance, at most, that a choice is called settled although a rival is nearer."""
RESAMPLED = 200
"""How often a choice without a list of rivals is made again at each look."""
EQUAL = 1e-12
"""Costs that are this near are equal: the first of equals is chosen, whatever the text."""


class Way(NamedTuple):
    """A way in which a choice can fall, and the seams that it costs."""

    name: str
    seams: tuple[tuple[Boundary, Boundary], ...] = ()


class Contest(NamedTuple):
    """A choice, and its rivals."""

    where: str
    metric: str
    """Label of the metric that decides."""
    chosen: Way
    rivals: tuple[Way, ...] | None
    """All other ways; None when they cannot be listed."""


Ask: TypeAlias = Callable[[Measurement], Sequence[Contest]]
"""Tells what is chosen on a measurement."""


@dataclass(frozen=True)
class Question:
    """What is chosen on a measurement, and a name for it: what was settled for one question counts for every other of the same name."""

    name: str
    ask: Ask

    def __call__(self, measurement: Measurement) -> Sequence[Contest]:
        return self.ask(measurement)


class Kept(NamedTuple):
    """What one metric saw of every sample."""

    sums: Tensor
    """Sums of distances over the tokens of a sample, (samples, B, B), float64."""
    counts: Tensor
    """Tokens of a sample that count, (samples), float64."""


class Verdict(NamedTuple):
    """Whether a choice is settled, and how sure it is, in one line."""

    settled: bool
    text: str


def look_sizes(least: int, most: int) -> list[int]:
    """Samples at each look: `least`, then twice as many each time, and `most` at last."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def judge(
    question: Ask, measurement: Measurement, kept: Mapping[str, Kept], starts: Mapping[str, int], looks: int, seed: int = 0
) -> list[Verdict]:
    """A verdict on every choice. `starts` is the first boundary of each model among all; `looks` is how often this is asked at most.

    Raises CalibrationError when a metric decides that is not averaged over tokens.
    """
    contests = list(question(measurement))
    for contest in contests:
        if contest.metric not in kept:
            message = f"samples: auto cannot tell whether {contest.metric} is settled ({contest.where})"
            raise CalibrationError(message, hint="give a number of samples, or let a metric decide that is averaged over tokens")
    verdicts = [_compared(contest, kept[contest.metric], starts, looks) for contest in contests if contest.rivals is not None]
    open_ended = [contest for contest in contests if contest.rivals is None]
    return verdicts + (_resampled(question, open_ended, measurement, kept, starts, looks, seed) if open_ended else [])


def _compared(contest: Contest, kept: Kept, starts: Mapping[str, int], looks: int) -> Verdict:
    rivals = contest.rivals or ()
    samples = int((kept.counts > 0).sum())
    if not rivals:
        return Verdict(True, f"{contest.where}: there is no other way")
    if samples < 2:
        return Verdict(False, f"{contest.where}: not settled, one sample has no spread")
    limit = t_quantile(1 - LEVEL / (looks * len(rivals)), samples - 1)
    own = _costs(contest.chosen, kept, starts)
    gaps = []
    for rival in rivals:
        gap, error = paired(_costs(rival, kept, starts) - own, kept.counts)
        ratio = math.inf if abs(gap) <= EQUAL and error <= EQUAL else gap / error if error else math.copysign(math.inf, gap)
        gaps.append((ratio, gap, error, rival.name))
    near = min(gaps)
    by = f"by {near[1]:.3g}, {near[0]:.1f} standard errors" if math.isfinite(near[0]) else "on every sample alike"
    told = f"{contest.chosen.name} against {near[3]} {by} ({limit:.1f} make it sure) after {samples} samples"
    undecided = sorted(gap for gap in gaps if gap[0] < limit)
    if not undecided:
        return Verdict(True, f"{contest.where}: settled, {told}")
    others = ", ".join(gap[3] for gap in undecided)
    return Verdict(False, f"{contest.where}: not settled, {told}; more text may lead to {others}")


def paired(differences: Tensor, counts: Tensor) -> tuple[float, float]:
    """Mean of a difference over tokens and its standard error, from sums by sample: the formula of `sums.Sums.scores`."""
    samples, total = int((counts > 0).sum()), counts.sum()
    mean = differences.sum() / total
    spread = (differences - mean * counts).square().sum()
    return float(mean), float((spread * samples / (samples - 1)).sqrt() / total)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, else by Abramowitz and Stegun 26.7.5 from that of the normal
    distribution, and never less than the latter."""
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z, v = NormalDist().inv_cdf(probability), freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _costs(way: Way, kept: Kept, starts: Mapping[str, int]) -> Tensor:
    """What a way costs on each sample, summed over its tokens."""
    total = kept.counts * 0
    for source, target in way.seams:
        if source != target:
            i, j = (starts[boundary.model] + boundary.number for boundary in (source, target))
            if source.model == target.model:  # as the tables: the earlier state is given, whichever way the seam goes
                i, j = min(i, j), max(i, j)
            total = total + kept.sums[:, i, j]
    return total


def _resampled(
    question: Ask,
    contests: Sequence[Contest],
    measurement: Measurement,
    kept: Mapping[str, Kept],
    starts: Mapping[str, int],
    looks: int,
    seed: int,
) -> list[Verdict]:
    """Make the choices again on samples that are drawn with replacement, and count how often they fall otherwise."""
    samples = len(next(iter(kept.values())).counts)
    random = Random(f"{seed} {samples}")
    others: list[dict[str, int]] = [{} for _ in contests]
    for _ in range(RESAMPLED):
        drawn = random.choices(range(samples), k=samples)
        found = {contest.where: contest.chosen.name for contest in question(_again(measurement, kept, starts, drawn))}
        for contest, counts in zip(contests, others, strict=True):
            name = found.get(contest.where, "nothing")
            if name != contest.chosen.name:
                counts[name] = counts.get(name, 0) + 1
    verdicts = []
    for contest, counts in zip(contests, others, strict=True):
        missed = sum(counts.values())
        told = f"{contest.chosen.name} in {RESAMPLED - missed} of {RESAMPLED} resamplings of {samples} samples"
        if missed <= RESAMPLED * LEVEL / looks:
            verdicts.append(Verdict(True, f"{contest.where}: settled, {told}"))
        else:
            most = sorted(counts, key=lambda name: (-counts[name], name))[:3]
            verdicts.append(Verdict(False, f"{contest.where}: not settled, {told}; more text may lead to {', '.join(most)}"))
    return verdicts


def _again(measurement: Measurement, kept: Mapping[str, Kept], starts: Mapping[str, int], drawn: Sequence[int]) -> Measurement:
    """The measurement on other samples. Standard errors stay: they decide nothing."""
    tables = []
    for table in measurement.tables:
        if table.metric in kept:
            sums, counts = kept[table.metric]
            rows = slice(starts[table.a], starts[table.a] + len(table.mean))
            columns = slice(starts[table.b], starts[table.b] + len(table.mean[0]))
            mean = sums[drawn, rows, columns].sum(0) / counts[drawn].sum().clamp(min=1)
            if table.a == table.b:
                mean = mean.triu() + mean.triu(1).T
            table = table.model_copy(update={"mean": tuple(map(tuple, mean.tolist()))})
        tables.append(table)
    return measurement.model_copy(update={"tables": tuple(tables)})


def best_blocks(measurement: Measurement) -> list[Contest]:
    """The choice of the nearest block of every size, by the first table of one model: what is asked when no recipe asks."""
    table = next(table for table in measurement.tables if table.a == table.b)
    depth, found = len(table.mean) - 1, []
    for size in range(1, depth):
        ways = [
            Way(f"[{start}, {start + size})", ((Boundary(table.a, start), Boundary(table.a, start + size)),))
            for start in range(depth - size + 1)
        ]
        at = min(range(len(ways)), key=lambda start: table.mean[start][start + size])
        found.append(Contest(f"blocks of {size}", table.metric, ways[at], (*ways[:at], *ways[at + 1 :])))
    return found


BEST_BLOCKS = Question("the nearest block of every size", best_blocks)
"""What is asked when no recipe asks."""
