"""Crossings: what happens to the states of a batch where two stacks part: what goes into the seam, and what is expected behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from layercut.players import Player, Recorded
from layercut.resident import padded
from layercut.stack import LayerRef, Stack
from layercut.targets import outputs_of
from layercut.tokens import Sample

AtHand: TypeAlias = Callable[[LayerRef], AbstractContextManager[nn.Module]]
"""Gives a layer as a stack has it, with its weights in memory."""


class States(NamedTuple):
    """States of a batch, (samples, tokens, d) each; of different d where two models meet."""

    added: Tensor
    """What a module of the last layer before the seam adds to the stream."""
    state: Tensor
    """What leaves that layer."""
    aim: Tensor
    """What leaves the layers that it is to stand in for."""


Take: TypeAlias = Callable[[Sequence[Sample], States], None]
"""Takes a batch with its states."""


class Crossing(NamedTuple):
    """Two stacks, which both begin at the embeddings."""

    given: Stack
    """Ends in front of the seam."""
    wanted: Stack
    """Ends with the state that is expected behind it."""
    module: str
    """Name, in the last layer of `given`, of the module whose outputs are wanted too."""

    @torch.inference_mode()
    def states(self, batch: Sequence[Sample], players: Mapping[str, Player], at_hand: AtHand, device: torch.device) -> States:
        """The states of a batch, by models in memory. What the stacks have in common at their beginning runs once."""
        ids, mask = (tensor.to(device) for tensor in padded(batch))
        recorded = {alias: player.record(ids, mask) for alias, player in players.items()}
        last = self.given[-1]
        own, other = (tuple(layer for layer in stack if not layer.identity) for stack in (self.given[:-1], self.wanted))
        alike = next((at for at, (one, two) in enumerate(zip(own, other, strict=False)) if one != two), min(len(own), len(other)))
        state = _through(recorded[self.given[0].model].state.clone(), own[:alike], recorded, at_hand)
        aim = state.clone()
        state = _through(state, own[alike:], recorded, at_hand)
        with at_hand(last) as module, outputs_of(module.get_submodule(self.module)) as outs:
            state = recorded[last.model].run(last.index, module, state).clone()
        return States(outs[0].reshape(state.shape), state, _through(aim, other[alike:], recorded, at_hand))


def _through(state: Tensor, layers: Stack, recorded: Mapping[str, Recorded], at_hand: AtHand) -> Tensor:
    for layer in layers:
        with at_hand(layer) as module:
            state = recorded[layer.model].run(layer.index, module, state)
    return state
