"""The resident schedule: whole models in memory, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from layercut.accumulators import Accumulators, Model
from layercut.errors import CalibrationError
from layercut.runner import Runner
from layercut.tokens import Sample


class Resident:
    """Runs every model over a batch, then hands the states of all to the accumulators. Memory does not grow with the samples."""

    def __init__(self, runners: Sequence[Runner], device: torch.device) -> None:
        self._runners = tuple(runners)
        self._device = device
        self.models = tuple(Model(runner.alias, len(runner.layers), runner.dtype) for runner in runners)

    def run(self, batches: Iterable[list[Sample]], accumulators: Accumulators) -> None:
        """Run every batch once. Raises CalibrationError when memory does not do."""
        for batch in batches:
            try:
                self._run(batch, accumulators)
            except torch.OutOfMemoryError:
                raise CalibrationError(f"out of memory on {self._device}", hint="lower batch_size or max_length") from None

    def _run(self, batch: Sequence[Sample], accumulators: Accumulators) -> None:
        rows = accumulators.choose(batch)
        ids, mask = (tensor.to(self._device) for tensor in padded(batch))
        there = rows.to(self._device)
        states = [state for runner in self._runners for state in runner.states(batch, ids, mask, there)]
        accumulators.add(batch, rows, states)


def padded(batch: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch, both (samples, width) of int64, pads on the right; masked, so any token does for a pad."""
    width = max(len(sample.ids) for sample in batch)
    ids = torch.tensor([sample.ids + [0] * (width - len(sample.ids)) for sample in batch])
    mask = torch.tensor([[1] * len(sample.ids) + [0] * (width - len(sample.ids)) for sample in batch])
    return ids, mask
