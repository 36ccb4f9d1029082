"""Values that name single layers, or states between layers, and follow them to their new places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from layercut.errors import RefusedError
from layercut.rules import whole
from layercut.stack import LayerRef


class Moves(NamedTuple):
    """Where the layers of one model stand in a new stack."""

    model: str
    depth: int
    """Layers of the model."""
    order: tuple[LayerRef, ...]

    def positions(self, index: int) -> list[int]:
        """Every position of a layer."""
        return [at for at, layer in enumerate(self.order) if (layer.model, layer.index) == (self.model, index)]

    def boundary(self, number: int) -> int:
        """Where the state before layer `number` stands, or what comes nearest to it."""
        if number >= self.depth:
            return len(self.order)
        before = [at for at, layer in enumerate(self.order) if layer.model == self.model and layer.index < number]
        return before[-1] + 1 if before else 0


class Remap(NamedTuple):
    """How a value that names layers follows them. `follow` returns None for a value that is of another form."""

    reason: str
    follow: Callable[[Any, Moves], Any]


def _sources(value: Any, moves: Moves) -> Any:
    """One layer index for every layer: the layer whose keys and values it reads, itself or an earlier one."""
    if not _indices(value) or len(value) != moves.depth:
        return None
    found: list[int] = []
    for at, layer in enumerate(moves.order):
        if layer.model != moves.model:
            raise RefusedError(f"layers of '{moves.model}' read keys and values of each other: they cannot be mixed with other models")
        source = value[layer.index]
        before = [position for position in moves.positions(source) if position <= at]
        if source != layer.index and not before:
            raise RefusedError(f"layer {layer.index} reads the keys and values of layer {source}, which does not stand before it any more")
        found.append(at if source == layer.index else before[-1])
    return found


def _targets(value: Any, moves: Moves) -> Any:
    """Layers that something outside the stack feeds, one of its parts for each: they must all be there, once."""
    return [_target(index, moves) for index in value] if _indices(value) else None


def _second_targets(value: Any, moves: Moves) -> Any:
    """The same, as pairs whose second is the layer."""
    if not isinstance(value, list) or not all(_indices(pair) and len(pair) == 2 for pair in value):
        return None
    return [[first, _target(second, moves)] for first, second in value]


def _target(index: int, moves: Moves) -> int:
    positions = moves.positions(index)
    if len(positions) != 1:
        raise RefusedError(f"layer {index} is fed from outside the stack, and stands {len(positions)} times in the new one")
    return positions[0]


def _heads(value: Any, moves: Moves) -> Any:
    """Pairs of a layer and a head."""
    if not isinstance(value, list) or not all(_indices(pair) and len(pair) == 2 for pair in value):
        return None
    return [[at, head] for layer, head in value for at in moves.positions(layer)]


def _boundaries(value: Any, moves: Moves) -> Any:
    """Numbers of states between layers: 0 is before the first layer, -1 behind the last."""
    if isinstance(value, list) and all(map(whole, value)):
        return [_boundaries(item, moves) for item in value]
    if not whole(value) or not -moves.depth <= value + 1 <= moves.depth + 1:
        return None
    if value >= 0:
        return moves.boundary(value)
    return moves.boundary(moves.depth + 1 + value) - len(moves.order) - 1


def _indices(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(whole(item) and item >= 0 for item in value)


SOURCES = Remap("layer whose keys and values are read", _sources)
TARGETS = Remap("layers that are fed from outside", _targets)
PAIRS = Remap("layers that are fed from outside, in pairs", _second_targets)
HEADS = Remap("layers and heads", _heads)
STATES = Remap("states between layers", _boundaries)

# Values in the node of the stack, and values in the nodes around it by the name of the stack that they speak of.
IN_NODE: Mapping[str, Remap] = {
    "kv_source_layers": SOURCES,
    "deepstack_visual_indexes": TARGETS,
    "intermediate_layers_indices": STATES,
    "out_hidden_states": STATES,
}
AROUND: Mapping[str, Mapping[str, Remap]] = {
    "text": {"spatial_target_layers": TARGETS, "deepstack_layer_map": PAIRS},
    "vision": {"vision_feature_layer": STATES, "vision_feature_layers": STATES, "mm_vision_select_layer": STATES},
    "audio": {"audio_feature_layer": STATES},
}
# Values of generation_config.json that speak of the layers that generate.
GENERATION: Mapping[str, Remap] = {"alignment_heads": HEADS, "dola_layers": STATES, "assistant_early_exit": STATES}
GENERATING = ("text", "decoder")
"""Stacks that these values speak of."""
