"""Where the layers are: found from tensor names and config.json, never from a list of models."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from layercut.checkpoint import Checkpoint
from layercut.errors import CheckpointError

# Keys that hold the depth of a stack, over all model types of transformers 5.24.
DEPTH_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks", "layers",
)  # fmt: skip
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
# Words in a tensor prefix or a config path that mark a stack which is not the language stack.
OTHER_STACKS = re.compile(
    r"vision|visual|vit\b|image|audio|speech|sound|qformer|talker|mtp|depth_decoder|projector|code_predictor|token2wav|draft"
)
# Nested configs are dicts under such a key.
CONFIG_NODE = re.compile(r"[^.]*_config|decoder|encoder")
# A layer index in a tensor name.
NUMBER = "[0-9]{1,6}"
Node = tuple[str, ...]


class DepthKey(NamedTuple):
    """An integer of config.json that states a depth: the config node that holds it, its key, and its value."""

    node: Node
    key: str
    depth: int

    def __str__(self) -> str:
        return ".".join((*self.node, self.key))


class Place(NamedTuple):
    """Where a tensor of the stack belongs: its prefix, its layer index, and the rest of its name."""

    prefix: str
    layer: int
    rest: str


@dataclass(frozen=True)
class LayerStack:
    """The stack of layers of one checkpoint.

    Tensors of layer i are named `prefix + str(i) + "." + rest`. `depth` is the number of layers; `extra` is the number of
    multi-token-prediction layers stored behind them.
    """

    prefix: str
    depth: int
    depth_key: DepthKey
    aliases: tuple[DepthKey, ...] = ()
    """Other keys of the same config node that state the same depth; a stale one would win in some classes."""
    extra: int = 0

    @property
    def node(self) -> Node:
        """Path of the config node that describes the stack: () for the root."""
        return self.depth_key.node

    def place(self, name: str) -> Place | None:
        """Where a tensor belongs in the stack, or None for a tensor outside it."""
        number, _, rest = name[len(self.prefix) :].partition(".")
        if not (rest and name.startswith(self.prefix) and _is_index(number)):
            return None
        return Place(self.prefix, int(number), rest)

    def rename(self, place: Place, index: int) -> str:
        """Name of the tensor at `place` once its layer has index `index`."""
        return f"{place.prefix}{index}.{place.rest}"


class Member(NamedTuple):
    """A model that gives layers: its checkpoint and its stack."""

    checkpoint: Checkpoint
    stack: LayerStack


def config_node(config: Mapping[str, Any], node: Node) -> Mapping[str, Any]:
    """The dict of config.json at a node path."""
    for part in node:
        config = config[part]
    return config


def depth_keys(config: Mapping[str, Any], node: Node = ()) -> Iterator[DepthKey]:
    """Every integer of config.json under a name that states a depth, outer nodes first."""
    for key in DEPTH_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield DepthKey(node, key, value)
    for name, child in config.items():
        if isinstance(child, Mapping) and CONFIG_NODE.fullmatch(name) and len(node) < 4:
            yield from depth_keys(child, (*node, name))


def numbered_prefixes(names: Iterable[str]) -> dict[str, int]:
    """Prefixes that are followed by a contiguous count from 0, with the number of indices, in order of appearance.

    Only the outermost such integer of a name counts, so that the experts inside a layer are not mistaken for layers.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for position in range(len(parts) - 1):
            if _is_index(parts[position]):
                indices["".join(f"{part}." for part in parts[:position])].add(int(parts[position]))
    whole = {prefix: len(found) for prefix, found in indices.items() if max(found) == len(found) - 1}
    return {prefix: count for prefix, count in whole.items() if not any(_inside(prefix, other) for other in whole)}


def _is_index(part: str) -> bool:
    """Whether a part of a tensor name is the index of a layer: NUMBER, without the cost of a pattern for every part of every name."""
    return part.isdigit() and part.isascii() and len(part) <= 6


def _inside(prefix: str, other: str) -> bool:
    return prefix != other and re.match(re.escape(other) + r"\d+\.", prefix) is not None


def find_stack(checkpoint: Checkpoint) -> LayerStack:
    """The language stack of a checkpoint.

    It is the outermost contiguous integer position in the tensor names whose count equals a depth key of config.json (plus
    declared multi-token-prediction layers). Raises CheckpointError when there is none, or more than one.
    """
    prefixes = numbered_prefixes(checkpoint.tensors)
    keys = [key for key in depth_keys(checkpoint.config) if not OTHER_STACKS.search(".".join(key.node))]
    found: list[LayerStack] = []
    for prefix, count in prefixes.items():
        if OTHER_STACKS.search(prefix):
            continue
        match = _bind(checkpoint.config, count, keys)
        if match is not None:
            key, extra = match
            aliases = tuple(k for k in keys if k.node == key.node and k.key != key.key and k.depth == key.depth)
            found.append(LayerStack(prefix, key.depth, key, aliases, extra))
    if len(found) == 1:
        return found[0]
    place = checkpoint.folder / "config.json"
    if found:
        names = ", ".join(f"{stack.prefix}* ({stack.depth})" for stack in found)
        raise CheckpointError(
            f"several stacks of layers fit: {names}", where=place, hint="models with more than one such stack cannot be cut yet"
        )
    more = _beyond(checkpoint, prefixes, keys)
    if more is not None:
        raise CheckpointError(more, where=place, hint=f"a layer that predicts further tokens is declared by {MTP_KEYS[0]}")
    seen = ", ".join(f"{prefix}* ({count})" for prefix, count in list(prefixes.items())[:6]) or "none"
    stated = ", ".join(f"{key} = {key.depth}" for key in depth_keys(checkpoint.config)) or "none"
    raise CheckpointError(f"no layers found: numbered tensors are {seen}; depth keys are {stated}", where=place)


def _bind(config: Mapping[str, Any], count: int, keys: Iterable[DepthKey]) -> tuple[DepthKey, int] | None:
    """The depth key that explains `count` layers, and how many of them are multi-token-prediction layers."""
    for key in keys:
        if key.depth <= count <= key.depth + mtp_layers(config_node(config, key.node)):
            return key, count - key.depth
    return None


def mtp_layers(node: Mapping[str, Any]) -> int:
    """How many multi-token-prediction layers a config node declares, wherever they are stored."""
    return next((max(0, node[name]) for name in MTP_KEYS if type(node.get(name)) is int), 0)


def _beyond(checkpoint: Checkpoint, prefixes: Mapping[str, int], keys: Iterable[DepthKey]) -> str | None:
    """What to say when there are more layers than config.json speaks of, or None when that is not what is wrong."""
    for key in keys:
        for prefix, count in prefixes.items():
            if count > key.depth and not OTHER_STACKS.search(prefix):
                beyond = [name for name in checkpoint.tensors if name.startswith(f"{prefix}{key.depth}.")]
                declared = mtp_layers(config_node(checkpoint.config, key.node))
                last = f"layer {key.depth} holds {beyond[0]}" + (f" and {len(beyond) - 1} more" if len(beyond) > 1 else "")
                return f"{prefix}* holds {count} layers, but {key} is {key.depth} and {MTP_KEYS[0]} {declared or 'is not set'}: {last}"
    return None
