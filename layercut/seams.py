"""The seam planner: boundaries and blocks of least total seam distance, found exactly. Knows distances, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from layercut.plan import Distance, Measurement
from layercut.stack import Boundary, Joint, Stack, joints

# Sums of floats depend on their order; sums of whole ticks do not, so equal costs are equal on every machine.
TICKS = 10**12


class Cost(NamedTuple):
    """Total seam distance of a stack, in whole ticks of 1e-12, and the variance of its estimate."""

    ticks: int
    variance: float

    @property
    def value(self) -> float:
        return self.ticks / TICKS

    @property
    def stderr(self) -> float:
        """Standard error, seams taken as independent."""
        return math.sqrt(self.variance)


class Prices:
    """What a seam costs under one metric."""

    def __init__(self, measurement: Measurement, metric: str, depths: Mapping[str, int]) -> None:
        self.metric = metric
        self.depths = depths
        self._tables = {(table.a, table.b): table for table in measurement.tables if table.metric == metric}

    def distance(self, source: Boundary, target: Boundary) -> Distance:
        """The measured distance from one boundary state to another, of the same or of two models."""
        table = self._tables.get((source.model, target.model))
        if table is not None:
            return Distance(mean=table.mean[source.number][target.number], stderr=table.stderr[source.number][target.number])
        table = self._tables[target.model, source.model]
        return Distance(mean=table.mean[target.number][source.number], stderr=table.stderr[target.number][source.number])

    def ticks(self, source: Boundary, target: Boundary) -> int:
        """Cost of handing `source` to a layer that expects `target`; 0 when they are the same state."""
        return 0 if source == target else round(self.distance(source, target).mean * TICKS)

    def cost(self, stack: Stack) -> Cost:
        """Total seam distance of a stack."""
        seams: list[Joint] = list(joints(stack, self.depths))
        return Cost(
            sum(self.ticks(seam.source, seam.target) for seam in seams),
            sum(self.distance(seam.source, seam.target).stderr ** 2 for seam in seams),
        )


class Window(NamedTuple):
    """A slice whose boundaries may be open: None stands for `auto`."""

    model: str
    start: int | None
    stop: int | None

    def starts(self, depth: int) -> range:
        return range(depth + 1) if self.start is None else range(self.start, self.start + 1)

    def stops(self, depth: int) -> range:
        return range(depth + 1) if self.stop is None else range(self.stop, self.stop + 1)

    def lengths(self, depth: int, least: int) -> range:
        """Lengths that the slice can take; an open slice has at least `least` layers."""
        longest = (depth if self.stop is None else self.stop) - (0 if self.start is None else self.start)
        return range(longest, longest + 1) if self.start is not None and self.stop is not None else range(least, longest + 1)


def least_length(windows: Sequence[Window]) -> int:
    """Layers that an open slice must have: none when one model gives all slices (pruning may reach either end), else one."""
    return 0 if len({window.model for window in windows}) == 1 else 1


def choose_boundaries(windows: Sequence[Window], depth: int, prices: Prices) -> list[tuple[int, int]]:
    """Boundaries [a, b) of every slice, `depth` layers in all, with the least total seam distance.

    Exact, by dynamic programming from the last slice to the first over (boundary, layers left). Of equal costs the one
    with the smallest first boundary wins, then the smallest second, and so on. The windows must be able to reach `depth`
    (see `Window.lengths`).
    """
    return _Search(windows, depth, prices).best()


class _Search:
    """State of one search: for every slice, the least cost of it and all later ones. An empty slice makes no seam."""

    def __init__(self, windows: Sequence[Window], depth: int, prices: Prices) -> None:
        self.windows, self.depth, self.prices = windows, depth, prices
        self.least = least_length(windows)
        # after[k][b, r]: least cost of what follows boundary b when slices k and later still have to give r layers.
        # onward[k][a, r]: the same when slice k starts at a and is not empty, its seam before a left out.
        last = windows[-1].model
        end = Boundary(last, prices.depths[last])
        self.onward: list[dict[tuple[int, int], int]] = [{} for _ in windows]
        self.after: list[dict[tuple[int, int], int]] = [{} for _ in windows]
        self.after.append({(b, 0): prices.ticks(Boundary(last, b), end) for b in self._stops(len(windows))})
        for k in range(len(windows) - 1, -1, -1):
            self._enter(k)
            self._leave(k)

    def _before(self, k: int) -> str:
        """The model whose boundary state slice k receives."""
        return self.windows[max(k - 1, 0)].model

    def _stops(self, k: int) -> range:
        """Boundaries that slice k may receive: those where the slice before stops, or any when slices may be empty."""
        full = self.prices.depths[self._before(k)]
        return range(1) if k == 0 else range(full + 1) if self.least == 0 else self.windows[k - 1].stops(full)

    def _lengths(self, k: int) -> range:
        return self.windows[k].lengths(self.prices.depths[self.windows[k].model], self.least)

    def _enter(self, k: int) -> None:
        window, full = self.windows[k], self.prices.depths[self.windows[k].model]
        lengths, stops = self._lengths(k), window.stops(full)
        for start in window.starts(full):
            for (stop, left), cost in self.after[k + 1].items():
                length = stop - start
                if length > 0 and length in lengths and stop in stops and left + length <= self.depth:
                    key = (start, left + length)
                    if cost < self.onward[k].get(key, cost + 1):
                        self.onward[k][key] = cost

    def _leave(self, k: int) -> None:
        before, here = self._before(k), self.windows[k].model
        best = dict(self.after[k + 1]) if 0 in self._lengths(k) else {}
        for b in self._stops(k):
            seam = {a: self.prices.ticks(Boundary(before, b), Boundary(here, a)) for a, _ in self.onward[k]}
            for (a, left), cost in self.onward[k].items():
                total = seam[a] + cost
                if total < best.get((b, left), total + 1):
                    best[b, left] = total
        self.after[k] = best

    def best(self) -> list[tuple[int, int]]:
        """Walk forward, taking the smallest boundaries that keep the least cost."""
        here, left = 0, self.depth
        found: list[tuple[int, int]] = []
        for k in range(len(self.windows)):
            start, stop = min(self._steps(k, here, left))
            found.append((start, stop))
            if stop > start:
                here, left = stop, left - (stop - start)
        return found

    def _steps(self, k: int, here: int, left: int) -> Iterator[tuple[int, int]]:
        """Boundaries of slice k that keep the least cost of what follows boundary `here`."""
        window, full = self.windows[k], self.prices.depths[self.windows[k].model]
        lengths, goal = self._lengths(k), self.after[k][here, left]
        for start in window.starts(full):
            seam = self.prices.ticks(Boundary(self._before(k), here), Boundary(window.model, start))
            for stop in window.stops(full):
                length = stop - start
                state = (stop, left - length) if length else (here, left)
                if length in lengths and self.after[k + 1].get(state) == (goal - seam if length else goal):
                    yield start, stop
