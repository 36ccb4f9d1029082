"""Patterns: kinds of layers that several values of config.json spell together, and numbers that the class derives from the depth.

A pattern is decoded into one entry a layer. The entries of a new stack are spelled again by trying: the first change of the values that
decodes to them is taken, and when there is none the stack cannot be described.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from layercut.anatomy import LayerStack
from layercut.rules import whole

Config = Mapping[str, Any]
Changes = Mapping[str, Any]


class Pattern(NamedTuple):
    """Keys that say together of what kind each layer is."""

    keys: tuple[str, ...]
    reason: str
    applies: Callable[[Config, LayerStack], bool]
    decode: Callable[[Config, int], list[Any] | None]
    spellings: Callable[[Config, int], Iterator[Changes]]
    """Changes of the keys for a stack of so many layers, the preferred first."""

    def encode(self, entries: list[Any], node: Config) -> Changes | None:
        """The first spelling that means these entries, or None."""
        for changes in ({}, *self.spellings(node, len(entries))):
            if self.decode({**node, **changes}, len(entries)) == entries:
                return changes
        return None


def _numbers(node: Config, *defaults: tuple[str, int]) -> list[int] | None:
    """Values of keys, or None when one is no whole number from 0."""
    found = [node[key] if node.get(key) is not None else default for key, default in defaults]
    return found if all(whole(value) for value in found) else None


def _kind(node: Config) -> str:
    return str(node.get("model_type"))


def _offset(name: str, period: int, offset: int) -> Pattern:
    """Layers i with i % period == offset, as Jamba spells them; no list can be given instead."""
    keys = (f"{name}_layer_period", f"{name}_layer_offset")

    def decode(node: Config, depth: int) -> list[Any] | None:
        values = _numbers(node, (keys[0], period), (keys[1], offset))
        return [i % values[0] == values[1] for i in range(depth)] if values and values[0] > 0 else None

    def spellings(node: Config, depth: int) -> Iterator[Changes]:
        old, _ = _numbers(node, (keys[0], period), (keys[1], offset)) or (period, offset)
        yield from ({keys[1]: at} for at in range(min(old, depth + 1)))  # from the depth on, an offset means no layer
        yield from ({keys[0]: every, keys[1]: at} for every in range(1, depth + 2) for at in range(every))

    def applies(node: Config, stack: LayerStack) -> bool:
        return keys[0] in node and not isinstance(node.get("layers_block_type"), list)

    return Pattern(keys, "period and offset of layers, for which the class reads no list", applies, decode, spellings)


def _dense(node: Config, depth: int) -> list[Any] | None:
    """Qwen's spelling: layer i is dense when it is listed, or when i + 1 is no multiple of the step."""
    only, step = node.get("mlp_only_layers") or [], _numbers(node, ("decoder_sparse_step", 1))
    if not isinstance(only, list) or not all(map(whole, only)) or not step or step[0] < 1:
        return None
    return [i in only or (i + 1) % step[0] != 0 for i in range(depth)]


class _Listed(NamedTuple):
    """Qwen's pattern: any set of dense layers can be listed once the step is 1."""

    keys: tuple[str, ...] = ("mlp_only_layers", "decoder_sparse_step")
    reason: str = "list of dense layers and step of the others"
    decode: Callable[[Config, int], list[Any] | None] = _dense

    @staticmethod
    def applies(node: Config, stack: LayerStack) -> bool:
        return "mlp_only_layers" in node or ("decoder_sparse_step" in node and _kind(node).startswith(("qwen", "flint")))

    @staticmethod
    def encode(entries: list[Any], node: Config) -> Changes | None:
        old, step = node.get("mlp_only_layers") or [], node.get("decoder_sparse_step") or 1
        listed = [i for i, dense in enumerate(entries) if dense and (i + 1) % step == 0]
        if _dense({"mlp_only_layers": listed, "decoder_sparse_step": step}, len(entries)) == entries:
            return {} if listed == old else {"mlp_only_layers": listed}
        return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, dense in enumerate(entries) if dense]}


SECTIONS = ("n_input_layers", "n_recurrent_layers", "n_output_layers")


def _sections(node: Config, depth: int) -> list[Any] | None:
    """Dory's spelling: how many layers run first, how many in a loop, and how many last. One part a layer, or two where the attention
    and the MLP of a layer are counted apart."""
    whole_stack = node.get("num_hidden_layers")
    counts = _numbers(node, (SECTIONS[0], 8), (SECTIONS[2], 8))
    if not counts or not whole(whole_stack) or depth < 1 or whole_stack not in (depth, 2 * depth):
        return None
    looped = node.get(SECTIONS[1])
    looped = whole_stack - sum(counts) if looped is None else looped
    if not whole(looped) or min(*counts, looped) < 0 or counts[0] + looped + counts[1] != whole_stack:
        return None
    parts = [0] * counts[0] + [1] * looped + [2] * counts[1]
    width = whole_stack // depth
    return [tuple(parts[index * width : (index + 1) * width]) for index in range(depth)]


class _Sections(NamedTuple):
    """Dory's pattern: any cut keeps the sections, and so does what repeats layers within one."""

    keys: tuple[str, ...] = SECTIONS
    reason: str = "layers before the loop, in it and behind it"
    decode: Callable[[Config, int], list[Any] | None] = _sections

    @staticmethod
    def applies(node: Config, stack: LayerStack) -> bool:
        return _kind(node) == "dory"

    @staticmethod
    def encode(entries: list[Any], node: Config) -> Changes | None:
        parts = [part for layer in entries for part in layer]
        if parts != sorted(parts):
            return None
        counts = {key: parts.count(part) for part, key in enumerate(SECTIONS) if part != 1 or node.get(key) is not None}
        return {key: count for key, count in counts.items() if count != node.get(key)}


WINDOW = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


def _window(node: Config, depth: int) -> list[Any] | None:
    """ERNIE's spelling: layers from start to end whose number from 1 is a multiple of the interval; -1 is the last layer.

    Where a value is a list, it has one for the experts of text and one for those of images: an entry then has one part for each.
    """
    values = [node[key] if node.get(key) is not None else default for key, default in zip(WINDOW, (1, -1, 1), strict=True)]
    lists = [value for value in values if isinstance(value, list)]
    count = max(map(len, lists), default=1)
    if any(len(value) != count for value in lists) or not count:
        return None
    windows = list(zip(*(value if isinstance(value, list) else [value] * count for value in values), strict=True))
    if not all(map(whole, (part for window in windows for part in window))) or min(every for *_, every in windows) < 1:
        return None
    inside = [tuple((i + 1) % n == 0 and low <= i <= (depth - 1 if high == -1 else high) for low, high, n in windows) for i in range(depth)]
    return inside if lists else [parts[0] for parts in inside]


def _window_spellings(node: Config, depth: int) -> Iterator[Changes]:
    for every in dict.fromkeys((node.get("moe_layer_interval", 1), 1)):
        interval = {} if every == node.get("moe_layer_interval", 1) else {"moe_layer_interval": every}
        yield from ({"moe_layer_start_index": start, **interval} for start in range(depth + 1))
        for start in range(depth + 1):
            yield from ({"moe_layer_start_index": start, "moe_layer_end_index": end, **interval} for end in range(start, depth))
        yield {"moe_layer_start_index": depth, "moe_layer_end_index": depth, **interval}


class _Windows(NamedTuple):
    """ERNIE's pattern, which a vision model has twice: each is spelled by itself, and a value that is no list has to do for both."""

    keys: tuple[str, ...] = WINDOW
    reason: str = "first, last and interval of sparse layers"
    decode: Callable[[Config, int], list[Any] | None] = _window

    @staticmethod
    def applies(node: Config, stack: LayerStack) -> bool:
        return any(key in node for key in WINDOW)

    @staticmethod
    def encode(entries: list[Any], node: Config) -> Changes | None:
        single = Pattern(WINDOW, "", _Windows.applies, _window, _window_spellings)
        if not entries or not isinstance(entries[0], tuple):
            return single.encode(entries, node)
        found = []
        for number, wanted in enumerate(zip(*entries, strict=True)):
            own = {**node, **{key: node[key][number] for key in WINDOW if isinstance(node.get(key), list)}}
            changes = single.encode(list(wanted), own)
            if changes is None:
                return None
            found.append({key: {**own, **changes}.get(key) for key in WINDOW})
        made = {key: [window[key] for window in found] for key in WINDOW}
        if any(not isinstance(node.get(key), list) and len(set(values)) > 1 for key, values in made.items()):
            return None
        spelled = {key: values if isinstance(node.get(key), list) else values[0] for key, values in made.items()}
        return {key: value for key, value in spelled.items() if value != node.get(key)}


def _stepped(side: str, kind: str, first: int) -> Pattern:
    """Sparse layers of one side of an encoder-decoder: those with i % step == first % step."""
    key, other = f"{side}_sparse_step", f"num_sparse_{side}_layers"

    def step_of(node: Config, depth: int) -> int | None:
        value = node.get(key)
        if value is None and whole(node.get(other)):  # Switch derives the step from the depth
            value = depth // node[other] if node[other] > 0 else depth
        return value if whole(value) else None

    def decode(node: Config, depth: int) -> list[Any] | None:
        step = step_of(node, depth)
        if step is None:
            return None
        return [step > 0 and i % step == first % step for i in range(depth)]

    def applies(node: Config, stack: LayerStack) -> bool:
        return _kind(node) == kind and stack.name == side

    return Pattern((key,), "step of sparse layers", applies, decode, lambda node, depth: ({key: step} for step in range(depth + 2)))


def _blocks(node: Config, depth: int) -> list[Any] | None:
    """Inkling 2's spelling: every so many layers a block begins, to whose state later layers attend."""
    values = _numbers(node, ("n_layers_per_attn_res_block", 6))
    return [i % values[0] == 0 for i in range(depth)] if values and values[0] > 0 else None


def _aligned(node: Config, depth: int) -> list[Any] | None:
    """Evolla's spelling: a number of layers with an aligner, spread evenly."""
    values = _numbers(node, ("aligner_num_add_layers", 8))
    return [(i + 1) % max(depth // values[0], 1) == 0 for i in range(depth)] if values and values[0] > 0 else None


PATTERNS: tuple[Pattern | _Listed | _Sections | _Windows, ...] = (
    _offset("attn", 8, 4),
    _offset("expert", 2, 1),
    _Listed(),
    _Windows(),
    _stepped("encoder", "nllb-moe", -1),
    _stepped("decoder", "nllb-moe", -1),
    _stepped("encoder", "switch_transformers", 1),
    _stepped("decoder", "switch_transformers", 1),
    Pattern(
        ("aligner_num_add_layers",),
        "number of layers with an aligner",
        lambda node, stack: "aligner_num_add_layers" in node,
        _aligned,
        lambda node, depth: ({"aligner_num_add_layers": count} for count in range(1, depth + 1)),
    ),
    _Sections(),
    Pattern(
        ("n_layers_per_attn_res_block",),
        "first layers of the blocks to which later layers attend",
        lambda node, stack: _kind(node) == "inkling2_text",
        _blocks,
        lambda node, depth: ({"n_layers_per_attn_res_block": count} for count in range(1, depth + 1)),
    ),
)


class Scalar(NamedTuple):
    """A number that has to follow the depth, or to be written so that it does not."""

    key: str
    reason: str
    applies: Callable[[Config, LayerStack], bool]
    follow: Callable[[Config, int, int], Any]
    """The value for a stack of another depth: the node, the old depth, the new one."""


def _cycles(node: Config, depth: int) -> int:
    """How often each layer of a stack that runs in cycles is counted; 0 when the number says nothing of the kind."""
    counted = node.get("num_hidden_layers")
    return counted // depth if isinstance(counted, int) and counted % depth == 0 else 0


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9


SCALARS: tuple[Scalar, ...] = (
    Scalar(
        "scale_depth",
        "the residual scale is scale_depth / sqrt(number of layers)",
        lambda node, stack: _is_scale(node.get("scale_depth")) and "mup_denominator" not in node,
        lambda node, old, new: node["scale_depth"] * math.sqrt(new / old),
    ),
    Scalar(
        "num_hidden_layers",
        "twice the number of layers",
        lambda node, stack: stack.depth_key.key == "num_layers" and node.get("num_hidden_layers") == 2 * stack.depth,
        lambda node, old, new: 2 * new,
    ),
    Scalar(
        "num_hidden_layers",
        "layers of both stacks in all cycles",
        lambda node, stack: stack.depth_key.key == "num_layers_per_stack" and _cycles(node, stack.depth) > 1,
        lambda node, old, new: new * _cycles(node, old),
    ),
    Scalar(
        "num_hidden_groups",
        "one group of weights a layer",
        lambda node, stack: node.get("num_hidden_groups") == stack.depth and not stack.shared,
        lambda node, old, new: new,
    ),
    Scalar(
        "residual_multiplier",
        "the default is 1 / sqrt(2 * number of layers) of the source",
        lambda node, stack: _kind(node) == "neomme" and node.get("residual_multiplier") is None,
        lambda node, old, new: (2 * old) ** -0.5,
    ),
)
