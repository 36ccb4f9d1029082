from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from layercut.calibration import BuiltinCalibration, HubCalibration, TextCalibration
from layercut.errors import RecipeError
from layercut.metrics import Angular, Cosine
from layercut.operations import Duplicate, Every, Keep, Prune
from layercut.recipe import Output, Recipe, Source, load_recipe, parse_recipe, parse_size
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


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("5 GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("1.5GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("2KB", 2000),
        ("1TB", 10**12),
        ("5GiB", 5 * 2**30),
        ("1MiB", 2**20),
        ("1KiB", 1024),
        ("7B", 7),
        ("7", 7),
        (123, 123),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a size such as 5GB, 500MB or 5GiB"),
        ("GB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("5G", "expected a size such as 5GB, 500MB or 5GiB"),
        ("-5GB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("1e3", "expected a size such as 5GB, 500MB or 5GiB"),
        ("5,5GB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("9" * 400 + "TB", "expected a size such as 5GB, 500MB or 5GiB"),
        ("0GB", "a size must be at least one byte"),
        ("0.4B", "a size must be at least one byte"),
    ],
)
def test_sizes_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_size(text)


@given(st.integers(1, 10**12), st.sampled_from(["KB", "MB", "KiB"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number * {"KB": 10**3, "MB": 10**6, "KiB": 2**10}[unit]


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


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path / 'none.yaml'}: cannot read: No such file or directory"


def test_the_schema_knows_every_key_and_says_what_it_means() -> None:
    schema = Recipe.schema_document()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert all(field.description for field in Recipe.model_fields.values())
    assert set(schema["$defs"]["Every"]["properties"]) == {"every", "from", "to"}
    for name in ("Prune", "Keep", "Duplicate", "Slice", "Source", "Output", "Recipe"):
        part = schema if name == "Recipe" else schema["$defs"][name]
        assert part["additionalProperties"] is False
