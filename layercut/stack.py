"""The stack: which layer of which model comes next. Every edit is a new stack, and knows its seams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

from pydantic import Field, FiniteFloat

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


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A sha256."""


class Fold(Record):
    """A linear map of what a layer adds to the residual stream, so that it stands in for removed layers as well (docs/healing.md).

    It is multiplied into the weight and bias of one module of the layer, and takes no room of its own in the model.
    """

    sha256: Digest
    """Of the file that holds the map."""
    size: Annotated[int, Field(ge=1, lt=1 << 20)]
    """Hidden size d: the map has d x d elements."""
    module: str
    """Name, in the layer, of the module whose output is mapped, for example `mlp.down_proj`."""
    columns: bool = False
    """Whether the outputs of the module are the columns of its weight, as in GPT-2; else they are the rows."""
    tokens: int
    """Tokens that it was fitted on; pads never count."""
    ridge: FiniteFloat
    """Penalty on its distance from the identity, in units of the mean square of what the module adds."""
    explained: FiniteFloat
    """Share of the squared way, from the state before the removed layers to the one behind them, that the map makes on that text."""


class Distance(Record):
    """One measured distance: mean over tokens, with its standard error over samples."""

    mean: FiniteFloat
    stderr: FiniteFloat


class Mending(Record):
    """A map that was fitted for a removed block, and how far the state there is from the one that the layer behind the block expects.

    That is the mean of |x - x_e|^2 / |x_e|^2 over the tokens of held-out text, on which the map was not fitted.
    """

    block: str
    """The positions that are removed, in the stack as the step saw it: half-open, from 0."""
    cut: Distance
    """How far it is without the map."""
    healed: Distance
    """How far it is with the map."""
    stderr: FiniteFloat
    """Standard error of the difference, from samples that are compared one by one."""
    taken: bool
    """Whether the map is part of the plan."""


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
    folds: tuple[Fold, ...] = ()
    """Maps that make it stand in for removed layers, one after the other; applied after all other arithmetic."""

    @property
    def plain(self) -> bool:
        """Whether no arithmetic is asked of the layer."""
        return not self.shares and not self.scalings and not self.folds


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
        single = layer.identity or bool(layer.shares) or bool(layer.folds)
        if found and joinable and not single and found[-1].model == layer.model and found[-1].stop == layer.index:
            found[-1] = found[-1]._replace(stop=layer.index + 1)
        else:
            found.append(Run(layer.model, layer.index, layer.index + layer.span))
        joinable = not single
    return tuple(found)
