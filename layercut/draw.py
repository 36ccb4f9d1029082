"""A draw of tokens: a seeded sample of the tokens of all samples, with their boundary states, of a size that does not grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from layercut.tokens import Sample

PLACES = 1 << 32
"""The key of a token is its sample's number times this, plus its place."""


class Drawn(NamedTuple):
    """What was drawn, in the order of samples and tokens."""

    states: Iterator[Tensor]
    """For each boundary (n, d), in the dtype that the states came in; each is put together when it is asked for."""
    owners: Tensor
    """(n,) number of the sample of each token, ascending."""


class Draw:
    """The tokens of least priority, `size` at most. Priorities are random and depend on seed, sample number and place alone.

    Batches, processes and their order do not change what is drawn; the draw of a smaller size is part of that of a larger one.
    States are kept on the CPU in the dtype that they come in.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._seed = seed
        self._priorities = torch.zeros(0, dtype=torch.float64)
        self._keys = torch.zeros(0, dtype=torch.int64)  # of what is drawn from what was offered so far
        self._held = torch.full((size,), -1, dtype=torch.int64)  # key of the states in each slot
        self._states: list[Tensor] = []

    def choose(self, batch: Sequence[Sample], offered: Tensor) -> Tensor:
        """The tokens of a batch that are drawn: bool, as `offered` (samples, width). Later batches may drive some out again."""
        keys = _keys(batch, offered)
        priorities = torch.cat([self._random(sample)[row[: len(sample.ids)]] for sample, row in zip(batch, offered, strict=True)])
        self._offer(keys, priorities)
        return self.still(batch, offered)

    def still(self, batch: Sequence[Sample], offered: Tensor) -> Tensor:
        """Those of the tokens `offered` earlier that are drawn now: bool, (samples, width)."""
        rows = offered.clone()
        rows[offered] = torch.isin(_keys(batch, offered), self._keys)
        return rows

    def add(self, batch: Sequence[Sample], rows: Tensor, states: Sequence[Tensor]) -> None:
        """Keep the states (tokens, d) of the tokens `rows` (samples, width), for each boundary, as far as they are still drawn."""
        self._keep(_keys(batch, rows), states)

    def drawn(self, size: int, device: torch.device) -> Drawn:
        """The first `size` of the draw by priority, put in order."""
        slots, keys, _ = self._filled(size)
        return Drawn((state[slots].to(device) for state in self._states), (keys // PLACES).to(device))

    def state(self) -> dict[str, Tensor]:
        """All that it holds, on the CPU."""
        slots, keys, priorities = self._filled(self.size)
        held = {f"state{boundary:05d}": state[slots] for boundary, state in enumerate(self._states)}
        return {"keys": keys, "priorities": priorities, **held}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        """Take in what another one drew, given by its `state`."""
        self._offer(state["keys"], state["priorities"])
        self._keep(state["keys"], [state[key] for key in sorted(state) if key.startswith("state")])

    def _random(self, sample: Sample) -> Tensor:
        # Python promises the same numbers from the same text in every version; torch takes 32 bits of a seed only.
        random = Random(f"{self._seed} {sample.number}")
        return torch.tensor([random.random() for _ in sample.ids], dtype=torch.float64)

    def _offer(self, keys: Tensor, priorities: Tensor) -> None:
        keys, priorities = torch.cat([self._keys, keys]), torch.cat([self._priorities, priorities])
        least = priorities.argsort(stable=True)[: self.size]
        self._keys, self._priorities = keys[least], priorities[least]

    def _keep(self, keys: Tensor, states: Sequence[Tensor]) -> None:
        wanted = torch.isin(keys, self._keys)
        if not wanted.any():
            return
        if not self._states:
            self._states = [torch.empty(self.size, state.shape[1], dtype=state.dtype) for state in states]
        slots = (~torch.isin(self._held, self._keys)).nonzero()[:, 0][: int(wanted.sum())]
        self._held[slots] = keys[wanted]
        for own, state in zip(self._states, states, strict=True):
            own[slots] = state[wanted.to(state.device)].cpu()

    def _filled(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Slots, keys and priorities of the first `size` of the draw whose states are here, in the order of the keys."""
        order = self._keys[:size].argsort()
        keys, priorities = self._keys[:size][order], self._priorities[:size][order]
        held, slots = self._held.sort()
        at = torch.searchsorted(held, keys).clamp(max=len(held) - 1)
        here = held[at] == keys
        return slots[at][here], keys[here], priorities[here]


def _keys(batch: Sequence[Sample], rows: Tensor) -> Tensor:
    places = rows.nonzero()
    return torch.tensor([sample.number for sample in batch])[places[:, 0]] * PLACES + places[:, 1]
