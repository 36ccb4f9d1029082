"""Arguments: what the layers are called with, kept once however many layers and batches share it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layercut.spill import Spill, raw_bytes
from layercut.standins import Call


class Kept(NamedTuple):
    """Stands for a tensor that is kept."""

    key: str


class Arguments:
    """The calls of every layer for every batch. Masks and rotary tables are kept by their contents: most batches have the same."""

    def __init__(self, spill: Spill, device: torch.device) -> None:
        self._spill = spill
        self._device = device
        self._calls: dict[int, list[Call]] = {}
        self._keys: set[str] = set()

    def keep(self, batch: int, calls: Sequence[Call]) -> None:
        """Keep the calls of all layers for one batch."""
        seen: dict[int, Any] = {}  # what the layers of one batch share is looked at once
        self._calls[batch] = [
            Call(
                tuple(self._kept(value, seen) for value in call.args), {k: self._kept(v, seen) for k, v in call.kwargs.items()}, call.named
            )
            for call in calls
        ]

    def call(self, batch: int, layer: int) -> Call:
        """The call of one layer for one batch, on the device."""
        found = self._calls[batch][layer]
        return Call(tuple(map(self._given, found.args)), {name: self._given(value) for name, value in found.kwargs.items()}, found.named)

    def drop(self) -> None:
        """Forget everything."""
        for key in sorted(self._keys):
            self._spill.pop(key)
        self._keys.clear()
        self._calls.clear()

    def _kept(self, value: Any, seen: dict[int, Any]) -> Any:
        """The value with its tensors replaced; objects that layers may write to stay what they are."""
        if isinstance(value, Tensor):
            if id(value) not in seen:
                seen[id(value)] = self._put(value)
            return seen[id(value)]
        return tuple(self._kept(part, seen) for part in value) if type(value) is tuple else value

    def _put(self, tensor: Tensor) -> Kept:
        plain = tensor.detach().to("cpu").contiguous()
        digest = hashlib.blake2b(raw_bytes(plain), digest_size=16).hexdigest()
        key = f"{digest} {plain.dtype} {tuple(plain.shape)}"
        if key not in self._keys:
            self._keys.add(key)
            self._spill.put(key, plain)
        return Kept(key)

    def _given(self, value: Any) -> Any:
        if isinstance(value, Kept):
            return self._spill.get(value.key, self._device)
        return tuple(map(self._given, value)) if type(value) is tuple else value
