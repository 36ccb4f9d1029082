"""Values that a class makes when config.json does not hold them: what an absent list of kinds means, by model type.

After a cut the class would make another value than the layers had. It is then written out. From the configuration classes of
transformers 5.24; a test compares every row with its class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from layercut.errors import UNREADABLE, CheckpointError

Config = Mapping[str, Any]
Make = Callable[[Config, int], Any]

S, F, L, X = "sliding_attention", "full_attention", "linear_attention", "indexed_attention"


class Implied(NamedTuple):
    """The value of an absent key."""

    model_types: tuple[str, ...]
    key: str
    make: Make
    """From the config node and the depth."""


def _kinds(rule: Callable[[Config, int, int], bool], yes: str, no: str) -> Make:
    """One of two kinds for every layer; the rule sees the node, the index and the depth."""
    return lambda node, depth: [yes if rule(node, index, depth) else no for index in range(depth)]


def _number(node: Config, key: str, default: int) -> int:
    value = node.get(key)
    return value if type(value) is int else default


def _every(period: int | str, default: int = 0, yes: str = F, no: str = S, at: int = -1) -> Make:
    """Layers i with i % period == at % period are of kind `yes`; a period that is a key is read from the node."""

    def make(node: Config, depth: int) -> list[str]:
        every = _number(node, period, default) if isinstance(period, str) else period
        return [yes if every > 0 and index % every == at % every else no for index in range(depth)]

    return make


def _first(key: str | None, default: int, yes: str = "dense", no: str = "sparse") -> Make:
    """The first layers are of kind `yes`."""
    return lambda node, depth: [yes if i < (_number(node, key, default) if key else default) else no for i in range(depth)]


def _constant(value: Any) -> Make:
    return lambda node, depth: value


def _windowed(node: Config, index: int, depth: int) -> bool:
    on = bool(node.get("use_sliding_window")) and node.get("sliding_window", 4096) is not None
    return on and index >= _number(node, "max_window_layers", 28)


def _alternating(node: Config, index: int, depth: int) -> bool:
    return bool(node.get("use_sliding_window")) and index % 2 == 0 and index < _number(node, "max_window_layers", 28)


def _no_rope(node: Config, depth: int) -> list[int]:
    every = _number(node, "no_rope_layer_interval", 4)
    return [int((index + 1) % every != 0) if every > 0 else 1 for index in range(depth)]


def _by_rope(yes: str, switch: Callable[[Config], bool], rope: int) -> Make:
    """Kinds that follow `no_rope_layers`, where 1 means that a layer has RoPE."""

    def make(node: Config, depth: int) -> list[str]:
        flags = node.get("no_rope_layers") or _no_rope(node, depth)
        return [yes if switch(node) and bool(flag) == bool(rope) else F for flag in flags]

    return make


def _slides(node: Config) -> bool:
    return bool(node.get("use_sliding_window")) and node.get("sliding_window") is not None


def _chunks(node: Config) -> bool:
    return node.get("attention_chunk_size", 8192) is not None


def _stepped(node: Config, depth: int) -> list[int]:
    step = _number(node, "interleave_moe_layer_step", 1)
    return list(range(step - 1, depth, step)) if step > 0 else []


def _exaone(node: Config, depth: int) -> list[str]:
    pattern = node.get("sliding_window_pattern", 4)
    if node.get("sliding_window", 4096) is None or not pattern:
        return [F] * depth
    if isinstance(pattern, str):  # read by the code of the first checkpoints: L is local, G is global
        return [F if pattern[index % len(pattern)] == "G" or index == depth - 1 else S for index in range(depth)]
    return [S if (index + 1) % pattern else F for index in range(depth)]


def _cohere_moe(node: Config, depth: int) -> list[str]:
    first = _number(node, "first_k_dense_replace", 0)
    before, after = _number(node, "prefix_dense_sliding_window_pattern", 1), _number(node, "sliding_window_pattern", 4)
    return [F if (i + 1 if i < first else i - first + 1) % (before if i < first else after) == 0 else S for i in range(depth)]


def _sparse_from(node: Config, depth: int) -> list[str]:
    first, every = _number(node, "first_k_dense_replace", 1), node.get("moe_layer_freq", 1)
    flags = every if isinstance(every, list) else [index % every == 0 for index in range(depth)]
    return ["sparse" if index >= first and flags[index] else "dense" for index in range(depth)]


def _indexers(node: Config, depth: int) -> list[str]:
    pattern = node.get("index_topk_pattern")
    if isinstance(pattern, str):
        return ["full" if letter == "F" else "shared" for letter in pattern]
    if isinstance(pattern, list):
        return list(pattern)
    every, offset = max(_number(node, "index_topk_freq", 1), 1), _number(node, "index_skip_topk_offset", 2)
    return ["full" if max(index - offset + 1, 0) % every == 0 else "shared" for index in range(depth)]


def _kimi(node: Config, depth: int) -> list[str]:
    listed = (node.get("linear_attn_config") or {}).get("full_attn_layers")
    if isinstance(listed, list):
        return [F if index + 1 in listed else L for index in range(depth)]
    return [F if index and index % 4 == 0 else L for index in range(depth)]


def _compressed(node: Config, depth: int) -> list[str]:
    heavy, sparse = "heavily_compressed_attention", "compressed_sparse_attention"
    ratios = node.get("compress_ratios")
    if isinstance(ratios, list):
        return [{0: S, 4: sparse, 128: heavy}.get(ratio, heavy) for ratio in ratios[:depth]]
    return [heavy if index < 2 or index % 2 == 0 else sparse for index in range(depth)]


def _zamba(node: Config, depth: int) -> list[str]:
    every, at = _number(node, "attn_layer_period", 6), _number(node, "attn_layer_offset", 4)
    return [L, L, "hybrid", *("hybrid" if index % every == at else L for index in range(depth - 3))]


def _inkling(node: Config, depth: int) -> list[str]:
    local = node.get("local_layer_ids")
    return ["hybrid_sliding" if (i in local if isinstance(local, list) else (i + 1) % 6) else "hybrid" for i in range(depth)]


def _sparsity(node: Config, depth: int) -> list[float]:
    count = 10 if depth > 10 else 0
    return [0.95] * count + [0.0] * (depth - count)


def _full_head(node: Config, depth: int) -> dict[str, Any]:
    """Gemma 4: layers with full attention have another head dimension, and may have fewer heads."""
    overrides: dict[str, Any] = {"head_dim": _number(node, "global_head_dim", 512)}
    fewer = node.get("model_type") == "embedding_gemma2_text"
    heads = node.get("num_global_key_value_heads", 1 if fewer else None) if fewer or node.get("attention_k_eq_v", True) else None
    if heads is not None:
        overrides["num_key_value_heads"] = heads
    kinds = node.get("layer_types") or _every(6)(node, depth)
    return {str(index): overrides for index, kind in enumerate(kinds) if kind == F}


LAYER_TYPES = "layer_types"
MLP_TYPES = "mlp_layer_types"
GEMMA4 = ("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text")

# Order matters: a later row sees the values of the earlier ones.
IMPLIED: tuple[Implied, ...] = (
    Implied(("gemma2", "vaultgemma", "gpt_oss", "t5_gemma_module"), LAYER_TYPES, _every(2)),
    Implied(("gemma3_text", "t5gemma2_text", "t5gemma2_decoder"), LAYER_TYPES, _every("sliding_window_pattern", 6)),
    Implied(("cohere2",), LAYER_TYPES, _every("sliding_window_pattern", 4)),
    Implied(("cohere2_moe",), LAYER_TYPES, _cohere_moe),
    Implied(("cohere2_moe",), MLP_TYPES, _first("first_k_dense_replace", 0)),
    Implied(("exaone4", "exaone_moe"), LAYER_TYPES, _exaone),
    Implied(("exaone_moe",), MLP_TYPES, _first("first_k_dense_replace", 1)),
    Implied(("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "dots1"), LAYER_TYPES, _kinds(_windowed, S, F)),
    Implied(("qwen2_moe",), LAYER_TYPES, _kinds(_alternating, S, F)),
    Implied(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LAYER_TYPES, _every("full_attention_interval", 4, F, L)),
    Implied(("qwen4_exp_text",), LAYER_TYPES, _every("full_attention_interval", 4, X, L)),
    Implied(("olmo3",), LAYER_TYPES, _every(4)),
    Implied(("olmo_hybrid",), LAYER_TYPES, _every(4, 0, F, L)),
    Implied(("cwm", "granite_swa", "granitemoe_swa"), LAYER_TYPES, _every(4, at=0)),
    Implied(("ministral",), LAYER_TYPES, _kinds(lambda node, index, depth: node.get("sliding_window", 4096) is not None, S, F)),
    Implied(("smollm3", "llama4_text", "mistral_large4_text"), "no_rope_layers", _no_rope),
    Implied(("smollm3",), LAYER_TYPES, _by_rope(S, _slides, 0)),
    Implied(("llama4_text",), LAYER_TYPES, _by_rope("chunked_attention", _chunks, 1)),
    Implied(("llama4_text",), "moe_layers", _stepped),
    Implied(("afmoe",), LAYER_TYPES, _every("global_attn_every_n_layers", 4)),
    Implied(("bailing_hybrid",), LAYER_TYPES, _every("layer_group_size", 6, F, L)),
    Implied(("bailing_hybrid",), MLP_TYPES, _first("first_k_dense_replace", 2)),
    Implied(("axk1", "axk2", "dots3_note_text"), MLP_TYPES, _sparse_from),
    Implied(("unlimited_ocr_text", "kimi_linear"), MLP_TYPES, _first("first_k_dense_replace", 1)),
    Implied(("deepseek_v32", "glm_moe_dsa"), MLP_TYPES, _first("first_k_dense_replace", 3)),
    Implied(("mistral_large4_text",), MLP_TYPES, _first("first_k_dense_replace", 1)),
    Implied(("glm4_moe_lite", "hy_v3", "hy_v4", "hy_v4_vl_text", "ernie4_5_vl_moe_text"), MLP_TYPES, _first(None, 1)),
    Implied(("laguna", "mimo_v2_flash"), MLP_TYPES, _first(None, 1)),
    Implied(("beam", "glm5_next_text"), MLP_TYPES, _first(None, 3)),
    Implied(("inkling_text",), MLP_TYPES, _first("dense_mlp_idx", 0)),
    Implied(("inkling_text",), LAYER_TYPES, _inkling),
    Implied(("inkling2_text",), LAYER_TYPES, _every(6, yes="hybrid", no="hybrid_sliding")),
    Implied(("deepseek_v4",), LAYER_TYPES, _compressed),
    Implied(("deepseek_v4",), MLP_TYPES, _first("num_hash_layers", 3, "hash_moe", "moe")),
    Implied(("beam",), LAYER_TYPES, _kinds(lambda node, index, depth: (index + 1) % 6 == 0 or index == depth - 1, F, S)),
    Implied(("flint",), LAYER_TYPES, _kinds(lambda node, index, depth: index < 2 or index % 4 == 1 or index == depth - 1, F, S)),
    Implied(("flint",), "mlp_only_layers", _constant([0, 1])),
    Implied(("gemma3n_text", "kolibri1"), LAYER_TYPES, _every(5)),
    Implied(("gemma3n_text",), "activation_sparsity_pattern", _sparsity),
    Implied(GEMMA4, LAYER_TYPES, _kinds(lambda node, index, depth: (index + 1) % 6 == 0 or index == depth - 1, F, S)),
    Implied(GEMMA4, "per_layer_config", _full_head),
    Implied(("glm5_next_text",), LAYER_TYPES, _every(4, 0, X, L)),
    Implied(("glm5_next_text", "glm_moe_dsa", "mistral_large4_text"), "indexer_types", _indexers),
    Implied(("hy_v4", "hy_v4_vl_text"), "indexer_types", _kinds(lambda node, i, depth: i == 0 or (i - 1) % 4 == 0, "full", "shared")),
    Implied(("kimi_linear",), LAYER_TYPES, _kimi),
    Implied(("lara_mini",), LAYER_TYPES, lambda node, depth: [(L, S, L, F, S)[index % 5] for index in range(depth)]),
    Implied(("lfm3",), LAYER_TYPES, lambda node, depth: [F if i % 4 == 2 else S if i % 4 == 0 and i else "conv" for i in range(depth)]),
    Implied(("mimo_v2_flash",), LAYER_TYPES, _kinds(lambda node, index, depth: index == 0 or (index + 1) % 6 == 0, F, S)),
    Implied(("minimax",), LAYER_TYPES, _every(2, 0, F, L, at=0)),
    Implied(("modernbert", "modernbert-decoder"), LAYER_TYPES, _every("global_attn_every_n_layers", 3, at=0)),
    Implied(("muse_glimmer_text", "muse_spark_text"), LAYER_TYPES, _kinds(lambda node, index, depth: (depth - 1 - index) % 4 == 0, F, S)),
    Implied(("neomme",), LAYER_TYPES, _kinds(lambda node, index, depth: (index + 1) % 6 == 0 or index == depth - 1, F, S)),
    Implied(("ultrabert",), LAYER_TYPES, _every(3)),
    Implied(("zamba",), "layers_block_type", _zamba),
    Implied(("deepseek_v3",), "first_k_dense_replace", _constant(3)),
    Implied(("glm4_moe", "glm4v_moe_text", "sarvam_mla", "sarvam_moe"), "first_k_dense_replace", _constant(1)),
    Implied(("afmoe",), "num_dense_layers", _constant(1)),
    Implied(("lfm2_moe",), "num_dense_layers", _constant(2)),
    Implied(("ernie4_5_moe",), "moe_layer_start_index", _constant(1)),
    Implied(("jamba",), "attn_layer_period", _constant(8)),
    Implied(("jamba",), "expert_layer_period", _constant(2)),
    Implied(("recurrent_gemma",), "block_types", _constant(["recurrent", "recurrent", "attention"])),
    Implied(("gpt_neo",), "attention_types", _constant([[["global", "local"], 12]])),
)  # fmt: skip


def implied_values(node: Config, kind: str | None, depth: int) -> dict[str, Any]:
    """What the class of a model type puts in the place of every key that the node does not set.

    Raises CheckpointError for a node that the class could not read.
    """
    found: dict[str, Any] = {}
    for row in IMPLIED:
        if kind in row.model_types and node.get(row.key) in (None, []):
            if node.get(row.key) == [] and row.key != "no_rope_layers":
                continue
            try:
                found[row.key] = row.make({**node, **found}, depth)
            except UNREADABLE:
                message = f"config.json: {row.key} follows from other values, and one is of a kind that model type {kind} does not take"
                raise CheckpointError(message) from None
    return found
