from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from layercut.calibration import BuiltinCalibration, HubCalibration, TextCalibration
from layercut.errors import RecipeError
from layercut.metrics import Angular, Cosine
from layercut.operations import OPERATIONS, Duplicate, Expand, Keep, Merge, Prune, Reorder, Replace, Scale, Zero
from layercut.recipe import Output, Recipe, Source, load_recipe, parse_recipe
from layercut.scalings import Parameters
from layercut.selectors import Every
from layercut.yamltext import YamlText


def recipe(text: str) -> Recipe:
    return parse_recipe(YamlText(text, "r.yaml"))


def test_the_common_case(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: org/m@main\n"
        "calibration: {source: builtin, samples: 32, max_length: 512}\n"
        "steps:\n  - prune: {layers: 6}\n"
        "output: ./smol-24L\n"
    )
    found = load_recipe(path)
    assert found.model == "org/m@main"
    assert found.calibration == BuiltinCalibration(samples=32, max_length=512)
    assert [step.operation for step in found.steps] == [Prune(layers=6)]
    assert [step.name for step in found.steps] == ["prune"]
    assert found.output == Output(path="./smol-24L", max_shard_size=5_000_000_000)
    assert found.all_metrics == (Angular(),)
    assert found.where("steps", 0, "prune", "layers") == f"{path}:4:21"
    assert found.where("steps", 0, "prune", key=True) == f"{path}:4:5"


def test_a_model_alone_is_a_recipe() -> None:
    found = recipe("model: m")
    assert (found.slices, found.steps, found.depth, found.output, found.evaluate) == (None, (), None, None, None)
    assert found.calibration == BuiltinCalibration()
    assert found.described() == {"model": "m"}


def test_both_forms_of_slices_say_the_same() -> None:
    ours = recipe("slices: [{model: m, layer_range: [0, auto]}, {model: m, layer_range: [auto, end]}]\ndepth: 4")
    theirs = recipe(
        "slices:\n- sources:\n  - model: m\n    layer_range: [0, auto]\n- sources:\n  - {model: m, layer_range: [auto, end]}\n"
        "merge_method: passthrough\ndepth: 4"
    )
    assert ours.slices is not None and theirs.slices is not None
    sources = [Source(model="m", layer_range=(0, "auto")), Source(model="m", layer_range=("auto", "end"))]
    assert [part.source for part in ours.slices] == [part.source for part in theirs.slices] == sources
    assert [part.path for part in ours.slices] == [(), ()]
    assert [part.path for part in theirs.slices] == [("sources", 0), ("sources", 0)]
    assert theirs.where("slices", 0, *theirs.slices[0].path, "layer_range") == "r.yaml:4:18"


def test_the_model_of_the_recipe_serves_slices_without_one() -> None:
    found = recipe("model: m\nslices: [{layer_range: [0, 2]}, {model: n, layer_range: [2, 4]}]")
    assert found.slices is not None
    assert [part.source.model for part in found.slices] == [None, "n"]


def test_every_kind_of_step() -> None:
    found = recipe(
        "model: m\nsteps:\n"
        "- prune: {layers: 25%, metric: cosine}\n"
        '- prune: {at: [3, 7, "20-24"]}\n'
        "- prune: {at: {every: 2, from: 8, to: 24}}\n"
        '- keep: {at: ["0-11", -1]}\n'
        '- duplicate: {at: "10-20", times: 2}\n'
        "- duplicate: {layers: 8}\n"
    )
    assert [step.operation for step in found.steps] == [
        Prune(layers="25%", metric=Cosine()),
        Prune(at=(3, 7, "20-24")),
        Prune(at=Every.model_validate({"every": 2, "from": 8, "to": 24})),
        Keep(at=("0-11", -1)),
        Duplicate(at="10-20", times=2),
        Duplicate(layers=8),
    ]
    assert [step.name for step in found.steps] == ["prune", "prune", "prune", "keep", "duplicate", "duplicate"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", ["angular[last]"]),
        ("metric: cosine", ["cosine[all]"]),
        ("metrics: [cosine, {name: angular, token: all}, angular]", ["cosine[all]", "angular[all]", "angular[last]"]),
        ("metrics: [angular, {name: angular, token: last}]", ["angular[last]"]),
        ("steps: [{prune: {layers: 1, metric: cosine}}, {duplicate: {layers: 1}}]", ["angular[last]", "cosine[all]"]),
        ("metric: cosine\nsteps: [{duplicate: {layers: 1, metric: {name: angular, token: -2}}}]", ["cosine[all]", "angular[-2]"]),
        ("metric: cosine\nsteps: [{prune: {layers: 1, metric: cosine}}]", ["cosine[all]"]),
    ],
)
def test_metrics_are_those_of_the_recipe_then_those_of_the_steps(text: str, labels: list[str]) -> None:
    assert [metric.label for metric in recipe(f"model: m\n{text}").all_metrics] == labels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{source: text, path: a.txt, samples: 4}", TextCalibration(path="a.txt", samples=4)),
        ("{source: hub, dataset: d, name: en, split: validation}", HubCalibration(dataset="d", name="en", split="validation")),
        ("{source: builtin, bos: false}", BuiltinCalibration(bos=False)),
    ],
)
def test_calibration(text: str, expected: Any) -> None:
    assert recipe(f"model: m\ncalibration: {text}").calibration == expected


def test_evaluation() -> None:
    found = recipe("model: m\nevaluate: {perplexity: {source: text, path: held.txt}, generate: Hello, tokens: 5}").evaluate
    assert found is not None
    assert (found.perplexity, found.generate, found.tokens) == (TextCalibration(path="held.txt"), "Hello", 5)


FULL = """\
models: {chat: ./a, code: ./b}
slices:
  - {model: chat, layer_range: [0, auto]}
  - sources: [{model: chat, layer_range: [auto, end]}]
merge_method: passthrough
depth: 80
metrics: [{name: angular, token: all}, cosine]
calibration: {source: hub, dataset: allenai/c4, name: en, samples: 128}
steps:
  - prune: {layers: 25%, metric: cosine}
  - keep: {at: [0, "-4--1", {every: 2, from: 1, to: 3}]}
  - duplicate: {at: 3, times: 2}
output: {path: ./out, max_shard_size: 5GiB}
evaluate: {perplexity: {source: builtin}, tokens: 4}
"""


def test_what_is_described_is_the_same_recipe() -> None:
    found = recipe(FULL)
    described = json.loads(json.dumps(found.described()))
    again = Recipe.model_validate(described)
    assert again.model_dump() == found.model_dump()
    assert again.described() == described
    assert described["steps"][1] == {"keep": {"at": [0, "-4--1", {"every": 2, "from": 1, "to": 3}]}}
    assert described["output"] == {"path": "./out", "max_shard_size": 5 * 2**30}
    assert described["slices"][0] == {"model": "chat", "layer_range": [0, "auto"]}


def test_a_recipe_that_was_not_read_from_text_names_keys() -> None:
    found = Recipe(model="m")
    assert found.where("steps", 0, "prune") == "steps.0.prune"
    assert found.where() == "recipe"


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe("model: m").model = "n"  # type: ignore[misc]


def test_overrides_are_applied_before_validation(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nsteps:\n  - prune: {layers: wrong}\n")
    found = load_recipe(path, ["steps.0.prune.layers=2", "output=./x", "calibration.source=builtin"])
    assert found.steps[0].operation == Prune(layers=2)
    assert found.output == Output(path="./x")
    assert found.described()["steps"] == [{"prune": {"layers": 2}}]


def test_a_recipe_may_be_json(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"model": "m", "steps": [{"prune": {"at": [0, "2-3"]}}]}, indent=1))
    assert load_recipe(path).steps[0].operation == Prune(at=(0, "2-3"))


def test_data_is_a_recipe_as_a_file_is() -> None:
    data = {"model": "m", "steps": [{"prune": {"layers": "25%", "protect": (0, -1)}}], "output": "out"}
    assert load_recipe(data).described() == recipe("model: m\nsteps: [{prune: {layers: 25%, protect: [0, -1]}}]\noutput: out").described()
    assert load_recipe(data, ["steps.0.prune.layers=3"]).described()["steps"] == [{"prune": {"layers": 3, "protect": [0, -1]}}]
    merge = {"slices": [{"sources": [{"model": "m", "layer_range": ["0", 2.0]}]}], "merge_method": "passthrough", "dtypee": 1}
    assert load_recipe(merge).notes == ("recipe.dtypee: unknown key 'dtypee' is ignored; did you mean 'dtype'?",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "recipe: needs 'model' or 'slices'"),
        ({"model": "m", "modle": 1}, "recipe.modle: unknown key 'modle'; did you mean 'model'?"),
        ({"model": 5}, "recipe.model: model: expected text, found 5"),
        (
            {"model": "m", "steps": [{"prune": {"layers": 2}}, {"prune": {"att": 3}}]},
            "recipe.steps.1.prune.att: unknown key 'att'; did you mean 'at'?",
        ),
        ({"model": "m", "calibration": {"source": "hub"}}, "recipe.calibration: 'dataset' is missing"),
    ],
)
def test_mistakes_in_data_are_told_with_their_keys(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(data)
    assert str(caught.value) == message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "none.yaml")
    begin = "a recipe is a YAML file; `layercut new` lists some to begin with"
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: cannot read: No such file or directory; {begin}"


def test_new_keys_of_slices_and_recipe() -> None:
    found = recipe(
        "models: {a: ./a, b: ./b}\n"
        "slices:\n"
        "- {model: a, layer_range: [0, auto], min: 2, max: 5, protect: [0, '2-3'], parameters: {scale: 0.5}}\n"
        "- {model: a, layer_range: [auto, end], overlap: 1}\n"
        "depth: 8\nparameters: {scale: [{filter: mlp, value: [0, 1]}, {value: 2}]}\nbase_model: b\ntokenizer_source: b\n"
        "chat_template: '{{ x }}'\ndtype: float32\nout_dtype: bfloat16\nallow: inexact"
    )
    assert found.slices is not None
    one, two = found.slices
    assert (one.least, one.most, one.protect, one.overlap) == (2, 5, (0, "2-3"), None)
    assert one.parameters == Parameters.model_validate({"scale": 0.5})
    assert one.source.parameters is None  # they are the slice's own
    assert (two.least, two.most, two.protect, two.overlap, two.parameters) == (None, None, None, 1, None)
    assert found.parameters == Parameters.model_validate({"scale": [{"filter": "mlp", "value": [0, 1]}, {"value": 2}]})
    assert (found.base_model, found.tokenizer_source, found.chat_template) == ("b", "b", "{{ x }}")
    assert (found.dtype, found.out_dtype, found.allow) == ("float32", "bfloat16", "inexact")
    assert Recipe.model_validate(found.described()).described() == found.described()


def test_every_step_of_the_page() -> None:
    found = recipe(
        "model: m\nsteps:\n"
        "- prune: {params: 6B, strategy: blocks, protect: [0, -1]}\n"
        "- prune: {size: 12GB}\n"
        "- prune: {max_distance: 0.2, strategy: rank}\n"
        "- expand: {every: 4}\n"
        "- merge: {at: [12, 13], weights: [0.5, 1]}\n"
        "- replace: {layers: 4, with: linear}\n"
        '- scale: {at: "10-20", tensors: "*.mlp.down_proj.weight", by: 0.7}\n'
        '- zero: {at: 12, tensors: "*.self_attn.o_proj.weight"}\n'
        '- reorder: {to: [0, 2, 1, "3-29"]}\n'
    )
    assert [step.operation for step in found.steps] == [
        Prune(params=6 * 10**9, strategy="blocks", protect=(0, -1)),
        Prune(size=12 * 10**9),
        Prune(max_distance=0.2, strategy="rank"),
        Expand(every=4),
        Merge(at=(12, 13), weights=(0.5, 1)),
        Replace.model_validate({"layers": 4, "with": "linear"}),
        Scale(at="10-20", tensors="*.mlp.down_proj.weight", by=0.7),
        Zero(at=12, tensors="*.self_attn.o_proj.weight"),
        Reorder(to=(0, 2, 1, "3-29")),
    ]
    assert found.described()["steps"][0] == {"prune": {"params": 6 * 10**9, "strategy": "blocks", "protect": [0, -1]}}
    assert found.described()["steps"][5] == {"replace": {"layers": 4, "with": "linear"}}
    assert Recipe.model_validate(found.described()).steps == found.steps


def test_a_whole_recipe_has_a_shard_size() -> None:
    assert recipe("model: m").shard_size == 5 * 10**9
    assert recipe("model: m\noutput: ./x").shard_size == 5 * 10**9
    assert recipe("model: m\noutput: {path: ./x, max_shard_size: 1MiB}").shard_size == 2**20


# The JSON Schema

SCHEMA = Recipe.schema_document()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_schema_knows_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(SCHEMA["properties"]) == set(Recipe.model_fields)
    assert set(SCHEMA["$defs"]["Every"]["properties"]) == {"every", "from", "to"}
    assert set(SCHEMA["$defs"]["Slice"]["properties"]) == {
        "model", "layer_range", "sources", "parameters", "min", "max", "protect", "overlap",
    }  # fmt: skip
    assert set(SCHEMA["$defs"]["Step"]["properties"]) == set(OPERATIONS)


def test_every_key_of_every_model_is_described_and_no_other_is_known() -> None:
    for name, model in {"Recipe": SCHEMA, **SCHEMA["$defs"]}.items():
        assert model["additionalProperties"] is False, name
        assert model.get("description"), name
        for key, field in model["properties"].items():
            assert field.get("description") or field.get("const"), f"{name}.{key}"


WRITTEN = [
    {"model": "m", "output": "./x"},
    {"model": "m", "output": {"path": "./x", "max_shard_size": "5GB"}},
    {"model": "m", "output": {"path": "./x", "max_shard_size": "1.5 GiB"}},
    {"model": "m", "output": {"path": "./x", "max_shard_size": 1000}},
    *({"model": "m", "steps": [{"prune": prune}]} for prune in (
        {"size": "12GB"}, {"params": "6B"}, {"params": "135m"}, {"params": 1000}, {"max_distance": 0.2}, {"layers": 6}, {"layers": "25%"},
        {"at": 3}, {"at": "3-5"}, {"at": "-4--1"}, {"at": [1, "3-5", {"every": 2, "from": 1, "to": -1}]}, {"at": {"every": 2}},
        {"layers": 2, "strategy": "blocks", "metric": "cosine", "protect": [0, -1]},
        {"layers": 2, "metric": {"name": "angular", "token": -1}},
    )),
    {"model": "m", "steps": [{"merge": {"at": [1, 2], "weights": [1, 0.5]}}, {"scale": {"tensors": "*", "by": 2}}]},
    {"model": "m", "steps": [{"replace": {"layers": 2, "with": "linear"}}, {"expand": {"every": 4}}, {"reorder": {"to": ["0-3"]}}]},
    *({"model": "m", "parameters": {"scale": scale}} for scale in (
        0.5, 2, [0, 1], {"filter": "x", "value": 0.5}, {"value": [0, 1]}, [{"filter": "x", "value": [0, 1]}, {"value": 1}],
    )),
    {"slices": [{"model": "m", "layer_range": [0, "auto"], "min": 1, "max": 2, "protect": 0},
                {"sources": [{"model": "m", "layer_range": ["auto", "end"]}]}],
     "merge_method": "passthrough", "depth": 4},
    {"models": {"a": "x"}, "model": "a", "metric": "angular", "calibration": {"source": "builtin", "bos": "auto", "samples": 3}},
    {"model": "m", "metrics": ["angular", {"name": "cosine", "token": "all"}], "evaluate": {"perplexity": {"source": "text", "path": "x"}}},
    {"model": "m", "calibration": {"source": "hub", "dataset": "d", "name": "en", "streaming": True}},
    {"model": "m", "dtype": "float16", "out_dtype": "bfloat16", "allow": "inexact", "base_model": "b", "tokenizer_source": "t",
     "chat_template": "chatml"},
]  # fmt: skip


@pytest.mark.parametrize("data", WRITTEN, ids=[json.dumps(data)[:90] for data in WRITTEN])
def test_editors_accept_what_layercut_accepts(data: dict[str, Any]) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []
    described = Recipe.model_validate(data).described()
    assert [error.message for error in VALIDATOR.iter_errors(described)] == []
    assert Recipe.model_validate(described).described() == described


@pytest.mark.parametrize(
    "data",
    [
        {"model": 5},
        {"model": "m", "modle": "n"},
        {"model": "m", "output": 5},
        {"model": "m", "output": ""},
        {"model": "m", "output": {"path": "x", "max_shard_size": "5 of them"}},
        {"model": "m", "steps": [{"prune": {"layers": "25"}}]},
        {"model": "m", "steps": [{"prune": {"layers": 0}}]},
        {"model": "m", "steps": [{"prune": {"at": "3..5"}}]},
        {"model": "m", "steps": [{"prune": {"layers": 1, "strategy": "best guess"}}]},
        {"model": "m", "steps": [{"cut": {"layers": 1}}]},
        {"model": "m", "metric": "angulr"},
        {"model": "m", "parameters": {"scale": "half"}},
        {"model": "m", "calibration": {"source": "web"}},
        {"slices": [{"model": "m", "layer_range": [0]}]},
        {"slices": [{"model": "m", "layer_range": [0, "all"]}]},
        {"slices": []},
        {"model": "m", "dtype": "int8"},
    ],
)
def test_editors_refuse_what_layercut_refuses(data: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(ValidationError):
        Recipe.model_validate(data)
