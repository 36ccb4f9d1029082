"""Homes: weights that one layer keeps for others, and where they go when the layers move.

T5 keeps its position bias in block 0, RWKV the norm of its embeddings; Zamba keeps the blocks that its hybrid layers share in the first
of them. A new stack has such weights where its class looks for them, and nowhere else. The same for weights that a class gives to every
layer but the first, or to the last one only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from layercut.anatomy import Member, config_node
from layercut.checkpoint import Tensor
from layercut.errors import RefusedError
from layercut.stack import LayerRef
from layercut.views import View

# Weights of which every layer that uses them would have its own, if the first ones did not keep them for all.
SHARED = re.compile(r"(^|\.)((global_)?relative_attention_bias\.weight$|shared_transf(ormer)?\.)")
# The norm of the embeddings, which the first layer applies for them.
EMBEDDED = re.compile(r"(^|\.)pre_ln\.(weight|bias)$")
# An adapter of a shared block: one for every layer that uses the block, numbered by the rank of the layer among all that use one.
ADAPTER = re.compile(r"^(.*_adapter_list\.)(\d+)(\..*)$")
# Kinds of layers that use a shared block.
HYBRID = ("hybrid", "g")
# A tensor that only the last layer has, by model type. A new last layer gets one of zeros.
LAST = {"gpt_neox_japanese": "attention.dense_bias"}
# A tensor that every layer has but the first, by model type: how much of the router's state before it a layer takes. The first has none
# to take, so it gets zeros where it stands behind others, and a new first layer loses its own.
BEHIND_FIRST = {"zaya": "mlp.gate.router_states_scale"}


class Added(NamedTuple):
    """A tensor that a layer gets: its name below the layer, and the tensor that it is a copy of, or has the shape of when it is zero."""

    rest: str
    tensor: Tensor
    zero: bool = False


class Home(NamedTuple):
    """What changes for one layer of a new stack."""

    gone: frozenset[str] = frozenset()
    """Tensors that stay behind, by their name below the layer."""
    added: tuple[Added, ...] = ()


def homes(members: Mapping[str, Member], order: Sequence[LayerRef]) -> dict[int, Home]:
    """What changes, by the position in the new stack. Raises RefusedError when weights that are shared would serve other layers."""
    used = {layer.model: members[layer.model] for layer in order}
    if len(used) > 1 and any(member.stack.shared for member in used.values()):
        raise RefusedError("one set of weights serves several layers: they cannot be mixed with those of other models")
    found = {**_shared(used, order), **_embedded(used, order), **_last(used, order), **_behind_first(used, order)}
    return {at: home for at, home in found.items() if home != Home()}


def is_shared(rest: str) -> bool:
    """Whether a tensor, by its name below the layer, may belong to other layers too."""
    return any(words.search(rest) for words in (SHARED, EMBEDDED)) or rest in LAST.values() or rest in BEHIND_FIRST.values()


def _by_layer(member: Member, words: re.Pattern[str]) -> dict[int, dict[str, Tensor]]:
    """The tensors below layers that are called so, of every layer that keeps some."""
    found: dict[int, dict[str, Tensor]] = {}
    for tensor in member.checkpoint.tensors.values():
        if words.search(tensor.name):
            place = member.stack.place(tensor.name)
            if place is not None and words.search(place.rest):
                found.setdefault(place.layer, {})[place.rest] = tensor
    return found


def _users(member: Member) -> list[int]:
    """The layers that use shared weights."""
    kinds = View(member).node.get("layers_block_type")
    if isinstance(kinds, list):
        return [index for index, kind in enumerate(kinds[: member.stack.depth]) if kind in HYBRID]
    return list(range(member.stack.depth))


def _shared(members: Mapping[str, Member], order: Sequence[LayerRef]) -> dict[int, Home]:
    keepers = {alias: (_by_layer(member, SHARED), _users(member)) for alias, member in members.items()}
    sharing = {alias: (kept, users) for alias, (kept, users) in keepers.items() if 0 < len(kept) < len(users)}
    if not sharing:
        return {}
    alias = next(iter(sharing))
    if len(members) > 1:
        raise RefusedError(f"layers of '{alias}' share weights that one of them keeps: they cannot be mixed with those of other models")
    kept, users = sharing[alias]
    holders = sorted(kept)
    if holders != users[: len(holders)]:
        raise RefusedError(f"layers {holders} of '{alias}' keep weights for others, and are not the first that use them")
    ranks = {index: rank for rank, index in enumerate(users)}
    seats = [(at, ranks[layer.index]) for at, layer in enumerate(order) if layer.index in ranks]
    blocks = len(holders)
    for seat, (at, rank) in enumerate(seats):
        if seat % blocks != rank % blocks:
            raise RefusedError(
                f"layer {order[at].index} would use another of the {blocks} shared blocks: remove such layers in groups of {blocks}"
            )
    found: dict[int, Home] = {}
    for seat, (at, _) in enumerate(seats):
        gone = frozenset(kept.get(order[at].index, ()))
        added = _block(kept[holders[seat % blocks]], seats, seat, blocks) if seat < blocks else ()
        found[at] = Home(gone, added)
    return found


def _block(tensors: Mapping[str, Tensor], seats: Sequence[tuple[int, int]], seat: int, blocks: int) -> tuple[Added, ...]:
    """A shared block in its new place, its adapters numbered by the new ranks of their layers."""
    added: list[Added] = []
    ranks = {rank: [new for new, (_, old) in enumerate(seats) if old == rank and new % blocks == seat] for _, rank in seats}
    for rest, tensor in tensors.items():
        adapter = ADAPTER.match(rest)
        if adapter is None:
            added.append(Added(rest, tensor))
        else:
            added += [Added(f"{adapter[1]}{new}{adapter[3]}", tensor) for new in ranks.get(int(adapter[2]), ())]
    return tuple(added)


def _embedded(members: Mapping[str, Member], order: Sequence[LayerRef]) -> dict[int, Home]:
    """The norm of the embeddings stands in the first layer: that of the model whose embeddings these are."""
    norms = {alias: _by_layer(member, EMBEDDED) for alias, member in members.items()}
    kept = {alias: found if len(found) == 1 < members[alias].stack.depth else {} for alias, found in norms.items()}
    first = [Added(rest, tensor) for tensors in kept[order[0].model].values() for rest, tensor in tensors.items()]
    found = {at: Home(frozenset(kept[layer.model].get(layer.index, ()))) for at, layer in enumerate(order)}
    return {at: home._replace(added=() if at else tuple(first)) for at, home in found.items() if home.gone or (first and not at)}


def _own(member: Member, table: Mapping[str, str]) -> tuple[str, dict[int, Tensor]]:
    """The name below a layer that a table has for a model type, and the tensor of that name of every layer that has one."""
    kind = config_node(member.checkpoint.config, member.stack.node).get("model_type")
    rest = table.get(kind, "") if isinstance(kind, str) else ""
    places = {name: member.stack.place(name) for name in member.checkpoint.tensors} if rest else {}
    return rest, {
        place.layer: member.checkpoint.tensors[name] for name, place in places.items() if place is not None and place.rest == rest
    }


def _last(members: Mapping[str, Member], order: Sequence[LayerRef]) -> dict[int, Home]:
    """Zeros for a new last layer whose class wants a tensor that only the old one had."""
    own = {alias: _own(member, LAST) for alias, member in members.items()}
    found = {at: Home(frozenset((own[layer.model][0],))) for at, layer in enumerate(order[:-1]) if layer.index in own[layer.model][1]}
    rest, tensors = own[order[-1].model]
    if tensors and order[-1].index not in tensors:
        found[len(order) - 1] = Home(added=(Added(rest, next(iter(tensors.values())), zero=True),))
    return found


def _behind_first(members: Mapping[str, Member], order: Sequence[LayerRef]) -> dict[int, Home]:
    """Zeros for layers that were the first of their model and are not any more; a new first layer does without its tensor."""
    own = {alias: _own(member, BEHIND_FIRST) for alias, member in members.items()}
    found: dict[int, Home] = {}
    for at, layer in enumerate(order):
        rest, tensors = own[layer.model]
        if at == 0 and layer.index in tensors:
            found[at] = Home(frozenset((rest,)))
        elif at > 0 and tensors and layer.index not in tensors:
            found[at] = Home(added=(Added(rest, next(iter(tensors.values())), zero=True),))
    return found
