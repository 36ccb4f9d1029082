"""The seam planner: boundaries of slices with the least total seam distance, found exactly by dynamic programming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from layercut.seams import Prices
from layercut.stack import Boundary


class Window(NamedTuple):
    """A slice whose boundaries may be open: None stands for `auto`."""

    model: str
    start: int | None
    stop: int | None
    least: int | None = None
    """Layers that it has at least."""
    most: int | None = None
    """Layers that it has at most."""
    holds: tuple[int, ...] = ()
    """Layers that it must hold."""
    overlap: int | None = None
    """Layers of the slice before it that it begins with again; its model must be the same."""

    def starts(self, depth: int) -> range:
        top = min(self.holds, default=depth)
        return range(top + 1) if self.start is None else range(self.start, min(self.start, top) + 1)

    def stops(self, depth: int) -> range:
        low = max(self.holds, default=-1) + 1
        return range(low, depth + 1) if self.stop is None else range(max(self.stop, low), self.stop + 1)

    def lengths(self, depth: int, least: int) -> range:
        """Lengths that the slice can take; an open slice has at least `least` layers."""
        longest = (depth if self.stop is None else self.stop) - (0 if self.start is None else self.start)
        if self.start is not None and self.stop is not None:
            return range(longest, longest + 1)
        low = max(least if self.least is None else self.least, max(self.holds) - min(self.holds) + 1 if self.holds else 0)
        return range(low, min(longest, longest if self.most is None else self.most) + 1)


def least_length(windows: Sequence[Window]) -> int:
    """Layers that an open slice must have: none when one model gives all slices (pruning may reach either end), else one."""
    return 0 if len({window.model for window in windows}) == 1 and all(window.overlap is None for window in windows) else 1


def choose_boundaries(windows: Sequence[Window], depth: int, prices: Prices) -> list[tuple[int, int]] | None:
    """Boundaries [a, b) of every slice, `depth` layers in all, with the least total seam distance; None when nothing fits.

    Exact, by dynamic programming from the last slice to the first over (boundary, layers left). Of equal costs the one
    with the smallest first boundary wins, then the smallest second, and so on.
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
            seam = {a: self.prices.ticks(Boundary(before, b), Boundary(here, a)) for a, _ in self.onward[k] if self._joins(k, b, a)}
            for (a, left), cost in self.onward[k].items():
                if a not in seam:
                    continue
                total = seam[a] + cost
                if total < best.get((b, left), total + 1):
                    best[b, left] = total
        self.after[k] = best

    def _joins(self, k: int, here: int, start: int) -> bool:
        """Whether slice k may start there after boundary `here`: an overlap fixes it."""
        overlap = self.windows[k].overlap
        return overlap is None or start == here - overlap

    def best(self) -> list[tuple[int, int]] | None:
        """Walk forward, taking the smallest boundaries that keep the least cost; None when nothing fits."""
        if (0, self.depth) not in self.after[0]:
            return None
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
                fits = length in lengths and (length == 0 or self._joins(k, here, start))
                if fits and self.after[k + 1].get(state) == (goal - seam if length else goal):
                    yield start, stop
