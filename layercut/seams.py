"""Prices of seams: what a stack costs under one metric, in whole ticks. Knows distances, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
