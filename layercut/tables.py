"""Tables: tensors outside the layers that have one part a layer. In a new stack the parts stand as their layers do.

Gemma 3n and 4 keep per-layer embeddings so, ESM the weights of its contact head; a recipe may declare others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from layercut.anatomy import Member, config_node
from layercut.checkpoint import Tensor
from layercut.errors import RefusedError
from layercut.header import ITEM_BITS
from layercut.plan import Gather, Strip
from layercut.stack import LayerRef


class Table(NamedTuple):
    """A kind of table: the end of its name, the axis that the parts stand along, and the key that holds the size of a part."""

    name: re.Pattern[str]
    axis: int
    key: str


TABLES = (
    Table(re.compile(r"(^|\.)embed_tokens_per_layer\.weight$"), 1, "hidden_size_per_layer_input"),
    Table(re.compile(r"(^|\.)per_layer_model_projection\.weight$"), 0, "hidden_size_per_layer_input"),
    Table(re.compile(r"(^|\.)contact_head\.regression\.weight$"), 1, "num_attention_heads"),
)
PACKED = re.compile(r"(^|\.)(embed_tokens_per_layer|per_layer_model_projection)\.")


class Gathered(NamedTuple):
    """A table for a new stack: its shape, and where its bytes are."""

    shape: tuple[int, ...]
    gather: Gather


def gathered(tensor: Tensor, members: Mapping[str, Member], order: Sequence[LayerRef]) -> Gathered | None:
    """How a tensor outside the layers follows them; None for one that is no table.

    Raises RefusedError for a table that is packed: its parts cannot be told apart.
    """
    first = members[order[0].model]
    axis = _axis(tensor, first)
    if axis is None:
        if PACKED.search(tensor.name) and not _is_norm(tensor.name):
            raise RefusedError(
                "a table with one part a layer is quantised or of another shape: its parts cannot be told apart", where=tensor.name
            )
        return None
    strips: list[Strip] = []
    for layer in order:
        strip = _strip(layer, tensor, axis, members[layer.model])
        last = strips[-1] if strips else None
        follows = last is not None and (last.model, last.file, last.stride) == (strip.model, strip.file, strip.stride)
        if last is not None and follows and last.begin + last.width == strip.begin:
            strips[-1] = last.model_copy(update={"width": last.width + strip.width})
        else:
            strips.append(strip)
    part = tensor.shape[axis] // first.stack.depth
    shape = tuple(part * len(order) if number == axis else length for number, length in enumerate(tensor.shape))
    return Gathered(shape, Gather(dtype=tensor.dtype, rows=prod(shape[:axis]), strips=tuple(strips)))


def _axis(tensor: Tensor, member: Member) -> int | None:
    """The axis of a table along which it has one part a layer, or None."""
    declared = member.stack.declared.tables
    if tensor.name in declared and tensor.shape and tensor.shape[0] % member.stack.depth == 0:
        return 0
    node: Mapping[str, Any] = config_node(member.checkpoint.config, member.stack.node)
    table = next((table for table in TABLES if table.name.search(tensor.name)), None)
    if table is None or len(tensor.shape) <= table.axis:
        return None
    size = node.get(table.key)
    fits = isinstance(size, int) and size > 0 and tensor.shape[table.axis] == size * member.stack.depth
    return table.axis if fits else None


def _strip(layer: LayerRef, tensor: Tensor, axis: int, member: Member) -> Strip:
    """The part of one layer, in the table of its own model."""
    mine = member.checkpoint.tensors.get(tensor.name)
    depth = member.stack.depth
    if mine is None or mine.dtype != tensor.dtype or _without(mine.shape, axis) != _without(tensor.shape, axis):
        raise RefusedError(f"'{layer.model}' has no such table of one part a layer", where=tensor.name)
    bits = prod(mine.shape[axis:]) * ITEM_BITS[mine.dtype]
    if bits % (8 * depth):
        raise RefusedError(f"parts of {bits // depth} bits, which are no whole bytes, cannot be moved", where=tensor.name)
    stride = bits // 8
    width = stride // depth
    return Strip(model=layer.model, file=mine.file, begin=mine.begin + layer.index * width, stride=stride, width=width)


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _is_norm(name: str) -> bool:
    return "norm" in name
