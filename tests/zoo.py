"""A tiny random model of every type that transformers knows: the default config of each type, shrunk by rules, and rows for exceptions."""

from __future__ import annotations

import copy
import importlib.util
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

DEPTH = 6
"""Layers of the language stack. Towers of other senses get two, so that no rule can mistake one for the other by its size."""
TOWER_DEPTH = 2
VOCABULARY = 160
TASKS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "image": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
}
"""Tasks, each with its auto class and the mapping that lists its model types."""

TOWER = re.compile(
    r"vision|visual|audio|image|vq|qformer|speech|protein|depth_decoder|acoustic|semantic|timestamp|adapter|perceiver|dit|patcher|projector"
)
# Sizes of a tiny model. A value is only ever made smaller; the first pattern that takes the whole name counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"num_(hidden_|encoder_|decoder_)?layers|(en|de)coder_layers|n_layers?|layers|depth|num_blocks|decoder_num_layers", DEPTH),
    (r"(.*_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (
        r"head_dim|.*_head_dim|d_kv|d_head|kv_channels|mamba_d_head"
        r"|v_head_dim|global_head_dim|linear_head_dim|mamba_headdim|attention_head_dim|attention_head_size|rotary_dim",
        8,
    ),
    (r"(q|kv|o)_lora_rank|gated_norm_rank|.*_rank|hc_lowrank", 8),
    (r"(num_|n_)?(key_value_heads|kv_heads|head_kv)|.*num_key_value_heads|kv_n_heads", 2),
    (
        r".*(attention_heads|n_heads|num_heads)|n_heads?|heads"
        r"|.*_num_(key|value)_heads|linear_num_heads|resampler_n_heads|mamba_num_heads",
        4,
    ),
    (r"hidden_size_per_layer_input", 8),
    (r"(vision_|text_|encoder_|decoder_|out_|projector_|dim_|global_)*hidden_(size|dim)|d_model|n_embd|dim|emb(ed)?_dim|embedding_(size|dim)|word_embed_proj_dim|"
     r"hidden_size_global|image_text_hidden_size|lru_width|projection_dim|attention_hidden_size|vision_output_dim|expert_.*_size", 32),
    (
        r".*(intermediate_size|intermediate_dim)|(.*_)?ffn_dim|d_ff|dim_ff|dff"
        r"|d_inner|n_inner|mlp_dim|ffn_hidden_size|intermediate_size_mlp|output_dim|downsample_hidden_size",
        48,
    ),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_selected_experts", 2),
    (r"(num_|n_)?(local_|routed_|moe_)*experts|moe_num_experts", 4),
    (r"n_group|num_expert_group|topk_group", 1),
    (
        r".*max_position_embeddings|n_positions|n_ctx|max_(source|target)_positions"
        r"|max_seq_len|model_max_length|seq_length|max_2d_position_embeddings",
        128,
    ),
    (r"sliding_window(_size)?|local_attention|attention_window_size|attention_chunk_size|index_topk|window", 4),
    (r"image_size|resolution|input_resolution", 32),
    (r"patch_size", 8),
    (r"codebook_dim|base_channels|num_filters|latent_channels|output_channels|scale", 32),
    (r"moe_hidden_size", 32),
    (r"ssm_state_size|state_size|mamba_d_state", 8),
    (r"mamba_chunk_size|chunk_size", 8),
    (r"(num_|n_)image_tokens|image_seq_length|mm_tokens_per_image|num_query_tokens|image_seq_len", 4),
)  # fmt: skip
TOKENS = re.compile(r".*token_(id|index)|.*_idx|.*_id")


HEADS = ("num_attention_heads", "n_heads", "num_heads", "swa_num_attention_heads")


class Row(NamedTuple):
    """What the rules cannot know of a type."""

    config: Mapping[str, Any] = {}
    """Values of the config by dotted key: they come last."""
    inputs: str = "text"
    reason: str = ""
    """Why the type cannot be run here."""


UNRUNNABLE: Mapping[str, str] = {"pi0": "it makes movements of a robot, not text"}
"""Types that cannot be run here, each with the reason."""
PACKAGES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), ("timm", "torchvision")),
    "inkling_mm_model": ("scipy",),
}
"""Packages beside torch and transformers that a tower of a type needs: the pages are made with them, tests do without."""
DEPTHS: Mapping[str, int] = {
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), 8),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "glm5_next", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), 8),
    "kimi_linear": 10,
    "bailing_hybrid": 12,
    "jamba": 8,
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), 12),
}
"""Types that need more layers to have two of each kind."""
WHOLE = ("id2label", "label2id", "per_layer_config", "projector_patch_to_query_dict")
"""Mappings that are no parts of a config."""


def _mrope(*sections: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5], "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "dbrx": {
        "attn_config.clip_qkv": 8.0,
        "attn_config.rope_theta": 10000.0,
        "ffn_config.moe_num_experts": 4,
        "ffn_config.ffn_hidden_size": 48,
        "ffn_config.hidden_size": 32,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "dots1": {
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
        "n_group": 2,
        "topk_group": 1,
    },
    "longcat_flash": {"qk_head_dim": 16, "zero_expert_num": 2, "n_routed_experts": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention"],
        "n_groups": 2,
    },
    **{key: {"indexer_types": ["full", "full", "shared", "shared", "full", "shared"]} for key in ("glm_moe_dsa", "mistral_large4_text")},
    "fast_vlm": {"vision_config.architecture": "test_efficientnet"},
    "gemma3n": {"vision_config.architecture": "test_efficientnet"},
    "perception_lm": {"vision_config.architecture": "test_vit", "vision_config.model_args": {"embed_dim": 64}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "dots3_note": {
        "vision_config.adapter_in_dim": 32,
        "vision_config.adapter_out_dim": 32,
        "audio_config.adapter_input_size": 32,
        "audio_config.adapter_output_size": 32,
        "vision_config.pyramid_num_routed": [-1, 4],
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "n_routed_experts": 4,
    },
    "gemma4_assistant": {
        "text_config.hidden_size_per_layer_input": 0,
        "text_config.vocab_size_per_layer_input": 0,
        "text_config.num_kv_shared_layers": 6,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 3,
        "text_config.global_head_dim": 16,
        "backbone_hidden_size": 32,
    },
    "gemma4_unified_assistant": {
        "text_config.num_kv_shared_layers": 6,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 3,
        "text_config.global_head_dim": 16,
        "backbone_hidden_size": 32,
    },
    "wavtokenizer_encoder": {"num_filters": 4},
    "apertus1p5": {
        "vision_config.codebook_size": 8,
        "audio_config.codebook_size": 8,
        "image_token_offset": 130,
        "audio_token_offset": 138,
    },
    "blip-2": {"image_token_index": 150},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "cosmos3_edge_text": {"rope_parameters": _mrope(2, 1, 1)},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 5, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 32], "global_attn_indexes": [1]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32, "expert_intermediate_size": 32},
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16],
        "mlp_layer_types": ["dense"] + ["sparse"] * 5,
        "rope_parameters": _mrope(1, 1, 2),
    },
    "glm4v_text": {"rope_parameters": _mrope(1, 1, 2)},
    "glm46v": {"text_config.rope_parameters": _mrope(1, 1, 2)},
    "glm4v_moe_text": {"head_dim": 16, "rope_parameters": {**_mrope(1, 1, 2), "partial_rotary_factor": 0.5}},
    "glm_ocr_text": {"rope_parameters": _mrope(1, 1, 2)},
    "glmga_text": {"rope_parameters": _mrope(1, 1, 2)},
    "glm5_next_text": {"index_topk": 8, "index_kpool": 4},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "qformer_config.hidden_size": 64,
        "qformer_config.encoder_hidden_size": 64,
        "vision_config.hidden_size": 64,
        "deepstack_layer_map": [[1, 2]],
        "spatial_target_layers": [1, 3, 4, 5],
    },
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": _mrope(1, 1, 1, 1)},
    "hy_v4_vl_text": {"rope_parameters": _mrope(2, 1, 1)},
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 3},
    "florence_vision": {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 2],
        "num_groups": [2, 2],
    },
    "kosmos-2": {"latent_query_num": 4},
    "llama4_vision_model": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "luke": {"entity_vocab_size": 100, "entity_emb_size": 32},
    "mistral4": {"head_dim": 16},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "molmo2_text": {"additional_vocab_size": 8},
    "muse_spark_audio": {"num_hidden_layers": 2, "patch_sizes": [4, 4], "hidden_sizes": [16, 32], "depths": [1, 1]},
    "granite_speech": {"encoder_config.num_layers": 2},
    "granite_speech_plus": {"encoder_config.num_layers": 2},
    "nemo_speechlm": {"text_config.num_key_value_heads": 2, "audio_config.diarization_config.head_config.audio_hidden_size": 32},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "neomme": {"head_dim": 16},
    "paddleocr_vl_text": {"rope_parameters": _mrope(1, 1, 2)},
    "paligemma": {"text_config.num_key_value_heads": 1},
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 8,
        "d_model": 32,
        "num_self_attends_per_block": 6,
        "num_blocks": 2,
        "num_cross_attention_heads": 4,
        "num_self_attention_heads": 4,
    },
    "pp_formulanet_vision": {"post_conv_in_channels": 32, "post_conv_out_channels": 32, "post_conv_mid_channels": 32},
    "inkling2_text": {"n_layers_per_attn_res_block": 3, "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "janus_vqgan": {"num_embeddings": 64},
    "qwen2_vl_text": {"rope_parameters": _mrope(1, 1, 2)},
    "qwen2_5_vl_text": {"rope_parameters": _mrope(1, 1, 2)},
    "qwen2_5_omni_text": {"rope_parameters": _mrope(1, 1, 2)},
    "sam_vision_model": {"downsample_channels": [32, 32]},
    "step3p5": {"sliding_window": 4, "num_sliding_attention_heads": 4},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 32]},
    "gemma3n_text": {"num_kv_shared_layers": 4, "intermediate_size": 48, "activation_sparsity_pattern": [0.9, 0.0, 0.9] + [0.0] * 9},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention"] * 2, "mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": [2, 1, 2, 1, 2, 1]},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "hash_seed": 1,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attn_layers": ["local", "lsh"] * 3,
        "num_hashes": 1,
        "feed_forward_size": 48,
    },
    "reformer:masked": {"is_decoder": False, "hash_seed": 1},
    "roc_bert": {"shape_embed_dim": 32, "pronunciation_embed_dim": 32, "shape_vocab_size": 100, "pronunciation_vocab_size": 100},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "linear_attention"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "linear_attention", "hybrid", "linear_attention"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "hybrid_layer_ids": [1, 4],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "adapter_rank": 4,
    },
}
"""What the rules cannot know of a type: values of its config by dotted key."""


def lacking(kind: str) -> str | None:
    """A package that is not here and that a tower of a type needs, or None."""
    return next((name for name in PACKAGES.get(kind, ()) if importlib.util.find_spec(name) is None), None)


def types(task: str) -> list[str]:
    """Every model type of a task, in order."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, TASKS[task][1]))


def depth_of(kind: str) -> int:
    """Layers of the language stack of a type."""
    return DEPTHS.get(kind, DEPTH)


def _small(key: str, value: int, depth: int) -> int:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return depth if size == DEPTH else min(value, size)
    return value


def shrink(node: Mapping[str, Any], depth: int, tower: bool = False) -> dict[str, Any]:
    """The values that make a config of a type tiny. Lists are left to the class, which makes them anew from the depth."""
    made: dict[str, Any] = {}
    for key, value in node.items():
        key = str(key)
        if key in WHOLE or key.startswith("rope_parameters"):
            continue
        if isinstance(value, Mapping):
            inside = tower or TOWER.search(key) is not None
            inner = shrink(value, min(depth, TOWER_DEPTH) if inside else depth, inside)
            for dotted, wanted in CONFIGS.get(value.get("model_type") or "", {}).items():
                put(inner, dotted, wanted)
            if inner:
                made[key] = {**({"model_type": value["model_type"]} if value.get("model_type") else {}), **inner}
        elif isinstance(value, int) and not isinstance(value, bool):
            if TOKENS.fullmatch(key) and value >= VOCABULARY:
                made[key] = 100 + zlib.crc32(key.encode()) % 60
                continue
            small = _small(key, value, depth)
            if small == 2 and re.search("kv|key_value", key) and value in (node.get(name) for name in HEADS):
                small = 4  # as many as there are queries
            if small != value:
                made[key] = small
    return made


def put(config: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a value of a nested dict by its dotted key."""
    *nodes, key = dotted.split(".")
    for name in nodes:
        config = config.setdefault(name, {})
    config[key] = copy.deepcopy(value)


def class_of(kind: str, task: str) -> Any:
    """The model class of a type for a task."""
    import transformers
    from transformers.models.auto import modeling_auto

    name = getattr(modeling_auto, TASKS[task][1])[kind]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def tiny_config(kind: str, task: str) -> Any:
    """The config of a tiny model of a type: that of the class, which may be a part of that of the type."""
    from transformers import CONFIG_MAPPING

    made = shrink(_defaults(CONFIG_MAPPING[kind]), depth_of(kind))
    for dotted, value in {**CONFIGS.get(kind, {}), **CONFIGS.get(f"{kind}:{task}", {})}.items():
        put(made, dotted, value)
    config = CONFIG_MAPPING[kind](**made)
    wanted = class_of(kind, task).config_class
    if isinstance(config, wanted):
        return config
    parts = (getattr(config, name) for name in config.sub_configs)
    return next((part for part in parts if isinstance(part, wanted)), config)


def _defaults(config: Any) -> dict[str, Any]:
    try:
        return dict(config().to_dict())
    except Exception:  # a class whose own defaults do not pass its check
        return dict(
            config(
                **{"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}}
            ).to_dict()
        )


def tiny_model(kind: str, task: str, seed: int = 0) -> Any:
    """A tiny random model of a type, in fp32 and eval mode. Every parameter is moved a little, so that every layer matters."""
    import torch

    torch.manual_seed(seed)
    config = tiny_config(kind, task)
    config._attn_implementation = "eager"
    model = class_of(kind, task)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pairs() -> Iterator[tuple[str, str]]:
    """Every type with every task it has."""
    for task in TASKS:
        for kind in types(task):
            yield kind, task
