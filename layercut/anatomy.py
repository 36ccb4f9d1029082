"""The parts of a checkpoint that the locator speaks of: numbered lists of tensors, config nodes, depth keys, and stacks of layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from layercut.checkpoint import Checkpoint
from layercut.declarations import NOTHING, Architecture
from layercut.towers import OTHER_STACKS as OTHER_STACKS

# Keys that hold the depth of a stack, over all model types of transformers 5.24.
DEPTH_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "num_blocks", "layers", "decoder_num_hidden_layers", "encoder_num_hidden_layers",
    "num_layers_per_stack", "num_self_attends_per_block",
)  # fmt: skip
LOOPS = {"num_blocks": "num_self_attends_per_block"}
"""Keys that count how often the layers run, where another key counts the layers."""
TOWER_DEPTH_KEYS = ("depth", "n_blocks")
"""More such keys, which hold the depth of towers but mean other things in language models."""
LENGTH_KEYS = ("layers_block_type", "hybrid_override_pattern")
"""Keys with one entry a layer, whose length is the depth where no key states it."""
MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
# Nested configs are dicts under such a key.
CONFIG_NODE = re.compile(r"[^.]*_config|[^.]*decoder|[^.]*encoder")
# A layer index in a tensor name.
NUMBER = "[0-9]{1,6}"
Node = tuple[str, ...]


class DepthKey(NamedTuple):
    """A value of config.json that states a depth: the config node that holds it, its key, and the depth.

    `form` is `number`; `absent` for a key that has to be written, because the class has a default for it; `length` for a value
    with one entry a layer; or `pairs` for a number that counts the attention and the MLP of a layer apart.
    """

    node: Node
    key: str
    depth: int
    form: str = "number"

    def __str__(self) -> str:
        return ".".join((*self.node, self.key))

    def spelled(self, depth: int) -> int:
        """What the key holds for a stack of so many layers."""
        return 2 * depth if self.form == "pairs" else depth


class Place(NamedTuple):
    """Where a tensor of the stack belongs: its prefix, its layer index, and the rest of its name."""

    prefix: str
    layer: int
    rest: str


class Sibling(NamedTuple):
    """Another numbered list that moves with the layers: its entry j belongs to layer `first + j * stride`.

    The entries of a bare list are tensors themselves; those of others are modules.
    """

    prefix: str
    stride: int = 1
    first: int = 0
    bare: bool = False


@dataclass(frozen=True)
class LayerStack:
    """One stack of layers of a checkpoint.

    Tensors of layer i are named `prefix + str(i) + "." + rest`. `depth` is the number of layers; `extra` is the number of
    multi-token-prediction layers stored behind them.
    """

    prefix: str
    depth: int
    depth_key: DepthKey
    aliases: tuple[DepthKey, ...] = ()
    """Other keys that state the same depth; a stale one would win in some classes."""
    extra: int = 0
    siblings: tuple[Sibling, ...] = ()
    """Lists that hold parts of the same layers."""
    name: str = "text"
    """What the stack is called: text, encoder, decoder, vision, audio, ..."""
    suspects: tuple[str, ...] = ()
    """Prefixes of lists as long as the stack beside it, which may hold parts of its layers or not."""
    declared: Architecture = NOTHING
    """What the recipe says of the architecture."""
    shared: bool = False
    """Whether the layers take their weights from a few groups in turns: then no tensor belongs to one of them."""

    @property
    def node(self) -> Node:
        """Path of the config node that describes the stack: () for the root."""
        return self.depth_key.node

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefix of every list of the stack."""
        return (self.prefix, *(sibling.prefix for sibling in self.siblings))

    @cached_property
    def _lists(self) -> tuple[Sibling, ...]:
        """Every list of the stack, its own first: `place` is asked of every tensor, again and again."""
        return (Sibling(self.prefix), *self.siblings)

    def place(self, name: str) -> Place | None:
        """Where a tensor belongs in the stack, or None for a tensor outside it."""
        if self.shared:
            return None
        for prefix, stride, first, bare in self._lists:
            number, _, rest = name[len(prefix) :].partition(".")
            if bool(rest) is not bare and name.startswith(prefix) and is_index(number):
                return Place(prefix, first + int(number) * stride, rest)
        return None

    def rename(self, place: Place, index: int) -> str:
        """Name of the tensor at `place` once its layer has index `index`."""
        of = next((listed for listed in self._lists if listed.prefix == place.prefix), self._lists[0])
        return f"{place.prefix}{(index - of.first) // of.stride}" + (f".{place.rest}" if place.rest else "")


class Member(NamedTuple):
    """A model that gives layers: its checkpoint and its stack."""

    checkpoint: Checkpoint
    stack: LayerStack


def config_node(config: Mapping[str, Any], node: Node) -> Mapping[str, Any]:
    """The dict of config.json at a node path."""
    for part in node:
        config = config[part]
    return config


def config_nodes(config: Mapping[str, Any], node: Node = ()) -> Iterator[tuple[Node, Mapping[str, Any]]]:
    """Every node of config.json that may describe a stack, outer nodes first."""
    yield node, config
    for name, child in config.items():
        if isinstance(child, Mapping) and CONFIG_NODE.fullmatch(name) and len(node) < 4:
            yield from config_nodes(child, (*node, name))


def depth_keys(config: Mapping[str, Any], node: Node = (), declared: Architecture = NOTHING) -> Iterator[DepthKey]:
    """Every integer of config.json under a name that states a depth, outer nodes first."""
    for path, values in config_nodes(config, node):
        more = TOWER_DEPTH_KEYS if OTHER_STACKS.search(".".join(path)) else ()
        for key in (*DEPTH_KEYS, *more, *declared.keys(declared.depth_keys, path)):
            value = values.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and LOOPS.get(key) not in values:
                yield DepthKey(path, key, value)
                if in_pairs(values.get("layer_types"), value):
                    yield DepthKey(path, key, value // 2, "pairs")


def in_pairs(kinds: Any, length: int) -> bool:
    """Whether a list of kinds names the attention and the MLP of every layer, one behind the other."""
    paired = isinstance(kinds, list) and len(kinds) == length > 1 and length % 2 == 0
    return paired and kinds[1::2] == ["mlp"] * (length // 2) and "mlp" not in kinds[::2]


def lengths(config: Mapping[str, Any]) -> Iterator[DepthKey]:
    """Every value with one entry a layer in a node that states no depth."""
    for path, values in config_nodes(config):
        if not any(isinstance(values.get(key), int) for key in DEPTH_KEYS):
            found = (DepthKey(path, key, len(values[key]), "length") for key in LENGTH_KEYS if isinstance(values.get(key), list | str))
            yield from (key for key in found if key.depth > 0)


def mtp_layers(node: Mapping[str, Any]) -> int:
    """How many multi-token-prediction layers a config node declares, wherever they are stored."""
    return next((max(0, node[name]) for name in MTP_KEYS if type(node.get(name)) is int), 0)


def numbered_prefixes(names: Iterable[str]) -> dict[str, int]:
    """Prefixes that are followed by a contiguous count from 0, with the number of indices, in order of appearance.

    Only the outermost such integer of a name counts, so that the experts inside a layer are not mistaken for layers.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for position in range(len(parts) - 1):
            if is_index(parts[position]):
                indices["".join(f"{part}." for part in parts[:position])].add(int(parts[position]))
    whole = {prefix: len(found) for prefix, found in indices.items() if max(found) == len(found) - 1}
    return {prefix: count for prefix, count in whole.items() if not any(_inside(prefix, other) for other in whole)}


def is_index(part: str) -> bool:
    """Whether a part of a tensor name is the index of a layer: NUMBER, without the cost of a pattern for every part of every name."""
    return part.isdigit() and part.isascii() and len(part) <= 6


def _inside(prefix: str, other: str) -> bool:
    return prefix != other and re.match(re.escape(other) + r"\d+\.", prefix) is not None
