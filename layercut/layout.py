"""The layout of an output: which tensor stands in which file at which place, in natural layer order. Moves no bytes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

from layercut.amends import Change, changes, hindrance, told
from layercut.architecture import LayerStack, Member, Place
from layercut.checkpoint import Checkpoint, Tensor
from layercut.ends import Ends, Outside, outside
from layercut.errors import RefusedError
from layercut.header import FLOATS
from layercut.homes import Home, homes
from layercut.plan import Band, Grown, LeftOut, Map, OutputFile, Part, TensorCopy, TensorMade
from layercut.scalings import Groups, factors
from layercut.shards import Entry, Grid, index_text, shard
from layercut.stack import LayerRef, Share
from layercut.tables import Gathered, gathered


class Cast(NamedTuple):
    """Dtypes (as in safetensors headers) that floating-point tensors are computed in and written in; None keeps theirs."""

    compute: str | None = None
    write: str | None = None


class Layout(NamedTuple):
    """The files of an output, the text of their index when there are several, and what does not reach them."""

    files: tuple[OutputFile, ...]
    index_text: str | None
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()


def layer_tensors(checkpoint: Checkpoint, stack: LayerStack) -> Mapping[int, tuple[Tensor, ...]]:
    """The tensors of every layer, each in the order of its bytes; of layers that share their weights, none."""
    layers: dict[int, list[Tensor]] = defaultdict(list, {index: [] for index in range(stack.depth)} if stack.shared else {})
    for tensor in checkpoint.tensors.values():
        place = stack.place(tensor.name)
        if place is not None:
            layers[place.layer].append(tensor)
    return {index: tuple(found) for index, found in sorted(layers.items())}


class Layouter:
    """Places every tensor of a stack. `grids` are what copies from each member have to be in step with."""

    def __init__(
        self,
        members: Mapping[str, Member],
        order: Sequence[LayerRef],
        cast: Cast = Cast(),  # noqa: B008
        grids: Mapping[str, Grid] = MappingProxyType({}),
    ) -> None:
        self.members, self.order, self.cast, self.grids = members, order, cast, grids
        self.layers = {alias: layer_tensors(*member) for alias, member in members.items()}
        self.unchanged = [layer.index for layer in order] == list(range(self._stack(0).depth))
        self.homes = {} if self._is_whole() else homes(members, order)
        self.changes = {} if hindrance(members, order) is not None else changes(members, order)

    def lay_out(self, ends: Ends, max_shard_size: int, scalings: tuple[Groups, Groups] = ((), ())) -> Layout:
        """Files of at most `max_shard_size` bytes of tensors.

        `scalings` are the factors for what stands before and behind the layers. Raises RefusedError when two tensors would get
        one name, or when arithmetic is asked of a tensor that is not floating-point.
        """
        whole = self._is_whole()
        entries = list(self._outside(ends.before, scalings[0]))
        for position, layer in enumerate(self.order):
            entries += self._layer(layer, position)
        if whole:  # an unchanged stack keeps its multi-token-prediction layers where they are
            extra = [t for index, found in self.layers[self.order[0].model].items() if index >= len(self.order) for t in found]
            entries += [self._entry(tensor.name, (tensor,), (self._whole(self.order[0].model),), ()) for tensor in extra]
        entries += self._outside(ends.behind, scalings[1])
        twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
        if twice:
            raise RefusedError("the output would hold this tensor twice", where=twice[0])
        metadata = dict(self.members[self.order[0].model].checkpoint.metadata) or {"format": "pt"}
        files = tuple(shard(entries, max_shard_size, metadata, self.grids))
        return Layout(files, index_text(files), () if whole else tuple(self._left_out(ends)), tuple(self._notes(entries)))

    def _notes(self, entries: Sequence[Entry]) -> list[str]:
        """What is said of layers that are changed to make up for their new place."""
        if not self.changes:
            return []
        wanted = {self._stack(at).rename(place, at) for at in self.changes for place in self._places(at) if place.rest in self.changes[at]}
        return told(self.members, self.order, [entry.dtype for entry in entries if entry.name in wanted])

    def _places(self, position: int) -> Iterator[Place]:
        layer = self.order[position]
        for tensor in self.layers[layer.model][layer.index]:
            place = self._stack(position).place(tensor.name)
            if place is not None:
                yield place

    def _is_whole(self) -> bool:
        """Whether the stack is that of its only model."""
        return len(self.members) == 1 and self.unchanged

    def _stack(self, position: int) -> LayerStack:
        return self.members[self.order[position].model].stack

    @staticmethod
    def _whole(model: str) -> Share:
        return Share(model=model, index=0, weight=1)

    def _outside(self, parts: Sequence[Outside], scalings: Groups) -> Iterator[Entry]:
        for part in parts:
            table = None if self._is_whole() else gathered(part.tensor, self.members, self.order)
            if table is not None:
                yield self._table(part, table, factors(scalings, part.tensor.name))
                continue
            yield self._entry(part.name, (part.tensor,), (self._whole(part.model),), factors(scalings, part.tensor.name))

    def _layer(self, layer: LayerRef, position: int) -> Iterator[Entry]:
        stack = self.members[layer.model].stack
        if stack.shared and not layer.plain:
            raise RefusedError(
                "one set of weights serves several layers: none of them can be changed by itself", where=f"layer {layer.index}"
            )
        shares = layer.shares or (Share(model=layer.model, index=layer.index, weight=1),)
        tables = [self._by_rest(share.model, share.index) for share in shares]
        for part in sorted({part for table in tables for part in table}):
            if not all(part in table for table in tables):
                raise RefusedError("layers cannot be averaged when only some of them have a tensor", where=part[1])
        home = self.homes.get(position, Home())
        mapped = set[str]()
        for tensor in self.layers[layer.model][layer.index]:
            place = stack.place(tensor.name)
            assert place is not None
            if place.rest in home.gone:
                continue
            key = (place.prefix, place.rest)
            kinds = sorted({f"{table[key].dtype} {list(table[key].shape)}" for table in tables})
            if len(kinds) > 1:
                raise RefusedError(f"tensors of different kinds cannot be averaged: {' and '.join(kinds)}", where=tensor.name)
            by = factors(layer.scalings, tensor.name)
            name, change = stack.rename(place, position), self.changes.get(position, {}).get(place.rest)
            maps = _maps(layer, tensor, place, change) if place.prefix == stack.prefix else ()
            mapped |= {one.sha256 for one in maps}
            if change is None:
                yield self._entry(name, [table[key] for table in tables], shares, by, maps=maps)
            elif change.along is None:
                yield self._changed(name, [table[key] for table in tables], shares, by, change)
            else:
                other = tables[0][(place.prefix, change.along)]
                if layer.shares or by or factors(layer.scalings, other.name):
                    message = "this tensor makes up for the new index of its layer, and cannot be averaged or scaled too"
                    raise RefusedError(message, where=tensor.name)
                pair = (*shares, shares[0].model_copy(update={"weight": 0}))
                yield self._entry(name, [tensor, other], pair, (), Grown(by=change.by))
        lost = next((fold for fold in layer.folds if fold.sha256 not in mapped), None)
        if lost is not None:
            raise RefusedError(f"layer {layer.index} of {layer.model} has no {lost.module} of its own: no map can be folded into it")
        for rest, tensor, zero in home.added:
            name = stack.rename(Place(stack.prefix, 0, rest), position)
            by = (0.0,) if zero else factors(layer.scalings, tensor.name)
            yield self._entry(name, (tensor,), (self._whole(layer.model),), by)

    def _changed(self, name: str, tensors: Sequence[Tensor], shares: Sequence[Share], by: tuple[float, ...], change: Change) -> Entry:
        """A tensor that is multiplied, as a whole or in the first columns of its rows."""
        if change.columns == 1:
            return self._entry(name, tensors, shares, (*by, change.by))
        row = tensors[0].shape[-1] if tensors[0].shape else 0
        if row == 0 or row % change.columns:
            message = f"a row of {row} elements has no {change.columns} equal parts, of which one makes up for the new index of its layer"
            raise RefusedError(message, where=tensors[0].name)
        return self._entry(name, tensors, shares, by, Band(by=change.by, row=row, stop=row // change.columns))

    def _by_rest(self, model: str, index: int) -> dict[tuple[str, str], Tensor]:
        stack = self.members[model].stack
        found = ((stack.place(tensor.name), tensor) for tensor in self.layers[model][index])
        return {(place.prefix, place.rest): tensor for place, tensor in found if place is not None}

    def _entry(
        self,
        name: str,
        tensors: Sequence[Tensor],
        shares: Sequence[Share],
        by: tuple[float, ...],
        amend: Band | Grown | None = None,
        maps: tuple[Map, ...] = (),
    ) -> Entry:
        """One tensor of the output: a copy where its bytes stay what they are, else arithmetic."""
        first = tensors[0]
        floating = first.dtype in FLOATS
        write = (self.cast.write or self.cast.compute or first.dtype) if floating else first.dtype
        compute = self.cast.compute if floating and self.cast.compute != first.dtype else None
        if len(tensors) == 1 and not by and not maps and amend is None and write == first.dtype and compute is None:
            return _copy(name, first, shares[0].model)
        if not floating:
            raise RefusedError(f"arithmetic on {first.dtype} is refused: quantised weights are not what they say", where=first.name)
        parts = tuple(_part(share, tensor) for share, tensor in zip(shares, tensors, strict=True))
        if 0.0 in by:
            return TensorMade(name=name, dtype=write, shape=first.shape, parts=())
        made = {"factors": by, "compute": compute, "amend": amend, "maps": maps}
        return TensorMade(name=name, dtype=write, shape=first.shape, parts=parts, **made)

    def _table(self, part: Outside, table: Gathered, by: tuple[float, ...]) -> TensorMade:
        """A tensor with one part a layer, for the new stack."""
        dtype = part.tensor.dtype
        floating = dtype in FLOATS
        if by and not floating:
            raise RefusedError(f"arithmetic on {dtype} is refused: quantised weights are not what they say", where=part.tensor.name)
        write = (self.cast.write or self.cast.compute or dtype) if floating else dtype
        compute = self.cast.compute if floating and self.cast.compute != dtype else None
        return TensorMade(name=part.name, dtype=write, shape=table.shape, parts=(), factors=by, compute=compute, gather=table.gather)

    def _left_out(self, ends: Ends) -> Iterator[LeftOut]:
        kept = {(share.model, share.index) for layer in self.order for share in (layer.shares or (layer,))}
        written = {(part.model, part.tensor.name) for part in (*ends.before, *ends.behind)}
        for alias, (checkpoint, stack) in self.members.items():
            reasons = [(index, _reason(alias, index, stack, kept)) for index in self.layers[alias]]
            for reason, group in groupby(reasons, key=lambda pair: pair[1]):
                indices = [index for index, _ in group]
                if reason is not None:
                    yield LeftOut(model=alias, what=self._what(alias, indices), reason=reason)
            for part in (part for parts in outside(checkpoint, stack) for part in parts):
                if (alias, part.name) not in written:
                    yield LeftOut(model=alias, what=part.name, reason="embeddings and head come from the ends of the stack")

    def _what(self, alias: str, indices: Sequence[int]) -> str:
        count = sum(len(self.layers[alias][index]) for index in indices)
        name = f"layer {indices[0]}" if len(indices) == 1 else f"layers {indices[0]} to {indices[-1]}"
        return f"{name} ({count} tensor{'s' * (count > 1)}, {self.members[alias].stack.prefix}*)"


def _maps(layer: LayerRef, tensor: Tensor, place: Place, change: Change | None) -> tuple[Map, ...]:
    """The maps of a layer that go into this tensor of it. Raises RefusedError where it is not of a shape that they fit."""
    found = [one for one in layer.folds if place.rest in (f"{one.module}.weight", f"{one.module}.bias")]
    if found and change is not None:
        raise RefusedError("this tensor makes up for the new index of its layer: no map can be folded into it", where=tensor.name)
    for one in found:
        wide = len(tensor.shape) - 1 if one.columns else 0
        if len(tensor.shape) not in (1, 2) or tensor.shape[wide] != one.size:
            raise RefusedError(f"no map of size {one.size} can be folded into shape {list(tensor.shape)}", where=tensor.name)
    return tuple(Map(sha256=one.sha256, size=one.size, columns=one.columns or len(tensor.shape) == 1) for one in found)


def _copy(name: str, tensor: Tensor, model: str) -> TensorCopy:
    return TensorCopy(name=name, dtype=tensor.dtype, shape=tensor.shape, model=model, file=tensor.file, begin=tensor.begin, end=tensor.end)


def _part(share: Share, tensor: Tensor) -> Part:
    return Part(model=share.model, file=tensor.file, begin=tensor.begin, end=tensor.end, dtype=tensor.dtype, weight=share.weight)


def _reason(alias: str, index: int, stack: LayerStack, kept: set[tuple[str, int]]) -> str | None:
    if index >= stack.depth:
        return "multi-token-prediction layer: the library reads it at one fixed index only"
    return None if (alias, index) in kept else "not in the stack that the recipe asks for"
