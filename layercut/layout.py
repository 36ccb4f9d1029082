"""The layout of an output: which tensor stands in which file at which place, in natural layer order. Moves no bytes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from layercut.architecture import LayerStack, Member
from layercut.checkpoint import Checkpoint, Tensor
from layercut.errors import RefusedError
from layercut.header import ITEM_BITS
from layercut.plan import LeftOut, OutputFile, TensorCopy
from layercut.stack import LayerRef

# Words in the name of a tensor outside the stack that put it behind the last layer: final norm and heads.
BEHIND = re.compile(
    r"(^|[._])(norm|norm_?f|ln_?f|final_\w*norm|layer_?norm|lm_head|head|embed_out|score|classifier|pooler|project_out|cls|output)([._]|$)"
)
EMBEDDING = re.compile(r"(^|[._])(embeddings|embed(?!_out)|wte|wpe)[._]")
WEIGHTS = "model.safetensors"


class Layout(NamedTuple):
    """The files of an output, the text of their index when there are several, and what does not reach them."""

    files: tuple[OutputFile, ...]
    index_text: str | None
    left_out: tuple[LeftOut, ...]


class Parts(NamedTuple):
    """The tensors of a checkpoint by where they belong."""

    before: tuple[Tensor, ...]
    layers: Mapping[int, tuple[Tensor, ...]]
    behind: tuple[Tensor, ...]


def split(checkpoint: Checkpoint, stack: LayerStack) -> Parts:
    """Sort the tensors of a checkpoint, each group in the order of its bytes."""
    before: list[Tensor] = []
    behind: list[Tensor] = []
    layers: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        place = stack.place(tensor.name)
        if place is not None:
            layers[place.layer].append(tensor)
        elif BEHIND.search(tensor.name) and not EMBEDDING.search(tensor.name):
            behind.append(tensor)
        else:
            before.append(tensor)
    return Parts(tuple(before), {index: tuple(found) for index, found in sorted(layers.items())}, tuple(behind))


def lay_out(members: Mapping[str, Member], order: Sequence[LayerRef], max_shard_size: int) -> Layout:
    """Place every tensor of the stack `order`.

    What stands before the layers comes from the model of the first layer, what stands behind them from the model of the last.
    Raises RefusedError when two tensors would get one name.
    """
    parts = {alias: split(member.checkpoint, member.stack) for alias, member in members.items()}
    first, last = order[0].model, order[-1].model
    whole = len(members) == 1 and [layer.index for layer in order] == list(range(members[first].stack.depth))
    entries = [_copy(tensor.name, tensor, first) for tensor in parts[first].before]
    for position, layer in enumerate(order):
        entries += _layer(members[layer.model].stack, parts[layer.model], layer, position)
    if whole:  # an unchanged stack keeps its multi-token-prediction layers where they are
        entries += [_copy(t.name, t, first) for index, found in parts[first].layers.items() if index >= len(order) for t in found]
    entries += [_copy(tensor.name, tensor, last) for tensor in parts[last].behind]
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedError("the output would hold this tensor twice", where=twice)
    left_out = [] if whole else list(_left_out(members, parts, order))
    metadata = dict(members[first].checkpoint.metadata) or {"format": "pt"}
    files = tuple(_shard(entries, max_shard_size, metadata))
    return Layout(files, _index(files), tuple(left_out))


def _layer(stack: LayerStack, parts: Parts, layer: LayerRef, position: int) -> Iterator[TensorCopy]:
    for tensor in parts.layers[layer.index]:
        place = stack.place(tensor.name)
        assert place is not None
        yield _copy(stack.rename(place, position), tensor, layer.model)


def _copy(name: str, tensor: Tensor, model: str) -> TensorCopy:
    return TensorCopy(name=name, dtype=tensor.dtype, shape=tensor.shape, model=model, file=tensor.file, begin=tensor.begin, end=tensor.end)


def _left_out(members: Mapping[str, Member], parts: Mapping[str, Parts], order: Sequence[LayerRef]) -> Iterator[LeftOut]:
    kept = {(layer.model, layer.index) for layer in order}
    for alias, member in members.items():
        for index, tensors in parts[alias].layers.items():
            what = f"layer {index} ({len(tensors)} tensor{'s' * (len(tensors) > 1)}, {member.stack.prefix}{index}.*)"
            if index >= member.stack.depth:
                yield LeftOut(model=alias, what=what, reason="multi-token-prediction layer: the library reads it at one fixed index only")
            elif (alias, index) not in kept:
                yield LeftOut(model=alias, what=what, reason="not in the stack that the recipe asks for")
        for group, giver in ((parts[alias].before, order[0].model), (parts[alias].behind, order[-1].model)):
            if alias != giver:
                yield from (LeftOut(model=alias, what=t.name, reason=f"taken from '{giver}'") for t in group)


def _shard(entries: Sequence[TensorCopy], limit: int, metadata: dict[str, str]) -> Iterator[OutputFile]:
    """Fill files in order up to `limit` bytes of tensors; a larger tensor gets a file of its own."""
    groups: list[list[TensorCopy]] = []
    room = 0
    for entry in entries:
        size = entry.end - entry.begin
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= size
    for number, group in enumerate(groups, 1):
        name = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        yield OutputFile(name=name, metadata=metadata, tensors=tuple(_aligned(group)))


def _aligned(group: list[TensorCopy]) -> list[TensorCopy]:
    """Natural order; where that would put a tensor at an address that its dtype cannot be read from, the widest dtypes come first."""
    position = 0
    for entry in group:
        if position % max(1, ITEM_BITS[entry.dtype] // 8):
            return sorted(group, key=lambda e: -ITEM_BITS[e.dtype])
        position += entry.end - entry.begin
    return group


def _index(files: Sequence[OutputFile]) -> str | None:
    if len(files) == 1:
        return None
    names = {tensor.name: file.name for file in files for tensor in file.tensors}
    size = sum(tensor.end - tensor.begin for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}, indent=2) + "\n"
