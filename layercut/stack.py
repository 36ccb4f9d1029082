"""The stack: which layer of which model comes next. Every edit is a new stack, and knows its seams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pydantic import FiniteFloat

from layercut.record import Record as Record


class Share(Record):
    """The part that one layer has in a weighted average."""

    model: str
    index: int
    weight: FiniteFloat


class Scaling(Record):
    """A factor for the tensors whose name in the source matches a pattern."""

    tensors: str
    """Shell-style pattern (`*`, `?`, `[...]`) for the whole name."""
    by: FiniteFloat
    """Factor; 0 writes true zeros."""


class LayerRef(Record):
    """One layer of the stack: a layer of a source model as it is, or with arithmetic."""

    model: str
    """Alias of the source model (a key of `Plan.sources`)."""
    index: int
    """Layer index in the source, from 0."""
    span: int = 1
    """Layers of the source that it stands for: it maps boundary state h_index to h_(index + span)."""
    shares: tuple[Share, ...] = ()
    """When not empty, every tensor is the weighted average of these layers."""
    scalings: tuple[tuple[Scaling, ...], ...] = ()
    """Groups of factors, applied one group after the other; in a group the first pattern that matches counts."""
    identity: bool = False
    """What it adds to the residual stream is zeroed, so that it hands on the state that it gets."""

    fitted: str | None = None
    """A map that stands in for the layers, and has to be fitted."""

    @property
    def plain(self) -> bool:
        """Whether no arithmetic is asked of the layer."""
        return not self.shares and not self.scalings and self.fitted is None


Stack = tuple[LayerRef, ...]


def models_of(layer: LayerRef) -> tuple[str, ...]:
    """The models that a layer draws on."""
    return tuple(share.model for share in layer.shares) or (layer.model,)


def blocks_of(positions: Sequence[int]) -> tuple[Block, ...]:
    """Positions as maximal blocks, in order."""
    blocks: list[Block] = []
    for position in sorted(positions):
        if blocks and blocks[-1].stop == position:
            blocks[-1] = Block(blocks[-1].start, position + 1)
        else:
            blocks.append(Block(position, position + 1))
    return tuple(blocks)


class Block(NamedTuple):
    """Consecutive positions [start, stop) of a stack."""

    start: int
    stop: int


class Boundary(NamedTuple):
    """Boundary state `h_number` of a model: the input of layer `number`, or the output of the last layer."""

    model: str
    number: int


class Joint(NamedTuple):
    """A seam of a stack: state `source` is handed to a layer that was trained on state `target`."""

    at: int
    source: Boundary
    target: Boundary


def joints(stack: Sequence[LayerRef], depths: Mapping[str, int]) -> Iterator[Joint]:
    """The seams of a stack in order. Starting above layer 0, or ending below the last layer, is a seam too.

    The embeddings are those of the first layer's model, final norm and head those of the last one's.
    """
    if not stack:
        return
    state, end = Boundary(stack[0].model, 0), Boundary(stack[-1].model, depths[stack[-1].model])
    for at, layer in enumerate(stack):
        if layer.identity:
            continue
        wanted = Boundary(layer.model, layer.index)
        if state != wanted:
            yield Joint(at, state, wanted)
        state = Boundary(layer.model, layer.index + layer.span)
    if state != end:
        yield Joint(len(stack), state, end)


class Run(NamedTuple):
    """Consecutive layers [start, stop) of one model."""

    model: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


def runs(stack: Sequence[LayerRef]) -> tuple[Run, ...]:
    """The stack as maximal slices of consecutive layers; a layer that is more than its source stands alone."""
    found: list[Run] = []
    joinable = False
    for layer in stack:
        single = layer.identity or bool(layer.shares) or layer.fitted is not None
        if found and joinable and not single and found[-1].model == layer.model and found[-1].stop == layer.index:
            found[-1] = found[-1]._replace(stop=layer.index + 1)
        else:
            found.append(Run(layer.model, layer.index, layer.index + layer.span))
        joinable = not single
    return tuple(found)
