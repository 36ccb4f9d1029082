"""The relay: models that do not fit run as any stacks of their layers, each layer read once for all stacks and batches.

It goes up the layers, and takes along every state that waits for the one that is loaded. Stacks in which a layer comes after a
later one (repeated, reordered) need more than one round. Between layers states wait in memory, or in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from layercut.arguments import Arguments
from layercut.crossings import Crossing, States, Take
from layercut.errors import CalibrationError
from layercut.loading import quiet
from layercut.memory import Room, give_back, shown
from layercut.resident import padded
from layercut.routes import Node, Order
from layercut.skeleton import Skeleton
from layercut.spill import Spill
from layercut.stack import LayerRef
from layercut.standins import Call
from layercut.targets import outputs_of
from layercut.tokens import Sample

LOGIT_COPIES = 3
"""Logits of a batch that are there at once: as the model gives them, and what the loss makes of them."""
HEARD = "heard"
"""Begins the keys of what modules give."""
Batch = Sequence[Sample]
End = Callable[[int, Batch, Tensor], None]
"""Takes the number of a stack, a batch, and the logits of its last model: (samples, tokens, vocabulary)."""
Made = Callable[[LayerRef], nn.Module]
"""Makes a layer that is not as its model has it."""
Look = Callable[[str, Sequence[Call]], None]
"""Takes the alias of a model, and the calls of its layers for a batch."""


class Place(NamedTuple):
    """Where memory is."""

    device: torch.device
    room: Room
    """For weights, on the device."""
    host: Room
    """For states, beside it; the same on a CPU."""
    folder: Path
    """For states that do not fit into either."""


class Waiting(NamedTuple):
    """A state that waits for a layer."""

    key: int
    node: Node
    """What the layer leads to."""


class Relay:
    """Skeletons with their heads, by the alias of the model."""

    def __init__(self, skeletons: Mapping[str, Skeleton], place: Place, look: Look = lambda alias, calls: None) -> None:
        """`look` sees how the layers of a model are called, and may refuse it.

        Raises CalibrationError when the user asked for less memory than what is loaded at once.
        """
        self._skeletons, self._place, self._look = dict(skeletons), place, look
        self.progress = False
        """Whether a bar on stderr shows how far a run is."""
        for alias, skeleton in self._skeletons.items():
            self._check(f"model '{alias}' takes {{}} for what is loaded of it at once", _fixed(skeleton), "give more with --memory")

    def _check(self, message: str, needed: int, hint: str) -> None:
        room = self._place.room
        if room.asked and needed > room.size:
            raise CalibrationError(f"{message.format(shown(needed))}, and {shown(room.size)} are left ({room.reason})", hint=hint)

    def limit(self, size: int) -> int:
        """Bytes that the logits of a batch of several samples should take: `size`, or a sixteenth of the room where that is less."""
        return min(size, self._place.room.size // 16)

    def run(self, orders: Sequence[Order], batches: Sequence[Batch], end: End, made: Made | None = None) -> None:
        """Run every stack over every batch. `made` gives the layers that are not as their model has them.

        Raises CalibrationError when memory does not do, and RefusedError when a model cannot be followed layer by layer.
        """
        if not batches:
            return
        for alias, skeleton in self._skeletons.items():
            logits = LOGIT_COPIES * max(map(_area, batches)) * skeleton.logit_size
            hint = "give more with --memory, or lower batch_size or max_length"
            self._check(f"model '{alias}' takes {{}} with its predictions of a batch", skeleton.rest_peak + logits, hint)
        with self._spill(len(orders), batches) as spill:
            _Run(self._skeletons, self._place.device, spill, orders, batches, self._look, made).run(end, self.progress)

    def cross(self, crossing: Crossing, batches: Sequence[Batch], take: Take, made: Made | None = None) -> None:
        """Give the states of every batch at a seam. Layers are read once for all batches, up to the seam, and no head.

        Raises as `run` does.
        """
        if not batches:
            return
        orders = [Order.of(crossing.given), Order.of(crossing.wanted)]
        with self._spill(len(orders) + 1, batches) as spill:
            run = _Run(self._skeletons, self._place.device, spill, orders, batches, self._look, made, crossing.module)
            run.cross(take, self.progress)

    @contextmanager
    def _spill(self, states: int, batches: Sequence[Batch]) -> Iterator[Spill]:
        """Where states wait, so many for each batch."""
        try:
            with Spill(self._spare(batches), self._place.folder, self._expected(states, batches)) as spill, quiet():
                yield spill
        except torch.OutOfMemoryError:
            raise CalibrationError(f"out of memory on {self._place.device}", hint="lower batch_size or max_length") from None

    def _spare(self, batches: Sequence[Batch]) -> int:
        """Bytes of memory for states that wait."""
        widest = max(map(_area, batches))
        taken = max(
            max(skeleton.layer_peak + skeleton.activations(widest), skeleton.rest_peak + LOGIT_COPIES * widest * skeleton.logit_size)
            for skeleton in self._skeletons.values()
        )
        return max(0, self._place.host.size - (0 if self._place.device.type == "cuda" else taken)) // 2

    def _expected(self, states: int, batches: Sequence[Batch]) -> int:
        """Bytes of all states that wait at once, at most: so many of each batch, and the first ones may wait for a later round."""
        widest = max(skeleton.hidden * skeleton.dtype.itemsize for skeleton in self._skeletons.values())
        return (states + len(self._skeletons)) * widest * sum(map(_area, batches))


class _Run:
    """One run. A state has the number of its node as its key, and that of its batch."""

    def __init__(
        self,
        skeletons: Mapping[str, Skeleton],
        device: torch.device,
        spill: Spill,
        orders: Sequence[Order],
        batches: Sequence[Batch],
        look: Look,
        made: Made | None,
        heard: str | None = None,
    ) -> None:
        """`heard` is the module, in the last layer of the first stack, whose outputs are kept."""
        self._skeletons, self._device, self._spill, self._batches, self._made = skeletons, device, spill, batches, made
        self._orders, self._look, self._heard = orders, look, heard
        self._arguments = {alias: Arguments(spill, device) for alias in skeletons}
        self._waiting: dict[LayerRef, list[Waiting]] = {}
        self._needed: dict[int, int] = {}
        """How often a state is still to be used, by its key."""
        self._ends: list[tuple[int, int]] = []
        """Stacks that are through, and the keys of their last states."""
        self._keys = 0

    def run(self, end: End, progress: bool) -> None:
        """Take all stacks to their ends, and through the heads of their last models."""
        self._climb(progress)
        for alias, skeleton in self._skeletons.items():
            self._finish(alias, skeleton, end)

    def cross(self, take: Take, progress: bool) -> None:
        """Take two stacks to their ends."""
        self._climb(progress)
        (_, key), (_, aim) = sorted(self._ends)
        for number, batch in enumerate(self._batches):
            state = self._spill.get((key, number), self._device)
            added = self._spill.pop((HEARD, number), self._device)
            take(batch, States(added.reshape(state.shape), state, self._spill.get((aim, number), self._device)))

    def _climb(self, progress: bool) -> None:
        roots = Node.of(self._orders)
        total = sum(root.steps for root in roots.values())
        for alias, skeleton in self._skeletons.items():
            self._begin(alias, skeleton, roots.get(alias))
        index, aliases = 0, list(self._skeletons)
        with tqdm(total=total, desc="layer by layer", unit="layer", disable=not progress, leave=False) as bar:
            while self._waiting:
                layer = min(self._waiting, key=lambda one: (one.index < index, one.index, aliases.index(one.model)))
                index, waiting = layer.index, self._waiting.pop(layer)
                self._step(layer, waiting)
                give_back()
                bar.update(len(waiting))

    def _begin(self, alias: str, skeleton: Skeleton, root: Node | None) -> None:
        """Read all batches up to the first layer."""
        key = self._arrived(root) if root is not None else None
        with skeleton.rest():
            for number, batch in enumerate(self._batches):
                state, calls = skeleton.record(*self._inputs(batch))
                self._look(alias, calls)
                self._arguments[alias].keep(number, calls)
                if key is not None:
                    self._spill.put((key, number), state)

    def _step(self, layer: LayerRef, waiting: Sequence[Waiting]) -> None:
        """Take all states that wait for a layer through it."""
        skeleton = self._skeletons[layer.model]
        if layer.plain:
            with skeleton.layer(layer.index) as module:
                self._through(layer, module, skeleton, waiting)
        else:
            assert self._made is not None
            self._through(layer, self._made(layer), skeleton, waiting)

    @torch.inference_mode()
    def _through(self, layer: LayerRef, module: nn.Module, skeleton: Skeleton, waiting: Sequence[Waiting]) -> None:
        for before, node in waiting:
            key = self._arrived(node)
            for number in range(len(self._batches)):
                state = self._spill.get((before, number), self._device)
                state = state.clone() if self._needed[before] > 1 else state  # a layer may change its input in place
                call = self._arguments[layer.model].call(number, layer.index)
                with self._hearing(node, module, number):
                    state = skeleton.output(call, module, state.to(skeleton.dtype))
                self._spill.put((key, number), state)
            self._used(before)

    @contextmanager
    def _hearing(self, node: Node, module: nn.Module, number: int) -> Iterator[None]:
        """Keep what the module that is heard gives, where the layer is the last one of the first stack."""
        if self._heard is None or 0 not in node.ends:
            yield
            return
        with outputs_of(module.get_submodule(self._heard)) as outs:
            yield
        self._spill.put((HEARD, number), outs[0])

    def _arrived(self, node: Node) -> int:
        """A key for the states of a node: those that follow it wait for their layers."""
        key = self._keys = self._keys + 1
        for layer, child in node.children.items():
            self._waiting.setdefault(layer, []).append(Waiting(key, child))
        self._ends += [(number, key) for number in node.ends]
        self._needed[key] = len(node.children) + len(node.ends)
        return key

    def _used(self, key: int) -> None:
        self._needed[key] -= 1
        if not self._needed[key]:
            for number in range(len(self._batches)):
                self._spill.pop((key, number))

    def _finish(self, alias: str, skeleton: Skeleton, end: End) -> None:
        """What the model makes of the last states of the stacks that end in it."""
        own = [(number, key) for number, key in self._ends if self._orders[number].last == alias]
        if not own:
            return
        with skeleton.rest():
            for number, key in own:
                for at, batch in enumerate(self._batches):
                    state = self._spill.get((key, at), self._device).clone()
                    with torch.inference_mode():  # not while weights are loaded: tensors that are made in it cannot take their places
                        logits: Tensor = skeleton.finish(*self._inputs(batch), state.to(skeleton.dtype)).logits
                        end(number, batch, logits)
                self._used(key)

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, mask = padded(batch)
        return ids.to(self._device), mask.to(self._device)


def _fixed(skeleton: Skeleton) -> int:
    """Bytes that are taken at once, whatever the samples: what is in no layer, head included, or a layer while it is loaded."""
    return max(skeleton.rest_peak, skeleton.layer_peak)


def _area(batch: Batch) -> int:
    """Tokens of a batch, pads included."""
    return len(batch) * max(len(sample.ids) for sample in batch)
