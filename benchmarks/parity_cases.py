"""What both tools are run on: tiny models by name, and recipes in mergekit's own form that name them. Data only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

LAYERS = 6


class Model(NamedTuple):
    """A tiny random model: its config class in transformers, and what differs from the usual sizes."""

    config: str
    seed: int
    dtype: str = "float32"
    shard: str = "10GB"
    more: Mapping[str, Any] = {}


COMMON: Mapping[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 128}
MODELS: Mapping[str, Model] = {
    "llama": Model("LlamaConfig", 1),
    "llama-other": Model("LlamaConfig", 2, shard="40KB"),
    "llama-tied": Model("LlamaConfig", 3, more={"tie_word_embeddings": True}),
    "llama-bf16": Model("LlamaConfig", 4, dtype="bfloat16"),
    "llama-f16": Model("LlamaConfig", 5, dtype="float16", shard="20KB"),
    "llama-bias": Model("LlamaConfig", 6, more={"attention_bias": True, "mlp_bias": True}),
    "mistral": Model("MistralConfig", 7),
    "phi3": Model("Phi3Config", 8, dtype="bfloat16"),
    "gpt2": Model("GPT2Config", 9, more=GPT2),
    "mixtral": Model("MixtralConfig", 10, more={"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Model("Qwen2Config", 11),
    "qwen3": Model("Qwen3Config", 12, more={"head_dim": 8}),
    "gemma3": Model("Gemma3TextConfig", 13, more={"head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True}),
    "olmo": Model("OlmoConfig", 14),
}


class Case(NamedTuple):
    """A recipe for both tools."""

    name: str
    family: str
    text: str


def case(name: str, text: str, family: str = "llama") -> Case:
    return Case(name, family, text.lstrip("\n"))


def slices(*ranges: tuple[str, int, int]) -> str:
    """Slices without parameters, in mergekit's form."""
    lines = [f"- sources: [{{model: {model}, layer_range: [{start}, {stop}]}}]\n" for model, start, stop in ranges]
    return "slices:\n" + "".join(lines) + "merge_method: passthrough\n"


def of_every_family() -> Iterator[Case]:
    for family in ("llama", "mistral", "phi3", "gpt2", "mixtral", "qwen2", "qwen3", "gemma3", "olmo"):
        yield Case("cut", family, slices((family, 0, 2), (family, 4, 6)))
        yield Case("overlap", family, slices((family, 0, 4), (family, 2, 6)))
    for family in ("mistral", "phi3", "gpt2"):
        scale = "parameters: {scale: [{filter: down_proj, value: 0.7}, {filter: mlp, value: [0.25, 1.5]}, {value: 1}]}\n"
        yield Case("scale with filters", family, slices((family, 0, 5), (family, 3, 6)) + scale)
    yield Case("biases", "llama-bias", slices(("llama-bias", 0, 4), ("llama-bias", 2, 6)))


STACKS = (
    case("whole model", slices(("llama", 0, 6))),
    case("one-layer slices", slices(*(("llama", layer, layer + 1) for layer in (0, 3, 1, 1, 5)))),
    case("a layer three times", slices(("llama", 0, 3), ("llama", 2, 3), ("llama", 2, 3), ("llama", 3, 6))),
    case("interleaved windows", slices(*(("llama", start, start + 2) for start in range(5)))),
    case("two models", slices(("llama", 0, 4), ("llama-other", 2, 6))),
    case("two models, base_model", slices(("llama", 0, 4), ("llama-other", 2, 6)) + "base_model: llama-other\n"),
    case("three slices of two models", slices(("llama-other", 0, 3), ("llama", 2, 5), ("llama-other", 4, 6))),
    case("tied", slices(("llama-tied", 0, 4), ("llama-tied", 2, 6))),
    case("untied, then tied", slices(("llama", 0, 4), ("llama-tied", 2, 6)) + "base_model: llama\n"),
    case("tied, then untied", slices(("llama-tied", 0, 4), ("llama", 2, 6)) + "base_model: llama-tied\n"),
    case("models: one", "models:\n- model: llama\nmerge_method: passthrough\n"),
    case("nested references", """
slices:
- sources:
  - model: {model: {path: llama, revision: null}, lora: null, override_architecture: null}
    layer_range: [0, 4]
- sources:
  - {layer_range: [3, 6], model: {model: {path: llama}}}
merge_method: passthrough
"""),
    case("unknown keys, anchors and merge keys", """
model_tag: &M llama-bf16
extra: &env {parameters: {scale: [{filter: q_proj, value: 0.7071067812}, {filter: k_proj, value: 0.7071067812}, {value: 1.0}]}}
slices:
- sources: [{model: *M, layer_range: [0, 4]}]
- sources: [{model: *M, layer_range: [2, 6], <<: *env}]
merge_method: passthrough
"""),
    case("quoted and whole-float bounds", """
slices:
- sources: [{model: llama, layer_range: ['0', '2']}]
- sources: [{model: llama, layer_range: [4.0, 6]}]
merge_method: passthrough
"""),
)  # fmt: skip

OVERLAP = """
slices:
- sources: [{model: MODEL, layer_range: [0, 4]}]
- sources: [{model: MODEL, layer_range: [2, 6]}]
merge_method: passthrough
"""


def over(model: str, more: str) -> str:
    return OVERLAP.replace("MODEL", model) + more


DTYPES = (
    case("dtype: float16", over("llama", "dtype: float16\n")),
    case("dtype: bfloat16", over("llama", "dtype: bfloat16\n")),
    case("dtype: float32 from bfloat16", over("llama-bf16", "dtype: float32\n")),
    case("dtype: bfloat16 from float16", over("llama-f16", "dtype: bfloat16\n")),
    case("dtype of the source", over("llama-bf16", "dtype: bfloat16\n")),
    case("out_dtype alone", over("llama", "out_dtype: bfloat16\n")),
    case("dtype and out_dtype", over("llama-f16", "dtype: float32\nout_dtype: bfloat16\n")),
    case("there and back", over("llama", "dtype: bfloat16\nout_dtype: float32\n")),
    case("torch. prefix", over("llama", "dtype: torch.float16\n")),
    case("scale in bfloat16", over("llama-bf16", "parameters: {scale: 0.7}\n")),
    case("scale in float32, bfloat16 out", over("llama-bf16", "dtype: float32\nout_dtype: bfloat16\nparameters: {scale: 0.7}\n")),
    case("scale in float16", over("llama", "dtype: float16\nparameters: {scale: [0.3, 1.7]}\n")),
    case("dtypes mixed", slices(("llama", 0, 3), ("llama-bf16", 3, 6))),
    case("dtypes mixed, cast", slices(("llama", 0, 3), ("llama-bf16", 3, 6)) + "dtype: float16\n"),
)

SCALES = (
    case("scale, global", over("llama", "parameters: {scale: 0.5}\n")),
    case("scale, slice", """
slices:
- sources: [{model: llama, layer_range: [0, 4]}]
  parameters: {scale: 0.5}
- sources: [{model: llama, layer_range: [2, 6]}]
merge_method: passthrough
"""),
    case("scale, source", """
slices:
- sources: [{model: llama, layer_range: [0, 4]}]
- sources: [{model: llama, layer_range: [2, 6], parameters: {scale: 1.3}}]
merge_method: passthrough
"""),
    case("scale, all levels", """
slices:
- sources: [{model: llama, layer_range: [0, 2], parameters: {scale: 0.5}}]
  parameters: {scale: 3}
- sources: [{model: llama, layer_range: [2, 4]}]
  parameters: {scale: 2}
- sources: [{model: llama, layer_range: [3, 6]}]
merge_method: passthrough
parameters: {scale: 0.1}
"""),
    case("filters that miss hand on to the next level", """
slices:
- sources: [{model: llama, layer_range: [0, 4], parameters: {scale: [{filter: q_proj, value: 0.7}]}}]
  parameters: {scale: [{filter: down_proj, value: [0.3, 0.9]}]}
- sources: [{model: llama, layer_range: [2, 6]}]
merge_method: passthrough
parameters: {scale: [{filter: norm, value: 1}, {value: 0.5}]}
"""),
    case("filter, one mapping", over("llama", "parameters: {scale: {filter: o_proj, value: 0.7}}\n")),
    case("filter, first match", over("llama", "parameters: {scale: [{filter: proj, value: 0.9}, {filter: q_proj, value: 5}]}\n")),
    case("filter on a source layer", over("llama", "parameters: {scale: [{filter: layers.3., value: 0.5}]}\n")),
    case("filter *", over("llama", "parameters: {scale: [{filter: 'q_proj', value: 2}, {filter: '*', value: 0.5}]}\n")),
    case("filter on the ends", over("llama", "parameters: {scale: [{filter: embed_tokens, value: 2}, {filter: lm_head, value: 0.5}]}\n")),
    case("gradient of two", over("llama", "parameters: {scale: [0.25, 1]}\n")),
    case("gradient of four", over("llama", "parameters: {scale: [{filter: mlp, value: [0, 0.3, 1.1, 0.6]}]}\n")),
    case("gradient in a one-layer slice", """
slices:
- sources: [{model: llama, layer_range: [0, 3]}]
- sources: [{model: llama, layer_range: [3, 4], parameters: {scale: [0.25, 0.75]}}]
- sources: [{model: llama, layer_range: [4, 6]}]
merge_method: passthrough
"""),
    case("scale 0", over("llama", "parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0.0}]}\n")),
    case("scale -1", over("llama", "parameters: {scale: [{filter: o_proj, value: -1}]}\n")),
    case("scale 1", over("llama-bf16", "parameters: {scale: 1}\n")),
    case("scale as text", over("llama", "parameters: {scale: [{filter: mlp, value: '5e-1'}, {filter: k_proj, value: 1e-3}]}\n")),
    case("scale of the only slice", "models:\n- model: llama\n  parameters: {scale: [{filter: v_proj, value: 0.9}]}\n"
        "merge_method: passthrough\ndtype: bfloat16\n"),
    case("attenuated repeats", """
slices:
- sources: [{model: llama-f16, layer_range: [0, 2]}]
- sources: [{model: llama-f16, layer_range: [2, 4]}]
  parameters: {scale: [{filter: q_proj, value: 0.7071067812}, {filter: k_proj, value: 0.7071067812}]}
- sources: [{model: llama-f16, layer_range: [2, 6]}]
  parameters: {scale: [{filter: q_proj, value: 0.7071067812}, {filter: k_proj, value: 0.7071067812}]}
merge_method: passthrough
dtype: float16
parameters: {scale: [{value: 1}]}
"""),
)  # fmt: skip

LINEAR = """
merge_method: linear
parameters: {weight: WEIGHT}
slices:
- sources:
  - {model: llama, layer_range: [0, 1]}
  - {model: llama-other, layer_range: [0, 1], parameters: {weight: 0}}
- sources: [{model: llama, layer_range: [1, 4]}]
- sources: [{model: llama-other, layer_range: [2, 5]}]
- sources:
  - {model: llama, layer_range: [5, 6]}
  - {model: llama-other, layer_range: [5, 6], parameters: {weight: 0}}
DTYPE"""


def linear(weight: str, dtype: str = "") -> str:
    return LINEAR.replace("WEIGHT", weight).replace("DTYPE", dtype)


OTHERS = (
    case("linear, weight-0 sources", linear("1.0")),
    case("linear, weight-0 sources, cast", linear("1.0", "dtype: float16\n")),
    case("linear, weight 0.7", linear("0.7")),
    case("linear, one model", "models:\n- model: llama\n  parameters: {weight: 1}\nmerge_method: linear\ndtype: bfloat16\n"),
    case("range above the model", slices(("llama", 0, 3), ("llama", 3, 9))),
    case("range that runs backwards", slices(("llama", 0, 4), ("llama", 3, 1))),
    case("range that is empty", slices(("llama", 0, 4), ("llama", 2, 2), ("llama", 4, 6))),
)
CASES: tuple[Case, ...] = (*of_every_family(), *STACKS, *DTYPES, *SCALES, *OTHERS)
