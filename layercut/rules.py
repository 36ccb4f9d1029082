"""Rules: how a value of config.json speaks of single layers, and which key follows which rule. Knows no models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from layercut.anatomy import NUMBER, in_pairs

Values = Sequence[Any]


class Rule(NamedTuple):
    """How a value speaks of single layers.

    `decode(value, depth)` gives one entry per layer; `encode(entries, old)` spells such entries again, or returns None when
    they cannot be said in this form. A new stack gathers the entries of its layers, whatever models they come from.
    """

    reason: str
    decode: Callable[[Any, int], Values | None]
    encode: Callable[[Values, Any], Any]


def whole(value: Any) -> bool:
    """Whether a value is a number that can count layers: a truth value is none."""
    return type(value) is int


def _list(value: Any, depth: int) -> Values | None:
    return value if isinstance(value, list) and len(value) == depth else None


def _members(value: Any, depth: int, first: int = 0) -> Values | None:
    if not isinstance(value, list) or not all(whole(item) and 0 <= item - first < depth for item in value):
        return None
    return [index + first in value for index in range(depth)]


def _written(value: Any, depth: int) -> Values | None:
    """Indices in one text, with commas between them."""
    if not isinstance(value, str) or not re.fullmatch(rf" *({NUMBER}( *, *{NUMBER})* *)?", value):
        return None
    return _members([int(item) for item in value.split(",") if item.strip()], depth)


def _prefix(value: Any, depth: int) -> Values | None:
    return [index < value for index in range(depth)] if whole(value) else None


def _count_prefix(entries: Values, old: Any) -> Any:
    count = sum(entries)
    return count if list(entries) == [True] * count + [False] * (len(entries) - count) else None


def _suffix(value: Any, depth: int) -> Values | None:
    return [index >= depth - value for index in range(depth)] if whole(value) else None


def _count_suffix(entries: Values, old: Any) -> Any:
    count = sum(entries)
    return count if list(entries) == [False] * (len(entries) - count) + [True] * count else None


def _phase(value: Any, depth: int) -> Values | None:
    return [index % value for index in range(depth)] if whole(value) and value > 0 else None


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


def _pairs(value: Any, depth: int) -> Values | None:
    """The attention and the MLP of every layer, one behind the other."""
    return list(zip(value[::2], value[1::2], strict=True)) if in_pairs(value, 2 * depth) else None


def _letters(value: Any, depth: int) -> Values | None:
    return list(value) if isinstance(value, str) and len(value) == depth else None


def _cycle(value: Any, depth: int) -> Values | None:
    """A list (or a text) that is shorter than the stack starts again."""
    if not isinstance(value, list | str) or not 0 < len(value) <= depth:
        return None
    return [value[index % len(value)] for index in range(depth)]


def _recycled(entries: Values, old: Any) -> Any:
    """The old cycle where it still fits, else a shorter one, else the whole."""
    for length in dict.fromkeys((min(len(old), len(entries)), *range(1, len(entries) + 1))):
        if all(item == entries[index % length] for index, item in enumerate(entries)):
            again = list(entries[:length])
            return "".join(again) if isinstance(old, str) else again
    return None


def _runs(value: Any, depth: int) -> Values | None:
    """Kinds and how often they are repeated: `[[["global", "local"], 12]]`."""
    shaped = isinstance(value, list) and all(isinstance(run, list) and len(run) == 2 and isinstance(run[0], list) for run in value)
    if not shaped or not all(whole(times) and 0 <= times <= depth for _, times in value):
        return None
    found = [kind for kinds, times in value for _ in range(times) for kind in kinds]
    return found if len(found) == depth else None


def _run_again(entries: Values, old: Any) -> Any:
    cycle = old[0][0] if len(old) == 1 else []
    if cycle and len(entries) % len(cycle) == 0 and list(entries) == cycle * (len(entries) // len(cycle)):
        return [[cycle, len(entries) // len(cycle)]]
    return [[[kind], 1] for kind in entries]


LIST = Rule("one entry a layer", _list, lambda entries, old: list(entries))
INDICES = Rule("list of layer indices", _members, lambda entries, old: [i for i, there in enumerate(entries) if there])
INDICES_FROM_1 = Rule(
    "list of layer numbers from 1",
    lambda value, depth: _members(value, depth, 1),
    lambda entries, old: [i + 1 for i, there in enumerate(entries) if there],
)
WRITTEN = Rule("text of layer indices", _written, lambda entries, old: ",".join(str(i) for i, there in enumerate(entries) if there))
PREFIX = Rule("number of first layers", _prefix, _count_prefix)
SUFFIX = Rule("number of last layers", _suffix, _count_suffix)
PERIOD = Rule("period of layers", _phase, _same_phase)
KEYED = Rule("entries by layer index", _keyed, _rekey)
PAIRS = Rule("two entries a layer", _pairs, lambda entries, old: [part for pair in entries for part in pair])
LETTERS = Rule("one letter a layer", _letters, lambda entries, old: "".join(entries))
CYCLE = Rule("pattern that starts again", _cycle, _recycled)
RUNS = Rule("kinds of layers and their repeats", _runs, _run_again)

# Which rule a key follows. A key may have several: the first that can read its value is used (list or period, say).
RULES: Mapping[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        (
            "mlp_layer_types", "layers_block_type", "no_rope_layers", "layer_rope_theta", "indexer_types",
            "num_attention_heads_per_layer", "moe_topk", "num_experts", "num_shared_expert", "moe_intermediate_size", "swiglu_limits",
            "swiglu_limits_shared", "intermediate_size", "activation_sparsity_pattern", "attention_window", "attention_layers",
            "compress_ratios", "rope_theta", "partial_rotary_factors", "num_key_value_heads", "num_attention_heads", "hybrid_layer_pattern",
            "attention_windows", "pyramid_num_routed", "layer_norm_scales", "layer_scales", "num_query_heads", "num_kv_heads",
            "ffn_multipliers", "block_configs", "window_sizes",
        ),
        (LIST,),
    ),
    "layer_types": (LIST, PAIRS),
    **dict.fromkeys(("moe_layer_freq", "sparse_attention_freq"), (LIST, PERIOD)),
    **dict.fromkeys(
        (
            "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs", "local_layer_ids",
            "rope_scaling_layers", "hybrid_layer_ids", "fullatt_block_indexes", "global_attn_indexes", "window_block_indexes",
        ),
        (INDICES,),
    ),
    "moe_layers_enum": (WRITTEN, INDICES),
    **dict.fromkeys(("full_attn_layers", "kda_layers", "ple_layer_ids"), (INDICES_FROM_1,)),
    **dict.fromkeys(
        ("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "max_window_layers", "dense_mlp_idx"),
        (PREFIX,),
    ),
    "num_kv_shared_layers": (SUFFIX,),
    **dict.fromkeys(
        (
            "sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval", "global_attn_every_n_layers",
            "no_rope_layer_interval", "interleave_moe_layer_step", "layer_group_size", "decoder_sparse_step", "attn_layer_period",
            "expert_layer_period", "cross_layer_interval", "moe_layer_interval", "encoder_sparse_step",
        ),
        (PERIOD, CYCLE),
    ),
    **dict.fromkeys(("per_layer_config", "pruned_heads"), (KEYED,)),
    **dict.fromkeys(("hybrid_override_pattern", "index_topk_pattern"), (LETTERS, LIST)),
    **dict.fromkeys(("block_types", "attn_layers"), (CYCLE,)),
    "attention_types": (RUNS,),
}  # fmt: skip
# A period is only a fallback for its list: where the list stands in the file too, the class reads the list.
LIST_OF_PERIOD = {
    "sliding_window_pattern": "layer_types", "_sliding_window_pattern": "layer_types", "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types", "no_rope_layer_interval": "no_rope_layers", "interleave_moe_layer_step": "moe_layers",
    "first_k_dense_replace": "mlp_layer_types", "moe_layer_freq": "mlp_layer_types", "max_window_layers": "layer_types",
    "layer_group_size": "layer_types", "num_hash_layers": "mlp_layer_types", "dense_mlp_idx": "mlp_layer_types",
    "attn_layer_period": "layers_block_type",
}  # fmt: skip
# Keys that the class does not read unless another key is on.
SWITCH = {"max_window_layers": "use_sliding_window"}
# Values that may have the length or the size of the depth by chance, and never speak of layers.
NOT_PER_LAYER = (
    "architectures", "eos_token_id", "bos_token_id", "pad_token_id", "mrope_section", "suppress_tokens", "begin_suppress_tokens",
    "forced_decoder_ids", "bad_words_ids", "keys_to_ignore_at_inference", "layerdrop", "deepstack_visual_indexes", "vision_feature_layer",
)  # fmt: skip
