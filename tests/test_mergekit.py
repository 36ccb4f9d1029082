from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import failure
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.errors import RecipeError
from layercut.mergekit import OWN_KEYS, Translation, recognised, translate
from layercut.recipe import Recipe
from layercut.yamltext import YamlText

RECIPES = Path(__file__).parent.parent / "recipes"


def read(text: str) -> Translation:
    return translate(YamlText(text, "m.yaml"))


def refusal(text: str) -> str:
    return failure(RecipeError, lambda: read(text))


def stacked(*slices: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": model, "layer_range": [start, stop]}]} for model, start, stop in slices]


# Recipes as they stand on model cards.
XWIN, EURYALE = "Xwin-LM/Xwin-LM-70B-V0.1", "Sao10K/Euryale-1.3-L2-70B"
GOLIATH = f"""\
slices:
  - sources:
    - model: {XWIN}
      layer_range: [0, 16]
  - sources:
    - model: {EURYALE}
      layer_range: [8, 24]
  - sources:
    - model: {XWIN}
      layer_range: [17, 32]
  - sources:
    - model: {EURYALE}
      layer_range: [25, 40]
  - sources:
    - model: {XWIN}
      layer_range: [33, 48]
  - sources:
    - model: {EURYALE}
      layer_range: [41, 56]
  - sources:
    - model: {XWIN}
      layer_range: [49, 64]
  - sources:
    - model: {EURYALE}
      layer_range: [57, 72]
  - sources:
    - model: {XWIN}
      layer_range: [65, 80]
merge_method: passthrough
dtype: float16
"""
GOLIATH_DATA = {
    "slices": stacked(
        (XWIN, 0, 16), (EURYALE, 8, 24), (XWIN, 17, 32), (EURYALE, 25, 40), (XWIN, 33, 48),
        (EURYALE, 41, 56), (XWIN, 49, 64), (EURYALE, 57, 72), (XWIN, 65, 80),
    ),
    "dtype": "float16",
}  # fmt: skip

MIQU, LZLV = "152334H/miqu-1-70b-sf", "lizpreciatior/lzlv_70b_fp16_hf"
MIQULIZ = f"""\
merge_method: linear
parameters:
  weight: 1.0
slices:
  - sources:
      - model: {MIQU}
        layer_range: [0, 1]
      - model: {LZLV}
        layer_range: [0, 1]
        parameters:
          weight: 0
  - sources:
      - model: {MIQU}
        layer_range: [1, 20]
  - sources:
      - model: {LZLV}
        layer_range: [10, 30]
  - sources:
      - model: {MIQU}
        layer_range: [20, 40]
  - sources:
      - model: {LZLV}
        layer_range: [30, 50]
  - sources:
      - model: {MIQU}
        layer_range: [40, 60]
  - sources:
      - model: {LZLV}
        layer_range: [50, 70]
  - sources:
      - model: {MIQU}
        layer_range: [60, 79]
  - sources:
      - model: {MIQU}
        layer_range: [79, 80]
      - model: {LZLV}
        layer_range: [79, 80]
        parameters:
          weight: 0
dtype: float16
tokenizer_source: model:{MIQU}
"""
MIQULIZ_DATA = {
    "slices": stacked(
        (MIQU, 0, 1), (MIQU, 1, 20), (LZLV, 10, 30), (MIQU, 20, 40), (LZLV, 30, 50),
        (MIQU, 40, 60), (LZLV, 50, 70), (MIQU, 60, 79), (MIQU, 79, 80),
    ),
    "dtype": "float16",
    "tokenizer_source": MIQU,
}  # fmt: skip
MIQULIZ_NOTES = (
    f"m.yaml:8:9: a source of weight 0 is left out, '{LZLV}'",
    f"m.yaml:36:9: a source of weight 0 is left out, '{LZLV}'",
)

LLAMA3 = "meta-llama/Meta-Llama-3-70B-Instruct"
LLAMA_120B = (
    "slices:\n"
    + "".join(f"- sources:\n  - layer_range: [{start}, {start + 20}]\n    model: {LLAMA3}\n" for start in range(0, 70, 10))
    + "merge_method: passthrough\ndtype: float16\n"
)
LLAMA_120B_DATA = {"slices": stacked(*((LLAMA3, start, start + 20) for start in range(0, 70, 10))), "dtype": "float16"}

SOLAR = """\
slices:
  - sources:
    - model: mistralai/Mistral-7B-v0.1
      layer_range:
        - 0
        - 24
  - sources:
    - model: "mistralai/Mistral-7B-v0.1"
      layer_range: ['8', 32.0] # half-open
merge_method: "passthrough"
dtype: torch.bfloat16
out_dtype: same
chat_template: auto
"""
SOLAR_DATA = {"slices": stacked(("mistralai/Mistral-7B-v0.1", 0, 24), ("mistralai/Mistral-7B-v0.1", 8, 32)), "dtype": "bfloat16"}

# mergekit itself wrote references this way into mergekit_config.yml.
NESTED = """\
base_model: meta-llama/Meta-Llama-3-8B-Instruct
dtype: bfloat16
merge_method: passthrough
slices:
- sources:
  - layer_range: [0, 21]
    model:
      model:
        path: meta-llama/Meta-Llama-3-8B-Instruct
        revision: null
      lora: null
      override_architecture: null
- sources:
  - layer_range: [29, 32]
    model:
      model:
        path: meta-llama/Meta-Llama-3-8B-Instruct
        revision: e1945c40cd546c78e41f1151f4db032b271faeaa
tokenizer_source: base
"""
NESTED_DATA = {
    "base_model": "meta-llama/Meta-Llama-3-8B-Instruct",
    "dtype": "bfloat16",
    "slices": stacked(
        ("meta-llama/Meta-Llama-3-8B-Instruct", 0, 21),
        ("meta-llama/Meta-Llama-3-8B-Instruct@e1945c40cd546c78e41f1151f4db032b271faeaa", 29, 32),
    ),
    "tokenizer_source": "base",
}

PRUNEME = """\
slices:
  - sources:
    - model: mistralai/Mistral-7B-Instruct-v0.2
      layer_range: [0, 21]
  - sources:
    - model: mistralai/Mistral-7B-Instruct-v0.2
      layer_range: [29,32]

merge_method: passthrough
dtype: bfloat16
"""
PRUNEME_DATA = {
    "slices": stacked(("mistralai/Mistral-7B-Instruct-v0.2", 0, 21), ("mistralai/Mistral-7B-Instruct-v0.2", 29, 32)),
    "dtype": "bfloat16",
}

# The published file holds the whole recipe twice.
TWICE = "slices:\n  - sources:\n    - {model: org/a, layer_range: [0, 20]}\nmerge_method: passthrough\ndtype: float16\n"
TWICE += TWICE.replace("20", "24").replace("float16", "bfloat16")
TWICE_DATA = {"slices": stacked(("org/a", 0, 24)), "dtype": "bfloat16"}
TWICE_NOTES = (
    "m.yaml:6:1: key 'slices' stands twice in one mapping, the last one counts",
    "m.yaml:9:1: key 'merge_method' stands twice in one mapping, the last one counts",
    "m.yaml:10:1: key 'dtype' stands twice in one mapping, the last one counts",
)

ATTENUATED = """\
const_tag: &MODEL org/miqu
const_tag: &qk_factor 0.7071067812
const_tag: &out_factor 0.5

attenuate-env: &attenuated_env
  parameters:
    scale:
      - filter: q_proj
        value: *qk_factor
      - filter: k_proj
        value: *qk_factor
      - filter: down_proj
        value: *out_factor
      - value: 1.0

slices:
  - sources:
    - model: *MODEL
      layer_range: [0, 20]
  - sources:
    - model: *MODEL
      layer_range: [10, 30]
      <<: *attenuated_env
merge_method: passthrough
"""
ATTENUATED_DATA = {
    "slices": [
        {"sources": [{"model": "org/miqu", "layer_range": [0, 20]}]},
        {
            "sources": [
                {
                    "model": "org/miqu",
                    "layer_range": [10, 30],
                    "parameters": {
                        "scale": [
                            {"filter": "q_proj", "value": 0.7071067812},
                            {"filter": "k_proj", "value": 0.7071067812},
                            {"filter": "down_proj", "value": 0.5},
                            {"value": 1.0},
                        ]
                    },
                }
            ]
        },
    ]
}
ATTENUATED_NOTES = ("m.yaml:3:1: unknown key 'const_tag' is ignored", "m.yaml:5:1: unknown key 'attenuate-env' is ignored")

PROFESSOR = """\
merge_method: linear # use linear so we can include multiple models, albeit at a zero weight
parameters:
  weight: 1.0 # weight everything as 1 unless specified otherwise
slices:
  - sources:
      - model: org/synthia # a dummy, and the first one here
        layer_range: [0, 1]
        parameters:
          weight: 0
      - model: org/dolphin # embed_tokens comes along with whatever is the first layer
        layer_range: [0, 1]
  - sources:
      - model: org/dolphin
        layer_range: [1, 20]
        parameters:
          weight: [0.5, 1]
  - sources: # for lm_head with the last layer
      - model: org/dolphin
        layer_range: [79, 80]
      - model: org/math
        layer_range: [79, 80]
        parameters:
          weight:
            - filter: lm_head
              value: [0, 0]
            - value: "0.0"
dtype: float16
tokenizer_source: model:org/dolphin
"""
PROFESSOR_DATA = {
    "slices": stacked(("org/dolphin", 0, 1), ("org/dolphin", 1, 20), ("org/dolphin", 79, 80)),
    "dtype": "float16",
    "tokenizer_source": "org/dolphin",
}
PROFESSOR_NOTES = (
    "m.yaml:6:9: a source of weight 0 is left out, 'org/synthia'",
    "m.yaml:20:9: a source of weight 0 is left out, 'org/math'",
)

LLAMA_PRO = """\
slices:
  - sources:
      - model: openchat/openchat-3.5-0106
        layer_range: [0, 4]
  - sources:
      - model: openchat/openchat-3.5-0106
        layer_range: [3, 4]
        parameters:
          scale:
            - filter: o_proj
              value: 0.0
            - filter: down_proj
              value: 0.0
            - value: 1.0
merge_method: passthrough
dtype: bfloat16
"""
ZEROED = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
LLAMA_PRO_DATA = {
    "slices": [
        {"sources": [{"model": "openchat/openchat-3.5-0106", "layer_range": [0, 4]}]},
        {"sources": [{"model": "openchat/openchat-3.5-0106", "layer_range": [3, 4], "parameters": {"scale": ZEROED}}]},
    ],
    "dtype": "bfloat16",
}

BAKLLAMA = """\
layer_slices:
  - model: org/a
    start: 0
    end: 16
  - model: org/b
    start: '8'
    end: 24
    scale: 0.75
embedding_source: org/a/
lm_head_source: org/b
"""
BAKLLAMA_DATA = {
    "slices": [
        {"model": "org/a", "layer_range": [0, 16]},
        {"model": "org/b", "layer_range": [8, 24], "parameters": {"scale": [{"filter": "down_proj", "value": 0.75}]}},
    ]
}

VISION = """\
merge_method: passthrough
modules:
  vision_tower:
    models:
      - model: google/gemma-3-4b-it
  multi_modal_projector:
    models: [{model: {model: {path: google/gemma-3-4b-it}}}]
  text_decoder:
    parameters: {scale: {filter: down_proj, value: 0.5}}
    slices:
      - sources:
          - model: google/gemma-3-4b-it
            layer_range: [0, 20]
      - sources:
          - model: google/gemma-3-4b-it
            layer_range: [26, 34]
dtype: bfloat16
"""
VISION_DATA = {
    "slices": stacked(("google/gemma-3-4b-it", 0, 20), ("google/gemma-3-4b-it", 26, 34)),
    "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}]},
    "dtype": "bfloat16",
}

CARDS = {
    "goliath": (GOLIATH, GOLIATH_DATA, ()),
    "miquliz-v2": (MIQULIZ, MIQULIZ_DATA, MIQULIZ_NOTES),
    "llama-3-120b": (LLAMA_120B, LLAMA_120B_DATA, ()),
    "solar": (SOLAR, SOLAR_DATA, ()),
    "nested": (NESTED, NESTED_DATA, ()),
    "pruneme": (PRUNEME, PRUNEME_DATA, ()),
    "twice": (TWICE, TWICE_DATA, TWICE_NOTES),
    "attenuated": (ATTENUATED, ATTENUATED_DATA, ATTENUATED_NOTES),
    "professor": (PROFESSOR, PROFESSOR_DATA, PROFESSOR_NOTES),
    "llama-pro": (LLAMA_PRO, LLAMA_PRO_DATA, ()),
    "bakllama": (BAKLLAMA, BAKLLAMA_DATA, ()),
    "vision": (VISION, VISION_DATA, ()),
}


@pytest.mark.parametrize("card", CARDS)
def test_recipes_of_model_cards_are_taken_as_they_are(card: str) -> None:
    text, data, notes = CARDS[card]
    source = YamlText(text, "m.yaml")
    before = copy.deepcopy(source.data)
    assert recognised(source.data)
    found = translate(source)
    assert found.data == {**data, "merge_method": "passthrough"}
    assert found.notes == notes
    assert source.data == before


@pytest.mark.parametrize("card", ["goliath", "llama-3-120b", "solar", "pruneme", "twice"])
def test_whole_numbers_stay_whole(card: str) -> None:
    for part in read(CARDS[card][0]).data["slices"]:
        assert [type(bound) for bound in part["sources"][0]["layer_range"]] == [int, int]


ONE = "slices:\n  - sources:\n      - model: a\n        layer_range: [0, 2]\n"  # four lines
PASS = "merge_method: passthrough\n" + ONE  # five lines
WHOLE = "merge_method: passthrough\nmodels:\n  - model: a\n"  # three lines
LINEAR = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"  # three lines
TEXT = "modules:\n  text_decoder:\n    slices:\n      - sources:\n          - {model: a, layer_range: [0, 2]}\n"  # five lines
MERGE = "; merge it into the model first, for example with peft's merge_and_unload"
MOVES = ", and layercut only moves layers; use mergekit-"
DTYPE = "is one of float16, bfloat16, float32, float64, found"
NONE = "leave it out to keep that of the source"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"merge_method: slerp\n{ONE}", f"m.yaml:1:15: merge_method 'slerp' blends the tensors of models{MOVES}yaml for it"),
        (f"{ONE}merge_method: dare_ties\n", f"m.yaml:5:15: merge_method 'dare_ties' blends the tensors of models{MOVES}yaml for it"),
        ("merge_method: linear\nmodel: a\n", f"m.yaml:1:15: merge_method 'linear' blends the tensors of models{MOVES}yaml for it"),
        (f"merge_method: Passthrough\n{ONE}", "m.yaml:1:15: unknown merge_method 'Passthrough'; did you mean 'passthrough'?"),
        (f"merge_method: passthru\n{ONE}", "m.yaml:1:15: unknown merge_method 'passthru'; did you mean 'passthrough'?"),
        (f"merge_method: stack\n{ONE}", "m.yaml:1:15: unknown merge_method 'stack'; layers are moved by 'passthrough'"),
        (f"merge_method: 3\n{ONE}", "m.yaml:1:15: unknown merge_method 3; layers are moved by 'passthrough'"),
        (f"merge_method:\n{ONE}", "m.yaml:1:14: 'merge_method' is empty; layers are moved by 'passthrough'"),
        (
            f"{PASS}      - model: a\n        layer_range: [4, 6]\n",
            "m.yaml:4:7: passthrough takes exactly one source a slice, found 2; give each a slice of its own",
        ),
        (f"{WHOLE}  - model: b\n", "m.yaml:3:3: passthrough takes one model in 'models', found 2; give each a slice of its own"),
        ("merge_method: passthrough\nmodels: []\n", "m.yaml:2:9: 'models' is empty"),
        ("merge_method: passthrough\nmodels: [a]\n", "m.yaml:2:10: an entry of 'models' is a mapping with 'model'"),
        (
            f"{WHOLE}    layer_range: [0, 2]\n",
            "m.yaml:4:5: 'models' takes whole models, without 'layer_range'; write slices: [{sources: [{model, layer_range}]}]",
        ),
        (
            f"{PASS}models: [{{model: a}}]\n",
            "m.yaml:6:1: 'slices' and 'models' in one file; a file has one of slices, models, modules, layer_slices",
        ),
        (
            f"{LINEAR}  - {{model: b, parameters: {{weight: 0.5}}}}\n",
            f"m.yaml:3:3: merge_method 'linear' blends 2 sources here{MOVES}yaml for it, or give all but one the weight 0",
        ),
        (
            f"{LINEAR}  - {{model: b}}\n",
            f"m.yaml:3:3: merge_method 'linear' blends 2 sources here{MOVES}yaml for it, or give all but one the weight 0",
        ),
        ("merge_method: linear\nmodels:\n  - model: a\nparameters: {weight: 0}\n", "m.yaml:3:3: every source has weight 0"),
        (
            f"{LINEAR}  - {{model: b, parameters: {{weight: [0, 0.5]}}}}\n",
            "m.yaml:4:37: the weight is 0 or changes its sign for some layers or tensors; use mergekit-yaml for it",
        ),
        (
            f"{LINEAR}  - {{model: b, parameters: {{weight: {{filter: mlp, value: 0}}}}}}\n",  # 1 for the rest
            "m.yaml:4:37: the weight is 0 or changes its sign for some layers or tensors; use mergekit-yaml for it",
        ),
        (f"{LINEAR}  - {{model: b, parameters: {{weight: heavy}}}}\n", "m.yaml:4:37: a weight is a number, found 'heavy'"),
        (f"{LINEAR}  - {{model: b, parameters: {{weight: .nan}}}}\n", "m.yaml:4:37: a weight is a number, found NaN"),
        (f"{LINEAR}  - {{model: b, parameters: {{weight: true}}}}\n", "m.yaml:4:37: a weight is a number, found true"),
        (
            "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 2}}\nparameters: {normalize: false}\n",
            "m.yaml:3:37: with 'normalize: false' the weight scales the layers; write merge_method: passthrough and parameters: {scale: …}",
        ),
        (f"{LINEAR}base_model: b\n", "m.yaml:4:13: linear blends 'base_model' with 'models'; leave it out, or list it in 'models' too"),
        (
            "base_model: a\ngate_mode: hidden\nexperts:\n  - source_model: b\n",
            f"m.yaml:3:1: a mixture-of-experts file makes routers and experts{MOVES}moe for it",
        ),
        ("genome:\n  models: [a]\ntasks: []\n", f"m.yaml:1:1: an evolution file searches for blending weights{MOVES}evolve for it"),
        (f"{PASS}dtype: bfloat\n", f"m.yaml:6:8: 'dtype' {DTYPE} 'bfloat'; did you mean 'bfloat16'?"),
        (f"{PASS}dtype: torch.int64\n", f"m.yaml:6:8: 'dtype' {DTYPE} 'torch.int64'; {NONE}"),
        (f"{PASS}dtype: same\n", f"m.yaml:6:8: 'dtype' {DTYPE} 'same'; {NONE}"),
        (f"{PASS}out_dtype: [float16]\n", f"m.yaml:6:12: 'out_dtype' {DTYPE} [\"float16\"]; {NONE}"),
        ("merge_method: passthrough\nslice: []\n", "m.yaml:2:1: unknown key 'slice'; did you mean 'slices'?"),
        ("merge_method: passthrough\nslices:\n  - source: []\n", "m.yaml:3:5: unknown key 'source'; did you mean 'sources'?"),
        (PASS.replace("layer_range", "layer_rnage"), "m.yaml:5:9: unknown key 'layer_rnage'; did you mean 'layer_range'?"),
        (f"{PASS}parameters: {{scale: {{filter: a, vlaue: 1}}}}\n", "m.yaml:6:33: unknown key 'vlaue'; did you mean 'value'?"),
        (PASS.replace("model: a", "model: a+b/c"), f"m.yaml:4:16: no folder 'a+b/c'; LoRA adapters are not applied (+b/c){MERGE}"),
        (PASS.replace("model: a", "model: {model: a, lora: b}"), f"m.yaml:4:33: LoRA adapters are not applied{MERGE}"),
        (PASS.replace("model: a", "model: {path: a, revision: 123}"), "m.yaml:4:36: 'revision' is text, found 123; put it in quotes"),
        (
            PASS.replace("model: a", "model: {path: a@x, revision: y}"),
            "m.yaml:4:38: 'revision' stands beside a path that has one, 'a@x'",
        ),
        (PASS.replace("model: a", "model: {revision: y}"), "m.yaml:4:16: a model reference is text, or a mapping with 'path'"),
        (PASS.replace("model: a", "model: {pth: a}"), "m.yaml:4:17: unknown key 'pth'; did you mean 'path'?"),
        (
            f"{PASS}tokenizer: {{source: base, tokens: {{x: {{source: a}}}}}}\n",
            "m.yaml:6:27: not a layer operation: tokenizer.tokens changes the vocabulary; use mergekit-yaml for it",
        ),
        (
            f"{PASS}tokenizer: {{pad_to_multiple_of: 8}}\n",
            "m.yaml:6:13: not a layer operation: tokenizer.pad_to_multiple_of changes the vocabulary; "
            "use transformers' resize_token_embeddings for it",
        ),
        (
            f"{PASS}tokenizer: base\n",
            "m.yaml:6:12: 'tokenizer' is a mapping such as {source: base}; for a model alone write tokenizer_source",
        ),
        (
            f"{PASS}tokenizer_source: a\ntokenizer: {{source: base}}\n",
            "m.yaml:7:1: 'tokenizer_source' and 'tokenizer' in one file; leave one of them out",
        ),
        (
            "layer_slices:\n  - {model: a, start: 0, end: 4}\nembedding_source: b\n",
            "m.yaml:3:19: 'embedding_source' is not the model of the first slice, 'a'; layercut takes it from there",
        ),
        (
            "layer_slices:\n  - {model: a, start: 0, end: 4}\nlm_head_source: b\n",
            "m.yaml:3:17: 'lm_head_source' is not the model of the last slice, 'a'; layercut takes it from there",
        ),
        ("layer_slices:\n  - {model: a, start: 0}\n", "m.yaml:2:5: 'end' is missing"),
        ("layer_slices:\n  - {model: a, start: 0, ends: 4}\n", "m.yaml:2:26: unknown key 'ends'; did you mean 'end'?"),
        ("layer_slices:\n  - a\n", "m.yaml:2:5: an entry of 'layer_slices' is a mapping with model, start and end"),
        (
            "merge_method: linear\nlayer_slices: []\n",
            f"m.yaml:1:15: merge_method 'linear' blends the tensors of models{MOVES}yaml for it",
        ),
        (
            "modules:\n  encoder:\n    models: [{model: a}]\nmerge_method: passthrough\n",
            "m.yaml:1:1: 'modules' is a mapping in which one module has the text layers; "
            "name it text_decoder (or default, or language_model)",
        ),
        (f"{TEXT}    models: [{{model: a}}]\n", "m.yaml:3:5: a module takes either 'slices' or 'models'"),
        (
            f"{TEXT}  vision_tower:\n    models: [{{model: b}}]\n",
            "m.yaml:7:22: 'vision_tower' is that of 'b', but all that is not a text layer comes from 'a'; "
            "'base_model' says where it comes from",
        ),
        (
            f"{TEXT}  vision_tower:\n    models: [{{model: a}}]\nbase_model: b\n",
            "m.yaml:7:22: 'vision_tower' is that of 'a', but all that is not a text layer comes from 'b'; "
            "'base_model' says where it comes from",
        ),
        (
            f"{TEXT}  vision_tower:\n    slices: []\n",
            "m.yaml:7:5: layercut cuts the text layers only, and 'vision_tower' is not copied whole; write models: [{model: …}] for it",
        ),
        (
            f"{TEXT}  vision_tower:\n    models: [{{model: a, parameters: {{scale: 2}}}}]\n",
            "m.yaml:7:5: layercut scales the text layers only, not 'vision_tower'",
        ),
        (
            f"{TEXT}  vision_tower:\n    models: [{{model: a}}]\nparameters: {{scale: 2}}\n",
            "m.yaml:8:21: this scale is for 'vision_tower' too; write it below modules.text_decoder only",
        ),
        (
            f"{TEXT}    parameters: {{scale: 2}}\nparameters: {{scale: 3}}\n",
            "m.yaml:7:21: this scale stands beside that of 'text_decoder'; write it below modules.text_decoder only",
        ),
    ],
)
def test_what_does_not_move_layers_is_refused_where_it_stands(text: str, message: str) -> None:
    assert recognised(YamlText(text, "m.yaml").data)
    assert refusal(text) == message


A = {"sources": [{"model": "a", "layer_range": [0, 2]}]}


@pytest.mark.parametrize(
    ("text", "data", "notes"),
    [
        (PASS, {"slices": [A]}, ()),
        (f"modules:\nbase_model:\nparameters:\ndtype: null\n{PASS}", {"slices": [A]}, ()),
        (WHOLE, {"slices": [{"sources": [{"model": "a", "layer_range": [0, "end"]}]}]}, ()),
        (f"{WHOLE}base_model: b/\n", {"slices": [{"sources": [{"model": "a", "layer_range": [0, "end"]}]}], "base_model": "b"}, ()),
        (
            f"{WHOLE}    parameters: {{scale: 2}}\n",
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, "end"], "parameters": {"scale": 2}}]}]},
            (),
        ),
        (
            f"{LINEAR}  - {{model: b@main, parameters: {{weight: 0}}}}\nbase_model: b@main\ntokenizer: {{}}\n",
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, "end"]}]}], "base_model": "b@main", "tokenizer_source": "union"},
            (
                "m.yaml:4:5: a source of weight 0 is left out, 'b@main'",
                "m.yaml:6:12: the union is that of the models that are left: those of weight 0 are left out",
            ),
        ),
        (
            f"merge_method: linear\n{ONE}    parameters: {{weight: -3, int8_mask: true, scale: 2}}\n",
            {"slices": [A]},
            (
                "m.yaml:6:30: parameter 'int8_mask' is ignored: nothing is blended",
                "m.yaml:6:47: parameter 'scale' is ignored: merge_method 'linear' has none; write passthrough to scale",
            ),
        ),
        (f"merge_method: linear\n{ONE}parameters: {{normalize: false, weight: 1}}\n", {"slices": [A]}, ()),
        (f"merge_method: linear\n{ONE}parameters: {{normalize: true, weight: 7}}\n", {"slices": [A]}, ()),
        (f"merge_method: linear\n{ONE}", {"slices": [A]}, ()),
        (
            f"{PASS}        weight: 0.5\n    base_model: b\n    residual_weight: 0.5\n    extra: 1\n",
            {"slices": [A]},
            (
                "m.yaml:7:5: 'base_model' of a slice is ignored: nothing is blended",
                "m.yaml:8:5: 'residual_weight' of a slice is ignored: nothing is blended",
                "m.yaml:9:5: unknown key 'extra' is ignored",
                "m.yaml:6:9: unknown key 'weight' is ignored",
            ),
        ),
        (
            f'{PASS}dtypee: float16\nbogus_key: 1\nname: x\n"a\\n  b": 1\n',
            {"slices": [A]},
            (
                "m.yaml:6:1: unknown key 'dtypee' is ignored; did you mean 'dtype'?",
                "m.yaml:7:1: unknown key 'bogus_key' is ignored",
                "m.yaml:8:1: 'name' is ignored: it is for several recipes in one file",
                "m.yaml:9:1: unknown key 'a b' is ignored",
            ),
        ),
        (
            f"{ONE}tokenizer: {{source: model:b}}\n",
            {"slices": [A], "tokenizer_source": "b"},
            ("m.yaml:1:1: no 'merge_method': read as passthrough",),
        ),
        (
            f"{PASS}tokenizer: {{sorce: a}}\n",
            {"slices": [A], "tokenizer_source": "union"},
            ("m.yaml:6:13: unknown key 'sorce' is ignored; did you mean 'source'?",),
        ),
        (f"{PASS}chat_template: chatml\nout_dtype: fp16\n", {"slices": [A], "chat_template": "chatml", "out_dtype": "float16"}, ()),
        (
            f"{PASS}parameters: {{t: 0.5, scal: 1}}\n",
            {"slices": [A]},
            (
                "m.yaml:6:14: parameter 't' is ignored: nothing is blended",
                "m.yaml:6:22: parameter 'scal' is ignored: nothing is blended; did you mean 'scale'?",
            ),
        ),
        (
            PASS.replace("model: a", "model: {model: {path: a/, revision: r}, override_architecture: X, extra: 1}"),
            {"slices": [{"sources": [{"model": "a@r", "layer_range": [0, 2]}]}]},
            (
                "m.yaml:4:75: unknown key 'extra' is ignored",
                "m.yaml:4:49: 'override_architecture' is ignored: the architecture is read from the checkpoint",
            ),
        ),
        (
            f"{PASS}        model: b\n        layer_range: [1, 2]\n",
            {"slices": [{"sources": [{"model": "b", "layer_range": [1, 2]}]}]},
            (
                "m.yaml:6:9: key 'model' stands twice in one mapping, the last one counts",
                "m.yaml:7:9: key 'layer_range' stands twice in one mapping, the last one counts",
            ),
        ),
        (
            "layer_slices:\n  - {model: a, start: 0, end: 2, speed: 1}\nmerge_method: passthrough\n",
            {"slices": [{"model": "a", "layer_range": [0, 2]}]},
            ("m.yaml:2:34: unknown key 'speed' is ignored",),
        ),
        (f"{PASS}embedding_source: a\n", {"slices": [A]}, ("m.yaml:6:1: unknown key 'embedding_source' is ignored",)),
        (
            f"merge_method: passthrough\n{TEXT.replace('text_decoder', 'model.language_model.layers')}",
            {"slices": [A]},
            (),
        ),
    ],
)
def test_unusual_files_and_what_is_noted(text: str, data: dict[str, Any], notes: tuple[str, ...]) -> None:
    found = read(text)
    assert found.data == {**data, "merge_method": "passthrough"}
    assert found.notes == notes


@pytest.mark.parametrize("place", ["source", "slice", "file"])
@pytest.mark.parametrize(
    ("setting", "scale"),
    [
        ("0.5", 0.5),
        ("2", 2),
        ("'0.5'", 0.5),
        ("1e-3", 0.001),  # text in YAML 1.1
        ("[0.5, 1]", [0.5, 1]),
        ("[1e-1, '.5']", [0.1, 0.5]),
        ("{filter: q_proj, value: 0.5}", [{"filter": "q_proj", "value": 0.5}]),
        ("{filter: '*', value: 0.5}", [{"value": 0.5}]),
        ("{value: 0.5, filter: null}", [{"value": 0.5}]),
        ("[{filter: layers.3., value: [0, 1]}, {value: '1'}]", [{"filter": "layers.3.", "value": [0, 1]}, {"value": 1}]),
        ("[]", None),
        ("null", None),
        # Left for the recipe to refuse.
        ("loud", "loud"),
        ("true", True),
        ("[1, {value: 2}]", [1, {"value": 2}]),
        ("[{filter: x}]", [{"filter": "x"}]),
    ],
)
def test_settings_have_one_spelling(place: str, setting: str, scale: Any) -> None:
    indent = {"source": "        ", "slice": "    ", "file": ""}[place]
    found = read(f"{PASS}{indent}parameters: {{scale: {setting}}}\n").data
    holder = {"source": found["slices"][0]["sources"][0], "slice": found["slices"][0], "file": found}[place]
    assert holder.get("parameters") == (None if scale is None else {"scale": scale})


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("org/name", "org/name"),
        ("org/name@main", "org/name@main"),
        ("org/name/@main", "org/name@main"),
        ("./folder//", "./folder"),
        ("/", "/"),
        ("'quoted name'", "quoted name"),
        (r"C:\models\x", r"C:\models\x"),
        (r"..\x", r"..\x"),
        ("{model: org/name@main}", "org/name@main"),
        ("{path: org/name, revision: v1}", "org/name@v1"),
        ("{model: {path: ./folder/, revision: null}, lora: null}", "./folder"),
        ("{model: {model: {path: x}}}", "x"),
        # Left for the recipe to refuse.
        ("7", 7),
        ("[a]", ["a"]),
        ("''", ""),
    ],
)
@pytest.mark.parametrize("key", ["base_model", "tokenizer_source", "model"])
def test_references_have_one_spelling(key: str, written: str, meant: Any) -> None:
    text = PASS.replace("model: a", f"model: {written}") if key == "model" else f"{PASS}{key}: {written}\n"
    found = read(text).data
    assert (found["slices"][0]["sources"][0]["model"] if key == "model" else found[key]) == meant


def test_aliases_are_left_alone() -> None:
    found = read(f"models: {{a+b: ./one/, c: two+three}}\n{PASS.replace('model: a', 'model: a+b')}")
    assert found.data["models"] == {"a+b": "./one/", "c": "two+three"}
    assert found.data["slices"][0]["sources"][0]["model"] == "a+b"


def test_own_keys_stand_beside_those_of_mergekit() -> None:
    own = "model: x/\ndepth: 24\nsteps: [{prune: {layers: 2}}]\nmetric: cosine\noutput: out\nevaluate: {tokens: 3}\n"
    slices = (
        "slices:\n  - {model: a, layer_range: [0, auto], parameters: {scale: 2}}\n  - layer_range: [auto, end]\nmerge_method: passthrough\n"
    )
    found = read(own + slices)
    assert found.notes == ()
    assert found.data == {**YamlText(own + slices, "m.yaml").data, "model": "x"}


def test_every_key_of_a_recipe_is_known() -> None:
    assert set(Recipe.model_fields) <= set(OWN_KEYS)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_this_project_read_the_same(path: Path) -> None:
    text = YamlText.read(path)
    assert recognised(text.data) == ("merge_method" in text.data)
    if recognised(text.data):
        found = translate(text)
        assert (found.data, found.notes) == (text.data, ())


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("merge_method: x", True),
        ("layer_slices: []", True),
        ("modules: {}", True),
        ("models: []", True),
        ("experts: []", True),
        (f"{ONE}    base_model: b\n", True),
        (f"{ONE}    residual_weight: 1\n", True),
        (ONE.replace("model: a", "model: {path: a}"), True),
        (f"{ONE}tokenizer: {{}}\n", True),
        (ONE, False),
        (f"{ONE}base_model: b\ndtype: float16\n", False),
        ("model: a\ntokenizer: b\n", False),
        ("model: a\nmodels: {b: c}\n", False),
        ("slices: 3", False),
        ("slices: [[], {sources: [3]}]", False),
    ],
)
def test_recognised(text: str, answer: bool) -> None:
    assert recognised(YamlText(text, "m.yaml").data) is answer


@pytest.mark.parametrize("data", [None, [], "merge_method", 3])
def test_only_mappings_are_recognised(data: Any) -> None:
    assert recognised(data) is False


@pytest.mark.parametrize(
    ("text", "path", "origin", "where"),
    [
        (PASS, ("slices", 0, "sources", 0, "model"), ("slices", 0, "sources", 0, "model"), "4:16"),
        (WHOLE, ("slices", 0, "sources", 0, "model"), ("models", 0, "model"), "3:12"),
        (WHOLE, ("slices", 0, "sources", 0, "layer_range"), ("models", 0, "layer_range"), "3:5"),
        (WHOLE, ("slices",), ("models",), "3:3"),
        (PROFESSOR, ("slices", 0, "sources", 0, "layer_range", 1), ("slices", 0, "sources", 1, "layer_range", 1), "11:26"),
        (PROFESSOR, ("slices", 1, "sources", 0, "layer_range", 1), ("slices", 1, "sources", 0, "layer_range", 1), "14:26"),
        (
            VISION,
            ("slices", 1, "sources", 0, "layer_range"),
            ("modules", "text_decoder", "slices", 1, "sources", 0, "layer_range"),
            "16:26",
        ),
        (VISION, ("parameters", "scale", 0, "value"), ("modules", "text_decoder", "parameters", "scale", 0, "value"), "9:52"),
        (BAKLLAMA, ("slices", 1, "layer_range", 0), ("layer_slices", 1, "start", 0), "6:12"),
        (BAKLLAMA, ("slices", 1, "parameters", "scale", 0, "value"), ("layer_slices", 1, "scale", "scale", 0, "value"), "8:12"),
        (f"{PASS}tokenizer: {{source: b}}\n", ("tokenizer_source",), ("tokenizer", "source"), "6:21"),
        (NESTED, ("slices", 0, "sources", 0, "model"), ("slices", 0, "sources", 0, "model"), "8:7"),
    ],
)
def test_places_are_those_of_the_text(text: str, path: tuple[Any, ...], origin: tuple[Any, ...], where: str) -> None:
    source = YamlText(text, "m.yaml")
    found = translate(source)
    assert found.origin(path) == origin
    assert source.where(found.origin(path)) == f"m.yaml:{where}"


def test_overrides_are_read_and_named() -> None:
    text = YamlText(PASS, "m.yaml")
    text.override("slices.0.sources.0.model=b/")
    text.override("dtype=bf")
    with pytest.raises(RecipeError) as caught:
        translate(text)
    assert str(caught.value) == f"--set dtype: 'dtype' {DTYPE} 'bf'; {NONE}"
    text.override("dtype=bf16")
    assert translate(text).data == {"slices": stacked(("b", 0, 2)), "dtype": "bfloat16", "merge_method": "passthrough"}


@pytest.mark.parametrize(
    "slices",
    [
        "3",
        "[3]",
        "[[]]",
        "[{}]",
        "[{sources: 3}]",
        "[{sources: []}]",
        "[{sources: [3]}]",
        "[{sources: [{model: a}]}]",
        "[{layer_range: 0-2}]",
    ],
)
def test_faults_that_a_recipe_finds_are_left_to_it(slices: str) -> None:
    text = f"slices: {slices}\nmerge_method: passthrough\n"
    assert read(text).data == YamlText(text, "m.yaml").data


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[0, 2, 4]", [0, 2, 4]),
        ("['-2', '+2']", [-2, 2]),
        ("[2.5, auto]", [2.5, "auto"]),
        ("[1.0e+300, .inf]", [1e300, float("inf")]),
        ("['1e1', '٣']", ["1e1", "٣"]),
        ("[true, null]", [True, None]),
        ("'0-2'", "0-2"),
    ],
)
def test_boundaries(written: str, meant: Any) -> None:
    assert read(PASS.replace("[0, 2]", written)).data["slices"][0]["sources"][0]["layer_range"] == meant


def test_a_recipe_takes_the_result() -> None:
    recipe = Recipe.model_validate(read(WHOLE).data)
    assert recipe.slices is not None
    assert recipe.slices[0].source.model == "a"
    assert recipe.slices[0].source.layer_range == (0, "end")


KEYS = st.sampled_from([
    "merge_method", "slices", "sources", "model", "models", "modules", "text_decoder", "vision_tower", "layer_range", "parameters",
    "scale", "weight", "normalize", "filter", "value", "base_model", "residual_weight", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "source", "tokens", "pad_to_multiple_of", "chat_template", "name", "lora", "path", "revision", "layer_slices", "start",
    "override_architecture", "end", "embedding_source", "lm_head_source", "experts", "genome", "steps", "slice", "dtypee", "x",
])  # fmt: skip
WORDS = st.sampled_from(
    [
        "passthrough",
        "linear",
        "slerp",
        "a",
        "a/",
        "a@b",
        "a@b@c",
        "a+b",
        "union",
        "base",
        "auto",
        "same",
        "bf16",
        "1e-3",
        "'0",
        "*",
        "",
        "\0@",
        "x\ny",
    ]
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-3, 90), st.floats(), WORDS, st.text("aé:\n#'*&@+/", max_size=5))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=25)
METHODS = st.fixed_dictionaries({}, optional={"merge_method": st.sampled_from(["passthrough", "linear"])})


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """Random data, mostly with slices of the right shape, so that the deeper parts are reached."""
    source = st.dictionaries(st.sampled_from(["model", "layer_range", "parameters", "weight"]), VALUES) | VALUES
    part = st.fixed_dictionaries({"sources": st.lists(source, max_size=3)}, optional={"parameters": VALUES, "x": VALUES}) | VALUES
    layouts = {"slices": st.lists(part, max_size=3), "models": st.lists(source, max_size=3), "layer_slices": VALUES}
    module = st.fixed_dictionaries(
        {}, optional={"slices": st.lists(part, max_size=2), "models": st.lists(source, max_size=2), "parameters": VALUES}
    )
    layouts["modules"] = st.dictionaries(st.sampled_from(["default", "text_decoder", "vision_tower"]), module, max_size=2)
    name = draw(st.sampled_from(sorted(layouts)))
    return {**draw(st.dictionaries(KEYS, VALUES, max_size=4)), **draw(METHODS), name: draw(layouts[name])}


@given(data=files() | st.dictionaries(KEYS, VALUES, max_size=6))
@settings(deadline=None, max_examples=400)
def test_nothing_but_recipe_errors_and_the_text_stays_as_it_was(data: dict[str, Any]) -> None:
    text = YamlText(json.dumps(data), "m.yaml")  # JSON is YAML
    before = copy.deepcopy(text.data)
    assert recognised(text.data) in (True, False)
    try:
        found = translate(text)
    except RecipeError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("m.yaml:1:")
    else:
        assert found.data["merge_method"] == "passthrough"
        assert set(found.data) <= set(OWN_KEYS)
        assert all(note.startswith("m.yaml:1:") and "\n" not in note for note in found.notes)
    assert repr(text.data) == repr(before)
