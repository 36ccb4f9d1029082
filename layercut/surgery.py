"""Config surgery: what in config.json depends on the layers, and how each value follows a new stack."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from layercut.architecture import DEPTH_KEYS, MTP_KEYS, NUMBER, LayerStack, Member, config_node, mtp_layers
from layercut.errors import RefusedError
from layercut.exceptions import objection
from layercut.jsontext import replace
from layercut.plan import Edit
from layercut.quantization import follow, mentions
from layercut.stack import LayerRef

Values = Sequence[Any]


class Rule(NamedTuple):
    """How a value speaks of single layers.

    `decode(value, depth)` gives one entry per layer; `encode(entries, old)` spells such entries again, or returns None when
    they cannot be said in this form. A new stack gathers the entries of its layers, whatever models they come from.
    """

    reason: str
    decode: Callable[[Any, int], Values | None]
    encode: Callable[[Values, Any], Any]


def _list(value: Any, depth: int) -> Values | None:
    return value if isinstance(value, list) and len(value) == depth else None


def _members(value: Any, depth: int, first: int = 0) -> Values | None:
    if not isinstance(value, list) or not all(isinstance(item, int) and 0 <= item - first < depth for item in value):
        return None
    return [index + first in value for index in range(depth)]


def _prefix(value: Any, depth: int) -> Values | None:
    return [index < value for index in range(depth)] if isinstance(value, int) else None


def _count_prefix(entries: Values, old: Any) -> Any:
    count = sum(entries)
    return count if list(entries) == [True] * count + [False] * (len(entries) - count) else None


def _suffix(value: Any, depth: int) -> Values | None:
    return [index >= depth - value for index in range(depth)] if isinstance(value, int) else None


def _count_suffix(entries: Values, old: Any) -> Any:
    count = sum(entries)
    return count if list(entries) == [False] * (len(entries) - count) + [True] * count else None


def _phase(value: Any, depth: int) -> Values | None:
    return [index % value for index in range(depth)] if isinstance(value, int) and value > 0 else None


def _same_phase(entries: Values, old: Any) -> Any:
    return old if list(entries) == [index % old for index in range(len(entries))] else None


def _keyed(value: Any, depth: int) -> Values | None:
    if not isinstance(value, dict) or not all(re.fullmatch(NUMBER, key) and int(key) < depth for key in value):
        return None
    by_index = {int(key): item for key, item in value.items()}
    return [by_index.get(index) for index in range(depth)]


def _rekey(entries: Values, old: Any) -> Any:
    width = max((len(key) for key in old), default=1)
    padded = any(key != str(int(key)) for key in old)
    return {str(index).zfill(width if padded else 1): item for index, item in enumerate(entries) if item is not None}


def _letters(value: Any, depth: int) -> Values | None:
    return list(value) if isinstance(value, str) and len(value) == depth else None


LIST = Rule("one entry a layer", _list, lambda entries, old: list(entries))
INDICES = Rule("list of layer indices", _members, lambda entries, old: [i for i, there in enumerate(entries) if there])
INDICES_FROM_1 = Rule(
    "list of layer numbers from 1",
    lambda value, depth: _members(value, depth, 1),
    lambda entries, old: [i + 1 for i, there in enumerate(entries) if there],
)
PREFIX = Rule("number of first layers", _prefix, _count_prefix)
SUFFIX = Rule("number of last layers", _suffix, _count_suffix)
PERIOD = Rule("period of layers", _phase, _same_phase)
KEYED = Rule("entries by layer index", _keyed, _rekey)
LETTERS = Rule("one letter a layer", _letters, lambda entries, old: "".join(entries))

# Which rule a key follows. A key may have several: the first that can read its value is used (list or period, say).
RULES: Mapping[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        (
            "layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta", "indexer_types",
            "num_attention_heads_per_layer", "moe_topk", "num_experts", "num_shared_expert", "moe_intermediate_size", "swiglu_limits",
            "swiglu_limits_shared", "intermediate_size", "activation_sparsity_pattern", "attention_window", "attention_layers",
            "compress_ratios", "rope_theta", "partial_rotary_factors", "num_key_value_heads", "num_attention_heads",
        ),
        (LIST,),
    ),
    **dict.fromkeys(("moe_layer_freq", "sparse_attention_freq"), (LIST, PERIOD)),
    **dict.fromkeys(
        (
            "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "local_layer_ids",
            "rope_scaling_layers", "hybrid_layer_ids",
        ),
        (INDICES,),
    ),
    **dict.fromkeys(("full_attn_layers", "kda_layers", "ple_layer_ids"), (INDICES_FROM_1,)),
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "max_window_layers", "moe_layer_start_index"),
        (PREFIX,),
    ),
    "num_kv_shared_layers": (SUFFIX,),
    **dict.fromkeys(
        (
            "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval", "global_attn_every_n_layers",
            "no_rope_layer_interval", "interleave_moe_layer_step", "layer_group_size", "decoder_sparse_step", "attn_layer_period",
            "expert_layer_period", "cross_layer_interval", "moe_layer_interval", "encoder_sparse_step",
        ),
        (PERIOD, LETTERS),
    ),
    "per_layer_config": (KEYED,),
    **dict.fromkeys(("hybrid_override_pattern", "index_topk_pattern"), (LETTERS,)),
}  # fmt: skip
# A period is only a fallback for its list: where the list stands in the file too, the class reads the list.
LIST_OF_PERIOD = {
    "sliding_window_pattern": "layer_types", "_sliding_window_pattern": "layer_types", "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types", "no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers",
    "first_k_dense_replace": "mlp_layer_types", "moe_layer_freq": "mlp_layer_types", "max_window_layers": "layer_types",
}  # fmt: skip
# Keys that the class does not read unless another key is on.
SWITCH = {"max_window_layers": "use_sliding_window"}
# Values that may have the length or the size of the depth by chance, and never speak of layers.
NOT_PER_LAYER = (
    "architectures", "eos_token_id", "bos_token_id", "pad_token_id", "mrope_section", "suppress_tokens", "begin_suppress_tokens",
    "forced_decoder_ids", "bad_words_ids", "keys_to_ignore_at_inference", "layerdrop",
)  # fmt: skip


class Surgery(NamedTuple):
    """The edited text, and what was changed."""

    text: str
    edits: tuple[Edit, ...]
    texts: Mapping[str, str] = {}
    """Other files that say the same again, by name."""
    notes: tuple[str, ...] = ()


def operate(text: str, donor: str, members: Mapping[str, Member], order: Sequence[LayerRef], more: tuple[Edit, ...] = ()) -> Surgery:
    """Make the config text of `donor` describe the stack `order`.

    Every depth-dependent value follows its rule; every other byte stays. Raises RefusedError when the new stack cannot be
    described (a period that is broken, a prefix that is no prefix), or when a value looks depth-dependent and has no rule.
    `more` are edits that other parts of the plan ask for.
    """
    config, stack = members[donor].checkpoint.config, members[donor].stack
    if [(layer.model, layer.index) for layer in order] == [(donor, index) for index in range(stack.depth)]:
        return Surgery(replace(text, {tuple(edit.key.split(".")): edit.after for edit in more}), more)
    reason = objection(config_node(config, stack.node), [layer.index for layer in order], stack.depth)
    if reason is not None:
        raise RefusedError(reason)
    keys = [key for key in (stack.depth_key, *stack.aliases) if key.depth != len(order)]
    edits = [Edit(key=str(key), before=key.depth, after=len(order), reason="depth") for key in keys]
    for path in _paths(config, stack):
        edit = _follow(path, donor, members, order)
        if edit is not None:
            edits.append(edit)
    if stack.extra:
        node = config_node(config, stack.node)
        why = "multi-token-prediction layers are left out"
        edits += [Edit(key=_dotted(stack, name), before=node[name], after=0, reason=why) for name in MTP_KEYS if node.get(name)]
    quantization = follow(donor, members, order)
    edits += [*quantization.edits, *more]
    changed = {tuple(edit.key.split(".")): edit.after for edit in edits}
    return Surgery(replace(text, changed), tuple(edits), quantization.texts, quantization.notes)


def _dotted(stack: LayerStack, *names: str) -> str:
    return ".".join((*stack.node, *names))


def _paths(config: Mapping[str, Any], stack: LayerStack) -> list[tuple[str, ...]]:
    """Paths below the node of the stack that a rule may apply to: its own members, and those of plain dicts in it."""
    node = config_node(config, stack.node)
    paths: list[tuple[str, ...]] = []
    for key, value in node.items():
        paths.append((key,))
        if key == "linear_attn_config" and isinstance(value, dict):
            paths += [(key, inner) for inner in value]
    return paths


def _value(config: Mapping[str, Any], stack: LayerStack, path: tuple[str, ...]) -> Any:
    value: Any = config_node(config, stack.node)
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _follow(path: tuple[str, ...], donor: str, members: Mapping[str, Member], order: Sequence[LayerRef]) -> Edit | None:
    """The edit that makes the value at `path` follow the new stack, or None when it stays as it is."""
    config, stack = members[donor].checkpoint.config, members[donor].stack
    name, value = path[-1], _value(config, stack, path)
    dotted = _dotted(stack, *path)
    rule = next((rule for rule in RULES.get(name, ()) if decode(rule, value, config, stack) is not None), None)
    if rule is None:
        _suspect(name, value, dotted, stack.depth, mtp_layers(config_node(config, stack.node)))
        return None
    entries = []
    for layer in order:
        member = members[layer.model]
        decoded = decode(rule, _value(member.checkpoint.config, member.stack, path), member.checkpoint.config, member.stack)
        if decoded is None:
            raise RefusedError(f"config.json: {dotted} is set in '{donor}' but not in '{layer.model}': one config cannot describe both")
        entries.append(decoded[layer.index])
    if not stack.extra:  # else the multi-token-prediction layers are left out, and with them what is said of them
        entries += (decode(rule, value, config, stack) or [])[stack.depth :]
    after = rule.encode(entries, value)
    if after is None:
        node = config_node(config, stack.node)
        if isinstance(node.get(LIST_OF_PERIOD.get(name, "")), list) or not node.get(SWITCH.get(name, name)):
            return None
        message = f"config.json: {dotted} = {value} ({rule.reason}) cannot describe the new order of layers"
        raise RefusedError(message, hint="choose layers that keep the pattern")
    return None if after == value else Edit(key=dotted, before=value, after=after, reason=rule.reason)


def decode(rule: Rule, value: Any, config: Mapping[str, Any], stack: LayerStack) -> Values | None:
    """What a value says of each layer, or None. It may speak of declared multi-token-prediction layers too, behind the others."""
    found = rule.decode(value, stack.depth)
    extra = mtp_layers(config_node(config, stack.node))
    return rule.decode(value, stack.depth + extra) if found is None and extra else found


def _suspect(name: str, value: Any, dotted: str, depth: int, extra: int) -> None:
    """Stop at a value that may depend on the layers in a way nobody told."""
    if name in NOT_PER_LAYER or name in DEPTH_KEYS or name in MTP_KEYS:
        return
    listed = isinstance(value, list) and len(value) in (depth, depth + extra)
    counted = isinstance(value, int) and value == depth and ("layer" in name or "depth" in name)
    if listed or counted:
        what = f"a list of {len(value)} entries" if listed else f"{value}, the number of layers"
        raise RefusedError(f"config.json: {dotted} is {what}, and layercut does not know whether it must follow the layers")


class Dependent(NamedTuple):
    """A value of config.json that depends on the layers, and how."""

    key: str
    value: Any
    reason: str


def dependents(config: Mapping[str, Any], stack: LayerStack) -> list[Dependent]:
    """Every value of a config that `operate` would make follow a new stack, the depth first."""
    found = [Dependent(str(key), key.depth, "depth") for key in (stack.depth_key, *stack.aliases)]
    for path in _paths(config, stack):
        value = _value(config, stack, path)
        rule = next((rule for rule in RULES.get(path[-1], ()) if decode(rule, value, config, stack) is not None), None)
        if rule is not None:
            found.append(Dependent(_dotted(stack, *path), value, rule.reason))
    found += [Dependent(key, value, "names of layers") for key, value in mentions(config, stack)]
    return found
