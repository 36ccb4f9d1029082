"""Running sums of one distance matrix over tokens, kept by sample for the standard error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from layercut.metric import Scores

SCALARS = 3


class Sums:
    """Sums over samples of the distances, their squares and cross terms; all float64.

    What sample k adds is the sum s_k of its distances and the number n_k of its tokens. Sums run over s_k - c n_k with c the mean
    of the first sample, so that a small spread around a large mean is not lost.
    """

    def __init__(self, keep: bool = False) -> None:
        """`keep` holds the sums of every sample as well: memory grows with the samples."""
        self._keep = keep
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._counts = torch.zeros(SCALARS, dtype=torch.float64)  # samples, sum n_k, sum n_k^2
        self._shift = self._first = self._square = self._cross = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def samples(self) -> int:
        """Samples that had tokens to count."""
        return int(self._counts[0])

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Take in samples: sums of distances (samples, B, B) and numbers of tokens (samples). Those without tokens do not count."""
        own = counts > 0
        if not own.any():
            return
        sums, counts = sums[own], counts[own]
        if self._keep:
            self._kept.append((sums.cpu(), counts.cpu()))
        if not self.samples:
            self._shift = sums[0] / counts[0]
            self._first, self._square, self._cross = (torch.zeros_like(self._shift) for _ in range(3))
        weight = counts[:, None, None]
        shifted = sums - self._shift * weight
        self._first += shifted.sum(0)
        self._square += shifted.square().sum(0)
        self._cross += (shifted * weight).sum(0)
        self._counts += torch.stack([torch.ones_like(counts), counts, counts.square()]).sum(1).cpu()

    def scores(self) -> Scores:
        """Mean over tokens, and its standard error with the sample as the unit.

        sqrt(K / (K - 1) sum_k (s_k - mean n_k)^2) / sum_k n_k, over the K samples. One sample has no spread, and gives 0.
        """
        samples, count, count_square = self._counts.tolist()
        mean = self._first / count
        value = self._shift + mean
        if samples < 2:
            return Scores(value, torch.zeros_like(value))
        spread = self._square - 2 * mean * self._cross + mean.square() * count_square
        return Scores(value, (spread.clamp(min=0) * samples / (samples - 1)).sqrt() / count)

    def by_sample(self) -> tuple[Tensor, Tensor]:
        """Sums of distances (samples, B, B) and numbers of tokens (samples) of every sample that was kept, on the CPU."""
        if not self._kept:
            return torch.zeros(0, 0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        sums, counts = zip(*self._kept, strict=True)
        return torch.cat(sums), torch.cat(counts)

    def state(self) -> dict[str, Tensor]:
        """All that it holds, on the CPU."""
        held = {"counts": self._counts, "shift": self._shift, "first": self._first, "square": self._square, "cross": self._cross}
        if self._keep:
            held["kept"], held["kept_counts"] = self.by_sample()
        return {key: value.cpu() for key, value in held.items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Take in what another one summed up, given by its `state`."""
        other = {key: value.to(self._shift.device) for key, value in state.items()}
        if not other["counts"][0]:
            return
        if self._keep:
            self._kept.append((state["kept"], state["kept_counts"]))
        if not self.samples:
            self._shift, self._first, self._square, self._cross = (other[key].clone() for key in ("shift", "first", "square", "cross"))
            self._counts = state["counts"].clone()
            return
        _, count, count_square = state["counts"].tolist()
        step = other["shift"] - self._shift
        self._square += other["square"] + 2 * step * other["cross"] + step.square() * count_square
        self._cross += other["cross"] + step * count_square
        self._first += other["first"] + step * count
        self._counts += state["counts"]
