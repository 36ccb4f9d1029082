"""Where the layers are: found from tensor names and config.json, never from a list of models.

Every numbered list of tensors whose length is stated in config.json is a stack. Names bind it to the node that describes it: words such
as `vision` or `decoder` stand in both. Where there is a choice, the language stack is meant, and of an encoder-decoder the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from layercut.anatomy import (
    DEPTH_KEYS,
    MTP_KEYS,
    NUMBER,
    OTHER_STACKS,
    TOWER_DEPTH_KEYS,
    DepthKey,
    LayerStack,
    Member,
    Node,
    Place,
    Sibling,
    config_node,
    config_nodes,
    depth_keys,
    lengths,
    mtp_layers,
    numbered_prefixes,
)
from layercut.checkpoint import Checkpoint
from layercut.declarations import NOTHING, Architecture
from layercut.errors import CheckpointError, RefusedError, did_you_mean
from layercut.exceptions import hopeless
from layercut.towers import TEXT, Role, role_of, side_of

__all__ = [
    "DEPTH_KEYS",
    "MTP_KEYS",
    "NUMBER",
    "OTHER_STACKS",
    "Architecture",
    "DepthKey",
    "LayerStack",
    "Member",
    "Place",
    "Sibling",
    "check_depths",
    "config_node",
    "depth_keys",
    "find_stack",
    "find_stacks",
    "mtp_layers",
    "numbered_prefixes",
]

# More layers than this, and than there are tensors, are no honest depth.
MOST_LAYERS = 1000
# What a list of layers is called, at the end of its prefix.
CONTAINER = re.compile(r"(^|\.|_)(layers?|h|blocks?)\.$")
# The same without a word before it: the list that the other parts of its layers go with.
PLAIN = re.compile(r"(^|\.)(layers?|h|blocks?)\.$")
# Lists beside the layers that are no parts of layers, whatever their number.
BESIDE = re.compile(r"altup_\w+|conv\w*|\w*norms?|embed\w*|\w*head\w*|experts?|\w*projector\w*|merger\w*|deepstack_\w+")
# A second list with one entry for every few layers: the list, and the key that says how many.
STRIDED = (("gated_cross_attn_layers.", "cross_layer_interval"),)
# Modules with one list of layers each that one key counts: layer i of the stack is layer i of every list.
TWINS = frozenset({"H_module", "L_module"})
# Lists of groups of weights that the layers use in turns, and the key that counts the groups: the layers are a number only.
GROUPS = (("albert_layer_groups.", "num_hidden_groups"),)
# Lists of one tensor a layer beside the list of layers, and the layer that the first of them belongs to.
BARE = (("attn_res.attn_queries.", 1), ("attn_res.mlp_queries.", 0))
# Where one key serves both sides of an encoder-decoder: a decoder whose own key is absent takes its depth from the encoder's.
FALLBACK = {"num_layers": "num_decoder_layers"}
# Model types in which the key without a side is another name of the decoder's, not of the encoder's.
DECODER_ALIAS = ("seamless_m4t", "seamless_m4t_v2")


class _Bound(NamedTuple):
    """A numbered list of tensors, the stack that its name speaks of, and the depth key that explains its length."""

    prefix: str
    length: int
    role: Role
    key: DepthKey


def find_stack(checkpoint: Checkpoint, wanted: str | None = None, declared: Architecture = NOTHING) -> LayerStack:
    """The stack of a checkpoint that is called `wanted`, or has that prefix; else its language stack.

    Raises CheckpointError when there is none, or more than one, and RefusedError for models whose layers cannot be edited.
    """
    stacks = find_stacks(checkpoint, declared)
    place = checkpoint.folder / "config.json"
    if wanted is not None:
        found = [stack for stack in stacks if wanted in names_of(stack)]
        if not found:
            listed = ", ".join(f"{stack.name} ({stack.prefix}*)" for stack in stacks) or "none"
            hint = did_you_mean(wanted, [name for stack in stacks for name in names_of(stack)])
            raise CheckpointError(f"no stack is called '{wanted}'; there are: {listed}", where=place, hint=hint)
    else:
        found = [stack for stack in stacks if stack.name in (TEXT, "encoder", "decoder")]
    for name in (TEXT, "decoder"):
        found = [stack for stack in found if stack.name == name] or found
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(f"{stack.prefix}* ({stack.depth})" for stack in found)
        hint = f"say which one is meant, for example 'stack: {found[0].prefix.rstrip('.')}'"
        raise CheckpointError(f"several stacks of layers fit: {names}", where=place, hint=hint)
    reason = hopeless(checkpoint.config)
    if reason is not None:
        raise RefusedError(reason, where=place)
    raise _nothing(checkpoint, declared)


def names_of(stack: LayerStack) -> tuple[str, ...]:
    """Every name that a recipe may call a stack by: its own, its side of an encoder-decoder, its tower, and its prefix."""
    role = role_of(stack.prefix.split("."))
    return (stack.name, *((role.side,) if role.side and role.tower == TEXT else ()), role.tower, stack.prefix.rstrip("."))


def find_stacks(checkpoint: Checkpoint, declared: Architecture = NOTHING) -> list[LayerStack]:
    """Every stack of a checkpoint whose depth its config states, in the order of the tensors."""
    check_depths(checkpoint, declared)
    return _Locator(checkpoint, declared).stacks()


def check_depths(checkpoint: Checkpoint, declared: Architecture = NOTHING) -> None:
    """Raise CheckpointError when a config asks for layers without end: its class would begin to make them."""
    for key in depth_keys(checkpoint.config, (), declared):
        if key.depth > max(MOST_LAYERS, len(checkpoint.tensors)):
            message = f"{key} is {key.depth}, and there are {len(checkpoint.tensors)} tensors"
            raise CheckpointError(message, where=checkpoint.folder / "config.json")


class _Locator:
    """Binds the numbered lists of one checkpoint to the depth keys of its config."""

    def __init__(self, checkpoint: Checkpoint, declared: Architecture) -> None:
        self.config, self.tensors, self.declared = checkpoint.config, checkpoint.tensors, declared
        self.moved = tuple(prefix if prefix.endswith(".") else f"{prefix}." for prefix in declared.prefixes)
        self.lists = {prefix: count for prefix, count in numbered_prefixes(checkpoint.tensors).items() if not declared.ignores(prefix)}
        self.roles = {prefix: role_of(prefix.split(".")) for prefix in self.lists}
        self.keys = [*depth_keys(self.config, (), declared), *lengths(self.config)]
        self.key_roles = {key: _key_role(key) for key in self.keys}
        self.paired = {"encoder", "decoder"} <= {role.side for role in self.roles.values() if role.tower == TEXT}

    def stacks(self) -> list[LayerStack]:
        bound = self._bind_all()
        groups: dict[tuple[Role, DepthKey], list[_Bound]] = {}
        for found in bound:
            groups.setdefault((found.role, found.key), []).append(found)
        joined = [stack for group in groups.values() for stack in self._join(group)]
        whole = _told_apart(_together(joined)) or self._in_groups()
        return [self._with_lists_beside(replace(stack, aliases=self._aliases(stack, joined))) for stack in whole]

    def _bind_all(self) -> list[_Bound]:
        """Every list with its key; the towers first, so that an encoder without a word for its tower takes what they leave."""
        candidates = [prefix for prefix in self.lists if prefix not in self.moved]
        towers = {p: b for p in candidates if self.roles[p].tower != TEXT and (b := self._bind(p, self.roles[p])) is not None}
        claimed = {bound.key.node for bound in towers.values()}
        texts = {p: b for p in candidates if self.roles[p].tower == TEXT and (b := self._bind_text(p, claimed)) is not None}
        if not any(bound.role.tower == TEXT for bound in texts.values()):
            texts = {**texts, **{p: b for p in candidates if (b := self._unstated(p)) is not None}}
        return [{**towers, **texts}[prefix] for prefix in candidates if prefix in towers or prefix in texts]

    def _bind_text(self, prefix: str, claimed: set[Node]) -> _Bound | None:
        role = self.roles[prefix]
        found = self._bind(prefix, role)
        if role.side != "encoder" or not self.paired or (found is not None and self.key_roles[found.key].side == "encoder"):
            return found
        for key, key_role in self.key_roles.items():  # the encoder of an image or of sound, under a plain name
            if key_role.tower in ("vision", "audio") and key.node not in claimed and key.depth == self.lists[prefix]:
                return _Bound(prefix, key.depth, Role(key_role.tower, "encoder"), key)
        return found

    def _bind(self, prefix: str, role: Role) -> _Bound | None:
        """The depth key that explains a list best, by the words that its prefix and the path of the key share."""
        count = self.lists[prefix]
        best: tuple[tuple[int, ...], DepthKey] | None = None
        for number, (key, key_role) in enumerate(self.key_roles.items()):
            explained = key.depth <= count <= key.depth + mtp_layers(config_node(self.config, key.node))
            if key_role.tower != role.tower or not explained or {key_role.side, role.side} == {"encoder", "decoder"}:
                continue
            shared = sum(word in prefix for part in key.node for word in re.split(r"_|config", part) if word)
            score = (int(key_role.side == role.side), int(key.depth == count), shared, len(key.node), -number)
            if best is None or score > best[0]:
                best = score, key
        if best is None:
            return None
        key = best[1]
        own = FALLBACK.get(key.key)
        if self.paired and role == (TEXT, "decoder") and own is not None and self.key_roles[key].side is None:
            key = DepthKey(key.node, own, count, "absent")
        return _Bound(prefix, count, role, key)

    def _unstated(self, prefix: str) -> _Bound | None:
        """A list of the language model whose config leaves the depth to the default of its class: the file shows it."""
        if self.roles[prefix].tower != TEXT or not CONTAINER.search(prefix):
            return None
        for node, values in config_nodes(self.config):
            if node and role_of(node).tower == TEXT and "model_type" in values and not any(key.node == node for key in self.keys):
                return _Bound(prefix, self.lists[prefix], self.roles[prefix], DepthKey(node, DEPTH_KEYS[0], self.lists[prefix], "absent"))
        return None

    def _join(self, group: Sequence[_Bound]) -> list[LayerStack]:
        """The stacks that lists with one role and one key make up: lists side by side move together."""
        named = sorted((found for found in group if CONTAINER.search(found.prefix)), key=lambda found: not PLAIN.search(found.prefix))
        stacks: dict[tuple[str, int], list[_Bound]] = {}
        for found in named or group:
            stacks.setdefault((_parent(found.prefix), found.length), []).append(found)
        rest = [found.prefix for found in group if named and found not in named]
        unclear = tuple(prefix for prefix in rest if not BESIDE.fullmatch(prefix.strip(".").rpartition(".")[2]))
        made: list[LayerStack] = []
        for (_, count), lists in stacks.items():
            key, role = lists[0].key, lists[0].role
            siblings = tuple(Sibling(found.prefix) for found in lists[1:])
            name = role.name if role.tower != TEXT or self.paired else TEXT
            made.append(LayerStack(lists[0].prefix, key.depth, key, (), count - key.depth, siblings, name, unclear, self.declared))
        return made

    def _in_groups(self) -> list[LayerStack]:
        """The stack whose layers share the weights of fewer groups."""
        made: list[LayerStack] = []
        for prefix, count in self.lists.items():
            for name, groups in GROUPS:
                key = next((key for key in self.keys if config_node(self.config, key.node).get(groups, 1) == count < key.depth), None)
                if prefix.endswith(name) and key is not None:
                    made.append(LayerStack(prefix, key.depth, key, declared=self.declared, shared=True))
        return made

    def _with_lists_beside(self, stack: LayerStack) -> LayerStack:
        """The stack with the lists that are declared to move with it, and those that have one entry for every few layers."""
        more = [Sibling(prefix) for prefix in self.moved if self.lists.get(prefix) in (stack.depth, stack.depth + stack.extra)]
        node = config_node(self.config, stack.node)
        for name, key in STRIDED:
            stride, prefix = node.get(key), f"{_parent(stack.prefix)}{name}"
            if type(stride) is int and stride > 1 and self.lists.get(prefix) == stack.depth // stride:
                more.append(Sibling(prefix, stride))
        for name, first in BARE:
            if f"{_parent(stack.prefix)}{name}0" in self.tensors:
                more.append(Sibling(f"{_parent(stack.prefix)}{name}", first=first, bare=True))
        return replace(stack, siblings=(*stack.siblings, *more))

    def _aliases(self, stack: LayerStack, stacks: Sequence[LayerStack]) -> tuple[DepthKey, ...]:
        """Other keys that state the depth of this stack, in its node or around it."""
        taken = {other.depth_key for other in stacks if other is not stack}
        return tuple(key for key in self.keys if key != stack.depth_key and key not in taken and self._is_alias(key, stack))

    def _is_alias(self, key: DepthKey, stack: LayerStack) -> bool:
        role, own = self.key_roles[key], self.key_roles.get(stack.depth_key) or _key_role(stack.depth_key)
        around = stack.node[: len(key.node)] == key.node
        if key.form != "number" or key.depth != stack.depth or role.tower != own.tower or not around:
            return False
        if key.node != stack.node:
            return role.side is None and own.side is None
        if role.side is not None or own.side is None:
            return role.side in (None, own.side)
        sides = {self.key_roles[other].side for other in self.keys if other.node == key.node}
        kind = config_node(self.config, key.node).get("model_type")
        owner = "decoder" if kind in DECODER_ALIAS or "encoder" not in sides else "encoder"
        return own.side == owner


def _key_role(key: DepthKey) -> Role:
    """The role of a depth key: its own word for a side comes before that of its node."""
    role = role_of(key.node)
    own = side_of((key.key,))
    return role if own is None else role._replace(side=own)


def _parent(prefix: str) -> str:
    """The prefix of the module that holds a list."""
    head, dot, _ = prefix.rstrip(".").rpartition(".")
    return head + dot


def _module(stack: LayerStack) -> str:
    """The name of the module that holds the list of a stack."""
    return stack.prefix.split(".")[-3] if stack.prefix.count(".") > 1 else ""


def _together(stacks: Sequence[LayerStack]) -> list[LayerStack]:
    """Stacks with one depth key are one stack: they have to be edited in the same way."""
    found: dict[DepthKey, LayerStack] = {}
    alone: list[LayerStack] = []
    for stack in stacks:
        first = found.setdefault(stack.depth_key, stack)
        paired = {first.name, stack.name} == {"encoder", "decoder"} or {_module(first), _module(stack)} == TWINS
        if first is not stack and paired and first.extra == stack.extra:
            merged = (*first.siblings, *(Sibling(prefix) for prefix in stack.prefixes))
            found[stack.depth_key] = replace(first, siblings=merged, name=TEXT)
        elif first is not stack:
            alone.append(stack)
    return [*found.values(), *alone]


def _told_apart(stacks: Sequence[LayerStack]) -> list[LayerStack]:
    """Where one of several language stacks is no side of an encoder-decoder, those that are go by their side."""
    sides = {stack.prefix: role_of(stack.prefix.split(".")).side for stack in stacks if stack.name == TEXT}
    if None not in sides.values():
        return list(stacks)
    return [replace(stack, name=sides.get(stack.prefix) or stack.name) for stack in stacks]


def _nothing(checkpoint: Checkpoint, declared: Architecture) -> CheckpointError:
    """What to say of a checkpoint without a language stack."""
    lists, place = numbered_prefixes(checkpoint.tensors), checkpoint.folder / "config.json"
    keys = [key for key in depth_keys(checkpoint.config, (), declared) if role_of(key.node).tower == TEXT]
    more = _beyond(checkpoint, lists, keys)
    if more is not None:
        return CheckpointError(more, where=place, hint=f"a layer that predicts further tokens is declared by {MTP_KEYS[0]}")
    seen = ", ".join(f"{prefix}* ({count})" for prefix, count in list(lists.items())[:6]) or "none"
    stated = ", ".join(f"{key} = {key.depth}" for key in depth_keys(checkpoint.config, (), declared)) or "none"
    hint = None
    known = (*DEPTH_KEYS, *TOWER_DEPTH_KEYS)
    numbers = [key for key in _numbers(checkpoint.config) if key.key not in known]
    unknown = next((str(key) for count in lists.values() for key in numbers if key.depth == count > 1), None)
    if unknown is not None and not keys:
        hint = f"if {unknown} is the number of layers, declare it: architecture: {{depth_keys: [{unknown}]}}"
    return CheckpointError(f"no layers found: numbered tensors are {seen}; depth keys are {stated}", where=place, hint=hint)


def _numbers(config: Mapping[str, Any]) -> Iterable[DepthKey]:
    """Every whole number of a config, as if it stated a depth."""
    for node, values in config_nodes(config):
        yield from (DepthKey(node, key, value) for key, value in values.items() if type(value) is int)


def _beyond(checkpoint: Checkpoint, lists: Mapping[str, int], keys: Iterable[DepthKey]) -> str | None:
    """What to say when there are more layers than config.json speaks of, or None when that is not what is wrong."""
    for key in keys:
        for prefix, count in lists.items():
            if count > key.depth and not OTHER_STACKS.search(prefix):
                beyond = [name for name in checkpoint.tensors if name.startswith(f"{prefix}{key.depth}.")]
                declared = mtp_layers(config_node(checkpoint.config, key.node))
                last = f"layer {key.depth} holds {beyond[0]}" + (f" and {len(beyond) - 1} more" if len(beyond) > 1 else "")
                return f"{prefix}* holds {count} layers, but {key} is {key.depth} and {MTP_KEYS[0]} {declared or 'is not set'}: {last}"
    return None
