"""Strangers: values and tensors that look as if they followed the layers, and that no rule and no recipe speaks of.

Of a model type that layercut knows, lists as long as the stack are strange. Of any other type, so are lists that rise like layer indices,
numbers equal to the depth that nothing explains, and tensors outside the layers with one part a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from layercut.anatomy import DEPTH_KEYS, MTP_KEYS, Member
from layercut.errors import RefusedError
from layercut.moves import AROUND, IN_NODE
from layercut.patterns import PATTERNS, SCALARS
from layercut.rules import NOT_PER_LAYER, RULES, whole
from layercut.towers import OTHER_STACKS
from layercut.views import Path, View

# Numbers whose name says what they count, which are no layers.
EXPLAINED = re.compile(
    r"size|dim|heads?(_|$)|token|vocab|expert|rank|window|length|position|kernel|channel|stride|expan|group|bucket|top_?k|per_tok|seed"
    r"|label|conv|state|chunk|bits|freq|theta|factor|frame|patch|image|_ids?$|^d_|embd|inner|ratio|tp$|_dim$|max_|min_|version|query"
)
# Tensors outside the layers whose first axis has another meaning.
ENDS = re.compile(r"(^|[._])(embed\w*|wte|wpe|lm_head|head|score|classifier|norm\w*|ln_?f|rotary\w*|pooler|cls|inv_freq)([._]|$)")
# Model types whose values were read in the configuration classes of transformers 5.24.
KNOWN_TYPES = frozenset(
    """
    afmoe albert apertus apertus1p5 apertus1p5_text apertus1p5_vision_tokenizer arcee aria aria_text audioflamingo3
    audioflamingo3_encoder axk1 axk2 aya_vision bailing_hybrid bamba bart beam bert bert-generation big_bird bigbird_pegasus biogpt
    bitnet blenderbot blenderbot-small blip blip-2 blip_2_qformer blip_2_vision_model blip_text_model blip_vision_model bloom blt
    blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher camembert chameleon chameleon_vqgan clip_vision_model codegen
    cohere cohere2 cohere2_moe cohere2_vision cohere_compass cohere_compass_text cohere_compass_vision convbert cosmos3_edge
    cosmos3_edge_text cosmos3_edge_vision cosmos3_omni cpmant ctrl cwm data2vec-text dbrx deberta deberta-v2 deepseek_ocr2
    deepseek_ocr2_encoder deepseek_ocr2_sam_vision_model deepseek_ocr2_text deepseek_ocr2_vision deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 deepseek_vl deepseek_vl_hybrid diffllama diffusion_gemma diffusion_gemma_text distilbert doge dory dots1 dots3_note
    dots3_note_audio_encoder dots3_note_text dots3_note_vision_encoder electra emu3 emu3_text_model emu3_vqgan encodec encoder-decoder
    ernie ernie4_5 ernie4_5_moe ernie4_5_vl_moe ernie4_5_vl_moe_text ernie4_5_vl_moe_vision esm esmc eurobert evolla exaone exaone4
    exaone4_5 exaone4_5_vision exaone_moe falcon falcon_h1 falcon_mamba fast_vlm flaubert flex_olmo flint florence2 florence_vision fnet
    fsmt funnel fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_audio gemma3n_text gemma3n_vision gemma4 gemma4_assistant
    gemma4_audio gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_audio gemma4_unified_text gemma4_unified_vision
    gemma4_vision git git_vision_model glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm4v_moe_text glm4v_moe_vision glm4v_text
    glm4v_vision glm5_next glm5_next_text glm5_next_vision glm_moe_dsa glm_ocr glm_ocr_text glm_ocr_vision glmasr glmasr_encoder glmga
    got_ocr2 got_ocr2_vision gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite4_vision
    granite4_vision_text granite_docling granite_docling_text granite_docling_vision granite_speech granite_speech_encoder
    granite_speech_plus granite_speech_plus_encoder granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared gte helium
    hrm_text hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl hunyuan_vl_text hunyuan_vl_vision hy_v3 hy_v4 hy_v4_vl hy_v4_vl_text
    hy_v4_vl_vision hyperclovax hyperclovax_vision_v2 ibert idefics idefics2 idefics2_perceiver idefics2_vision idefics3 idefics3_vision
    idefics_perciever idefics_vision inkling2 inkling2_loop inkling2_loop_text inkling2_text inkling2_vision inkling_audio
    inkling_mm_model inkling_text inkling_vision instructblip instructblip_qformer instructblip_vision_model instructblipvideo
    instructblipvideo_qformer instructblipvideo_vision_model internlm3 internvl internvl_vision iquestcoder jais2 jamba janus
    janus_vision_model janus_vqgan jetmoe jina_embeddings_v3 kimi_k25 kimi_k25_vision kimi_linear kolibri1 kosmos-2 kosmos-2.5
    kosmos_2_5_text_model kosmos_2_5_vision_model kosmos_2_text_model kosmos_2_vision_model laguna lara_mini layoutlm led lfm2 lfm2_moe
    lfm2_vl lfm3 lfm3_vl lfm3_vl_vision lighton_ocr llama llama4 llama4_text llama4_vision_model llava llava_next llava_next_video
    llava_onevision longcat_flash longformer longt5 luke m2m_100 mamba mamba2 marian mbart megatron-bert mellum mimi mimo_v2_flash
    minicpm3 minicpm_ocr minicpm_ocr_vision minicpmv4_6 minicpmv4_6_vision minicpmv4_7 minicpmv4_7_vision minimax minimax_m2
    minimax_m3_vl minimax_m3_vl_text minimax_m3_vl_vision ministral ministral3 mistral mistral3 mistral4 mistral_large4
    mistral_large4_text mixtral mllama mllama_text_model mllama_vision_model mobilebert modernbert modernbert-decoder modernvbert molmo2
    molmo2_adapter molmo2_text molmo2_vision moshi moshi_depth moss_transcribe_diarize moss_transcribe_diarize_audio mpnet mpt mra mt5
    muse_glimmer muse_glimmer_text muse_glimmer_vision muse_spark muse_spark_audio muse_spark_text muse_spark_vision musicflamingo
    musicgen musicgen_decoder musicgen_melody musicgen_melody_decoder mvp nanochat nemo_speechlm nemotron
    nemotron3_5_transcribe_asr_audio nemotron3_5_transcribe_audio nemotron3_5_transcribe_word_timestamp nemotron3_diarization
    nemotron3_diarization_audio nemotron_h nemotron_h_omni neomme nllb-moe nomic_bert nystromformer olmo olmo2 olmo3 olmo_hybrid olmoe
    omniasr omniasr_audio openai-gpt opt ovis2 ovis2_vision paddleocr_vl paddleocr_vl_text paddleocr_vl_vision paligemma pegasus
    pegasus_x perceiver perception_lm persimmon phi phi3 phi4_multimodal phi4_multimodal_audio phi4_multimodal_vision phimoe pi0
    pix2struct pix2struct_text_model pix2struct_vision_model pixtral plbart pp_chart2table pp_chart2table_vision pp_formulanet
    pp_formulanet_text pp_formulanet_vision prophetnet qianfan_ocr qianfan_ocr_vision qwen2 qwen2_5_omni_audio_encoder qwen2_5_omni_text
    qwen2_5_omni_thinker qwen2_5_omni_vision_encoder qwen2_5_vl qwen2_5_vl_text qwen2_5_vl_vision qwen2_audio qwen2_audio_encoder
    qwen2_moe qwen2_vl qwen2_vl_text qwen2_vl_vision qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_moe_vision qwen3_5_text
    qwen3_5_vision qwen3_asr qwen3_asr_encoder qwen3_moe qwen3_next qwen3_omni_moe_audio_encoder qwen3_omni_moe_text
    qwen3_omni_moe_thinker qwen3_omni_moe_vision_encoder qwen3_vl qwen3_vl_moe qwen3_vl_moe_text qwen3_vl_moe_vision qwen3_vl_text
    qwen3_vl_vision qwen4_exp qwen4_exp_text qwen4_exp_vision radio recurrent_gemma reformer rembert roberta roberta-prelayernorm
    roc_bert roformer rwkv sam_vision_model sarvam_mla sarvam_moe seamless_m4t seamless_m4t_v2 seed_oss shieldgemma2
    siglip2_vision_model siglip_vision_model smollm3 smolvlm smolvlm_vision solar_open squeezebert stablelm starcoder2 step3p5
    step3p5_vision step3p7 switch_transformers t5 t5_gemma_module t5gemma t5gemma2 t5gemma2_decoder t5gemma2_encoder t5gemma2_text tapas
    timm_wrapper trocr udop ultrabert ultravbert umt5 unlimited_ocr unlimited_ocr_sam_vision_model unlimited_ocr_text
    unlimited_ocr_vision unlimited_ocr_vision_encoder vaultgemma vibevoice_acoustic_tokenizer_encoder vibevoice_asr video_llama_3
    video_llama_3_vision video_llava vipllava vision-encoder-decoder vit voxtral voxtral_encoder voxtral_realtime
    voxtral_realtime_encoder voxtral_realtime_text wavtokenizer_encoder whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xlstm xmod
    yoso youtu zamba zamba2 zaya
    """.split()  # noqa: SIM905 - a list would take four times the lines
)


class Stranger(NamedTuple):
    """Something that may follow the layers: its name, what it is, and the word that would declare it."""

    name: str
    what: str
    word: str


def check_strangers(member: Member, view: View) -> None:
    """Raise RefusedError with everything that may follow the layers and is not declared."""
    found = [*_lists(view), *_values(view), *(_tensors(member) if view.kind not in KNOWN_TYPES else ())]
    if not found:
        return
    listed = ", ".join(f"{stranger.name} ({stranger.what})" for stranger in found[:6]) + (", ..." if len(found) > 6 else "")
    words = "; ".join(f"{word}: [{', '.join(s.name for s in found if s.word == word)}]" for word in dict.fromkeys(s.word for s in found))
    plural = "these follow" if len(found) > 1 else "this follows"
    raise RefusedError(
        f"layercut does not know whether {plural} the layers: {listed}",
        hint=f"declare it in the recipe under 'architecture' (perhaps {words}), or as ignore: [...] what does not",
    )


def _lists(view: View) -> Iterator[Stranger]:
    """Lists of tensors beside the layers, as long as the stack."""
    for prefix in view.stack.suspects:
        yield Stranger(prefix.rstrip("."), f"tensors numbered from 0 to {view.stack.depth + view.stack.extra - 1}", "prefixes")


def _values(view: View) -> Iterator[Stranger]:
    """Values of the node of the stack, and of plain dicts in it."""
    ruled = {key for pattern in PATTERNS for key in pattern.keys if pattern.applies(view.node, view.stack)}
    ruled |= {scalar.key for scalar in SCALARS}
    for key, value in view.written.items():
        if key in (*NOT_PER_LAYER, *DEPTH_KEYS, *MTP_KEYS, *ruled) or key in IN_NODE or _is_around(key):
            continue
        if view.rule((key,)) is not None or view.of_other_side(key) or OTHER_STACKS.search(key):
            continue
        inner = value if isinstance(value, Mapping) and view.kind not in KNOWN_TYPES and not _is_node(value) else {}
        for path, part in (((key,), value), *(((key, name), part) for name, part in inner.items())):
            yield from _strange(view, path, part)


def _is_around(key: str) -> bool:
    return any(key in keys for keys in AROUND.values())


def _is_node(value: Mapping[str, Any]) -> bool:
    return "model_type" in value or any(key in value for key in DEPTH_KEYS)


def _strange(view: View, path: Path, value: Any) -> Iterator[Stranger]:
    stack, name = view.stack, path[-1]
    full = (*stack.node, *path)
    declared = stack.declared
    if declared.names((*declared.ignore, *declared.depth_keys), full) or view.rule(path) is not None:
        return
    unknown, dotted = view.kind not in KNOWN_TYPES, view.dotted(path)
    named = "layer" in name or "depth" in name
    if isinstance(value, list) and len(value) in (stack.depth, stack.depth + view.extra):
        if not unknown and len(path) > 1:
            return
        yield Stranger(dotted, f"a list of {len(value)} entries", "lists")
    elif isinstance(value, str) and unknown and len(value) == stack.depth > 2 and len(set(value)) < 4 and name not in RULES:
        yield Stranger(dotted, f"a text of {len(value)} letters", "lists")
    elif isinstance(value, list) and unknown and value and all(map(whole, value)):
        rising = all(left < right for left, right in pairwise(value))
        if rising and value[0] >= 0 and value[-1] <= stack.depth:
            yield Stranger(dotted, "a list of numbers below the number of layers", "indices")
    elif whole(value) and value == stack.depth and (named or (unknown and not EXPLAINED.search(name))):
        yield Stranger(dotted, f"{value}, the number of layers", "depth_keys")


def _tensors(member: Member) -> Iterator[Stranger]:
    """Tensors outside every numbered list with one part a layer."""
    checkpoint, stack = member
    told = (*stack.declared.tables, *stack.declared.ignore)
    for tensor in checkpoint.tensors.values():
        numbered = any(part.isdigit() for part in tensor.name.split("."))
        outside = not numbered and not OTHER_STACKS.search(tensor.name) and not ENDS.search(tensor.name)
        if outside and tensor.shape and tensor.shape[0] == stack.depth > 1 and tensor.name not in told:
            yield Stranger(tensor.name, f"a tensor of shape {list(tensor.shape)}", "tables")
