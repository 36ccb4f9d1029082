"""Bad recipes and what is said about them: one mistake, one line, with the place of the mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.architecture import Member
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import CheckpointError, RecipeError
from layercut.metrics import METRICS, Metric
from layercut.operations import OPERATIONS
from layercut.plan import Measurement, Plan, Table
from layercut.planner import build_plan
from layercut.recipe import load_recipe

DEPTH = 6
OPERATION_LIST = ", ".join(sorted(OPERATIONS))
METRIC_LIST = ", ".join(METRICS)
SELECTOR = 'expected a layer such as 3, a range such as "20-24", or {every: 2, from: 8, to: 24}'
COUNT = "expected a number of layers such as 6, or a percentage such as 25%"
SIZE = "expected a size such as 5GB, 500MB or 5GiB"
EITHER = "takes either 'layers' (how many) or 'at' (which)"
PAIR = "layer_range takes two boundaries [a, b): layers a to b - 1"
EMPTY = "is empty: [a, b) holds layers a to b - 1"
ONE_SOURCE = "'sources' is a list of exactly one source: {model, layer_range}"
FORMS = "a slice takes either 'layer_range' or 'sources'"
SOURCES = "known are builtin, hub, text"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = {"model_type": "llama", "num_hidden_layers": DEPTH}
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("bad") / "m", byte_tensors(DEPTH), config))


def measure(members: Mapping[str, Member], metrics: Sequence[Metric], calibration: Any) -> Measurement:
    flat = tuple(tuple(0.25 if i != j else 0.0 for j in range(DEPTH + 1)) for i in range(DEPTH + 1))
    tables = tuple(Table(metric=metric.label, a=name, b=name, mean=flat, stderr=flat) for metric in metrics for name in members)
    return Measurement(tables=tables, samples=1, tokens=1, details={})


def plan(path: Path, model: Checkpoint) -> Plan:
    def resolve(reference: str) -> Checkpoint:
        if reference != "m":
            raise CheckpointError("no such folder", where=reference, hint="check the name")
        return model

    return build_plan(load_recipe(path), resolve=resolve, measure=measure)


def said(text: str, folder: Path, model: Checkpoint) -> str:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises((RecipeError, CheckpointError)) as caught:
        plan(path, model)
    return str(caught.value).replace(str(path), "r.yaml")


def steps(*lines: str) -> str:
    return "model: m\nsteps:\n" + "".join(f"  - {line}\n" for line in lines)


def slices(*lines: str, more: str = "") -> str:
    return "slices:\n" + "".join(f"  - {line}\n" for line in lines) + more


TABLE = [
    # the whole
    ("", "r.yaml: expected a mapping such as 'model: …'"),
    ("{}", "r.yaml:1:1: needs 'model' or 'slices'"),
    ("- model: m", "r.yaml: expected a mapping such as 'model: …'"),
    ("steps: []", "r.yaml:1:1: needs 'model' or 'slices'"),
    ("model: m\nmodel: n", "r.yaml:2:1: key 'model' stands twice in one mapping"),
    ("model: m\nsteps: [", "r.yaml:3:1: not valid YAML: did not find expected node content"),
    ("model: 5", "r.yaml:1:8: model: expected text, found 5"),
    ("model: on", "r.yaml:1:8: model: expected text, found true"),
    ("model: [a]", 'r.yaml:1:8: model: expected text, found ["a"]'),
    ("model: ''", "r.yaml:1:8: model: expected some text, found ''"),
    ("model: nowhere", "r.yaml:1:8: nowhere: no such folder; check the name"),
    ("model: m\nmodle: n", "r.yaml:2:1: unknown key 'modle'; did you mean 'model'?"),
    ("model: m\nmodels: m", "r.yaml:2:9: models: expected a mapping, found 'm'"),
    ("model: m\nmodels: {a: 5}", "r.yaml:2:13: models.a: expected text, found 5"),
    ("model: m\nmerge_method: slerp", "r.yaml:2:15: merge_method: expected 'passthrough', found 'slerp'"),
    ("model: m\ndepth: ten", "r.yaml:2:8: depth: expected a whole number, found 'ten'"),
    ("model: m\ndepth: 2.5", "r.yaml:2:8: depth: expected a whole number, found 2.5"),
    ("model: m\ndepth: true", "r.yaml:2:8: depth: expected a whole number, found true"),
    ("model: m\ndepth: 0", "r.yaml:2:8: depth: expected at least 1, found 0"),
    ("model: m\ndepth: 4", "r.yaml:2:1: 'depth' goes with 'slices'; to remove layers of a model use steps: [{prune: {layers: N}}]"),
    # slices
    ("slices: []", "r.yaml:1:9: slices: expected at least one entry, found []"),
    ("slices: 5", "r.yaml:1:9: slices: expected a list, found 5"),
    (slices("5"), "r.yaml:2:5: slices.0: expected a mapping, found 5"),
    (slices("{layer_range: [0, 4]}"), "r.yaml:2:5: which model? neither the slice nor the recipe names one"),
    (slices("{model: m}"), f"r.yaml:2:5: {FORMS}"),
    (slices("{model: m, layer_range: [0, 4], modl: x}"), "r.yaml:2:37: unknown key 'modl'; did you mean 'model'?"),
    (slices("{model: m, layer_range: [5, 3]}"), f"r.yaml:2:29: layer_range [5, 3] {EMPTY}; did you mean [3, 5]?"),
    (slices("{model: m, layer_range: [3, 3]}"), f"r.yaml:2:29: layer_range [3, 3] {EMPTY}; did you mean [3, 4]?"),
    (slices("{model: m, layer_range: [0, 0]}"), f"r.yaml:2:29: layer_range [0, 0] {EMPTY}; did you mean [0, 1]?"),
    (slices("{model: m, layer_range: [end, end]}"), f"r.yaml:2:29: layer_range [end, end] {EMPTY}"),
    (slices("{model: m, layer_range: [auto, 0]}"), f"r.yaml:2:29: layer_range [auto, 0] {EMPTY}"),
    (slices("{model: m, layer_range: [0, 1, 2]}"), f"r.yaml:2:29: {PAIR}"),
    (slices("{model: m, layer_range: [4]}"), f"r.yaml:2:29: {PAIR}"),
    (slices("{model: m, layer_range: 0-4}"), f"r.yaml:2:29: {PAIR}, found '0-4'"),
    (slices("{model: m, layer_range: [0, all]}"), "r.yaml:2:33: expected a boundary: a whole number, auto or end, found 'all'"),
    (slices("{model: m, layer_range: [0, 2.5]}"), "r.yaml:2:33: expected a boundary: a whole number, auto or end, found 2.5"),
    (slices("{model: m, layer_range: [no, 2]}"), "r.yaml:2:30: expected a boundary: a whole number, auto or end, found false"),
    (slices("{model: m, layer_range: [-2, 5]}"), "r.yaml:2:30: a boundary counts from 0; for the last layers write [a, end], found -2"),
    (
        slices("{model: m, layer_range: [0, 99]}"),
        "r.yaml:2:29: layer_range [0, 99] leaves the model, which has 6 layers; the largest range is [0, 6]",
    ),
    (
        slices("{model: m, layer_range: [6, auto]}", more="depth: 3\n"),
        "r.yaml:2:29: layer_range [6, auto] leaves the model, which has 6 layers; the largest range is [0, 6]",
    ),
    (
        slices("{model: m, layer_range: [6, end]}"),
        "r.yaml:2:29: layer_range [6, end] leaves the model, which has 6 layers; the largest range is [0, 6]",
    ),
    (slices("sources: []"), f"r.yaml:2:14: {ONE_SOURCE}"),
    (slices("sources: {model: m, layer_range: [0, 4]}"), f"r.yaml:2:14: {ONE_SOURCE}"),
    (slices("sources: [{model: m, layer_range: [0, 2]}, {model: m, layer_range: [4, 6]}]"), f"r.yaml:2:14: {ONE_SOURCE}"),
    (slices("sources: [m]"), "r.yaml:2:15: slices.0.sources.0: expected a mapping, found 'm'"),
    (slices("sources: [{model: m}]"), "r.yaml:2:15: 'layer_range' is missing"),
    (slices("sources: [{model: m, layer_rang: [0, 4]}]"), "r.yaml:2:26: unknown key 'layer_rang'; did you mean 'layer_range'?"),
    (slices("sources: [{model: m, layer_range: [3, 3]}]"), f"r.yaml:2:39: layer_range [3, 3] {EMPTY}; did you mean [3, 4]?"),
    (
        slices("{model: m, sources: [{layer_range: [0, 4]}]}"),
        "r.yaml:2:5: with 'sources' the model belongs into the source: {model, layer_range}",
    ),
    (slices("{layer_range: [0, 4], sources: [{model: m, layer_range: [0, 4]}]}"), f"r.yaml:2:5: {FORMS}"),
    (
        slices("{model: m, layer_range: [0, auto]}", "{model: m, layer_range: [auto, 6]}"),
        "r.yaml:2:3: 'auto' boundaries need a target 'depth'; these slices can hold 1 to 12 layers",
    ),
    (
        slices("{model: m, layer_range: [0, auto]}", "{model: m, layer_range: [auto, 6]}", more="depth: 13\n"),
        "r.yaml:4:8: depth 13 cannot be reached: the slices hold 1 to 12 layers",
    ),
    (
        slices("{model: m, layer_range: [0, 4]}", "{model: m, layer_range: [2, auto]}", more="depth: 3\n"),
        "r.yaml:4:8: depth 3 cannot be reached: the slices hold 4 to 8 layers",
    ),
    (
        slices("{model: m, layer_range: [0, 4]}", more="depth: 3\n"),
        "r.yaml:3:8: depth 3 cannot be reached: the slices hold exactly 4 layers",
    ),
    # steps
    ("model: m\nsteps: {prune: {layers: 2}}", 'r.yaml:2:8: steps: expected a list, found {"prune": {"layers": 2}}'),
    ("model: m\nsteps: 5", "r.yaml:2:8: steps: expected a list, found 5"),
    ("model: m\nsteps:\n", "r.yaml:2:7: steps: expected a list, found nothing"),
    (steps("prune"), f"r.yaml:3:5: expected a step such as 'prune: {{layers: 6}}' (operations: {', '.join(OPERATIONS)}), found 'prune'"),
    (
        steps("{prune: {layers: 2}, keep: {at: 1}}"),
        "r.yaml:3:5: a step is one operation, found 2 (prune, keep): write each as a step of its own",
    ),
    (steps("prun: {layers: 2}"), "r.yaml:3:5: unknown operation 'prun'; did you mean 'prune'?"),
    (steps("xyzzy: {layers: 2}"), f"r.yaml:3:5: unknown operation 'xyzzy'; known operations are {OPERATION_LIST}"),
    (steps("prune: 2"), "r.yaml:3:12: steps.0.prune: expected a mapping, found 2"),
    (steps("prune:"), f"r.yaml:3:11: {EITHER}"),
    (steps("prune: {}"), f"r.yaml:3:12: {EITHER}"),
    (steps("prune: {layers: 2, at: 1}"), f"r.yaml:3:12: {EITHER}"),
    (steps("duplicate: {layers: 2, at: 1}"), f"r.yaml:3:16: {EITHER}"),
    (steps("keep: {}"), "r.yaml:3:11: 'at' is missing"),
    (steps("keep: {ats: 3}"), "r.yaml:3:12: unknown key 'ats'; did you mean 'at'?"),
    (steps("prune: {layer: 2}"), "r.yaml:3:13: unknown key 'layer'; did you mean 'layers'?"),
    (steps("prune: {layers: six}"), f"r.yaml:3:21: {COUNT}, found 'six'"),
    (steps("prune: {layers: 2.5}"), f"r.yaml:3:21: {COUNT}, found 2.5"),
    (steps("prune: {layers: true}"), f"r.yaml:3:21: {COUNT}, found true"),
    (steps("prune: {layers: [2]}"), f"r.yaml:3:21: {COUNT}"),
    (steps("prune: {layers: 25 %}"), f"r.yaml:3:21: {COUNT}, found '25 %'"),
    (steps("prune: {layers: 0}"), "r.yaml:3:21: a number of layers is at least 1, found 0"),
    (steps("prune: {layers: -1}"), "r.yaml:3:21: a number of layers is at least 1, found -1"),
    (steps("prune: {layers: 200%}"), "r.yaml:3:21: a percentage of the layers is above 0% and at most 100%, found '200%'"),
    (steps("prune: {layers: 0%}"), "r.yaml:3:21: a percentage of the layers is above 0% and at most 100%, found '0%'"),
    (steps("prune: {layers: 10%}"), "r.yaml:3:21: 10% of 6 layers is less than one layer"),
    (steps("prune: {layers: 100%}"), "r.yaml:3:21: cannot remove 6 of 6 layers; at most 5"),
    (steps("prune: {layers: 6}"), "r.yaml:3:21: cannot remove 6 of 6 layers; at most 5"),
    (steps("prune: {layers: 3}", "prune: {layers: 3}"), "r.yaml:4:21: cannot remove 3 of 3 layers; at most 2"),
    (steps("duplicate: {layers: 7}"), "r.yaml:3:25: cannot repeat 7 of 6 layers; at most 6"),
    (steps("duplicate: {at: 1, times: 0}"), "r.yaml:3:31: steps.0.duplicate.times: expected at least 1, found 0"),
    (steps("duplicate: {at: 1, times: 1001}"), "r.yaml:3:31: steps.0.duplicate.times: expected at most 1000, found 1001"),
    (steps("duplicate: {at: 1, times: twice}"), "r.yaml:3:31: steps.0.duplicate.times: expected a whole number, found 'twice'"),
    (steps("prune: {at: []}"), "r.yaml:3:17: steps.0.prune.at: expected at least one entry, found []"),
    (steps("prune: {at: 1.5}"), f"r.yaml:3:17: {SELECTOR}, found 1.5"),
    (steps("prune: {at: [1, two, 3]}"), f"r.yaml:3:21: {SELECTOR}, found 'two'"),
    (steps("prune: {at: [1, true]}"), f"r.yaml:3:21: {SELECTOR}, found true"),
    (steps("prune: {at: 1-2-3}"), f"r.yaml:3:17: {SELECTOR}, found '1-2-3'"),
    (steps("prune: {at: 2..4}"), f"r.yaml:3:17: {SELECTOR}, found '2..4'"),
    (steps("prune: {at: {every: 0}}"), "r.yaml:3:25: steps.0.prune.at.every: expected at least 1, found 0"),
    (steps("prune: {at: {evry: 2}}"), "r.yaml:3:18: unknown key 'evry'; did you mean 'every'?"),
    (steps("prune: {at: {from: 2}}"), "r.yaml:3:17: 'every' is missing"),
    (steps("prune: {at: [{every: 2, to: x}]}"), "r.yaml:3:33: steps.0.prune.at.0.to: expected a whole number, found 'x'"),
    (steps("prune: {at: [1, 6]}"), "r.yaml:3:21: layer 6 does not exist: the stack has layers 0 to 5 here"),
    (steps("prune: {at: -7}"), "r.yaml:3:17: layer -7 does not exist: the stack has layers 0 to 5 here"),
    (steps("prune: {at: 4-2}"), "r.yaml:3:17: the range 4 to 2 is empty: it ends before it starts"),
    (steps("prune: {at: [1, 0-2]}"), "r.yaml:3:21: layer 1 is named twice"),
    (steps("prune: {at: 0-5}"), "r.yaml:3:17: removes all 6 layers"),
    (steps("prune: {at: 0-3}", "keep: {at: 2}"), "r.yaml:4:16: layer 2 does not exist: the stack has layers 0 to 1 here"),
    # metrics
    ("model: m\nmetric: angulr", f"r.yaml:2:9: unknown metric 'angulr'; did you mean 'angular'? (known: {METRIC_LIST})"),
    ("model: m\nmetrics: [angular, x]", f"r.yaml:2:20: unknown metric 'x' (known: {METRIC_LIST})"),
    ("model: m\nmetrics: angular", "r.yaml:2:10: metrics: expected a list, found 'angular'"),
    ("model: m\nmetrics: []", "r.yaml:2:10: metrics: expected at least one entry, found []"),
    ("model: m\nmetric: {token: all}", f"r.yaml:2:9: a metric needs a name, one of: {METRIC_LIST}"),
    ("model: m\nmetric: {name: angular, token: first}", "r.yaml:2:32: token must be last, all or the index of a token, found 'first'"),
    ("model: m\nmetric: {name: angular, tokn: all}", "r.yaml:2:25: unknown key 'tokn'; did you mean 'token'?"),
    ("model: m\nmetric: angular\nmetrics: [cosine]", "r.yaml:3:1: takes 'metric' or 'metrics', not both"),
    (steps("prune: {layers: 2, metric: bi}"), f"r.yaml:3:32: unknown metric 'bi' (known: {METRIC_LIST})"),
    # calibration
    ("model: m\ncalibration:\n", "r.yaml:2:13: calibration: expected a mapping, found nothing"),
    ("model: m\ncalibration: builtin", "r.yaml:2:14: calibration: expected a mapping, found 'builtin'"),
    ("model: m\ncalibration: {samples: 3}", f"r.yaml:2:14: 'source' is missing; {SOURCES}"),
    ("model: m\ncalibration: {source: hubb}", "r.yaml:2:23: unknown source 'hubb'; did you mean 'hub'?"),
    ("model: m\ncalibration: {source: web}", f"r.yaml:2:23: unknown source 'web'; {SOURCES}"),
    ("model: m\ncalibration: {source: hub}", "r.yaml:2:14: 'dataset' is missing"),
    ("model: m\ncalibration: {source: builtin, smples: 3}", "r.yaml:2:32: unknown key 'smples'; did you mean 'samples'?"),
    ("model: m\ncalibration: {source: builtin, samples: 0}", "r.yaml:2:41: calibration.samples: expected at least 1, found 0"),
    ("model: m\ncalibration: {source: text, path: ''}", "r.yaml:2:35: calibration.path: expected some text, found ''"),
    ("model: m\ncalibration: {source: builtin, bos: maybe}", "r.yaml:2:37: bos must be auto, true or false, found 'maybe'"),
    # output and evaluation
    ("model: m\noutput: 5", "r.yaml:2:9: 'output' is a folder, or a mapping with a path, found 5"),
    ("model: m\noutput: ''", "r.yaml:2:9: output: expected some text, found ''"),
    ("model: m\noutput: {max_shard_size: 5GB}", "r.yaml:2:9: 'path' is missing"),
    ("model: m\noutput: {path: x, max_shard: 5GB}", "r.yaml:2:19: unknown key 'max_shard'; did you mean 'max_shard_size'?"),
    ("model: m\noutput: {path: x, max_shard_size: 5XB}", f"r.yaml:2:35: {SIZE}, found '5XB'"),
    ("model: m\noutput: {path: x, max_shard_size: -5}", f"r.yaml:2:35: {SIZE}, found -5"),
    ("model: m\noutput: {path: x, max_shard_size: [5]}", f"r.yaml:2:35: {SIZE}"),
    ("model: m\noutput: {path: x, max_shard_size: 0.1B}", "r.yaml:2:35: a size must be at least one byte, found '0.1B'"),
    (f"model: m\noutput: {{path: x, max_shard_size: {'9' * 50}GB}}", f"r.yaml:2:35: {SIZE}, found '{'9' * 50}GB'"),
    ("model: m\nevaluate: {perplexit: {source: builtin}}", "r.yaml:2:12: unknown key 'perplexit'; did you mean 'perplexity'?"),
    ("model: m\nevaluate: {perplexity: {source: builtn}}", "r.yaml:2:33: unknown source 'builtn'; did you mean 'builtin'?"),
    ("model: m\nevaluate: {tokens: 0}", "r.yaml:2:20: evaluate.tokens: expected at least 1, found 0"),
]


@pytest.mark.parametrize(("text", "message"), TABLE, ids=[text.replace("\n", "/") or "nothing" for text, _ in TABLE])
def test_what_is_said(text: str, message: str, tmp_path: Path, model: Checkpoint) -> None:
    assert said(text, tmp_path, model) == message


def test_the_known_keys_are_listed_when_none_is_near(tmp_path: Path, model: Checkpoint) -> None:
    message = said("model: m\nxyzzy: red", tmp_path, model)
    assert message.startswith("r.yaml:2:1: unknown key 'xyzzy'; known keys are calibration, depth, evaluate, ")
    assert message.endswith("output, slices, steps")


def test_two_mistakes_are_two_lines(tmp_path: Path, model: Checkpoint) -> None:
    text = steps("prune: {layers: six}", "keep: {at: [a, 1]}") + "output: {path: x, max_shard_size: 5XB}\n"
    assert said(text, tmp_path, model).splitlines() == [
        f"r.yaml:3:21: {COUNT}, found 'six'",
        f"r.yaml:4:17: {SELECTOR}, found 'a'",
        f"r.yaml:5:35: {SIZE}, found '5XB'",
    ]


def test_a_value_of_several_lines_stays_on_one(tmp_path: Path, model: Checkpoint) -> None:
    text = 'model: m\ndepth: "a\\nb\\x85"\nmetric: "x\\ty"\n"k\\r": 1\n'
    assert said(text, tmp_path, model).split("\n") == [
        r"r.yaml:2:8: depth: expected a whole number, found 'a\nb\x85'",
        rf"r.yaml:3:9: unknown metric 'x\ty' (known: {METRIC_LIST})",
        said('model: m\n\n\n"k\\r": 1\n', tmp_path, model),
    ]


def test_a_long_value_is_cut(tmp_path: Path, model: Checkpoint) -> None:
    message = said(f"model: m\ndepth: {'x' * 500}", tmp_path, model)
    assert message == f"r.yaml:2:8: depth: expected a whole number, found '{'x' * 56}..."


def test_an_override_is_at_fault_by_its_own_name(tmp_path: Path, model: Checkpoint) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(steps("prune: {layers: 2}"), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["steps.0.prune.layers=many"])
    assert str(caught.value) == f"--set steps.0.prune.layers: {COUNT}, found 'many'"
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["steps.-1.prune.colour=red"])
    assert str(caught.value).startswith("--set steps.-1.prune.colour: unknown key 'colour'; known keys are at, layers, ")


def test_places_lead_through_merge_keys(tmp_path: Path, model: Checkpoint) -> None:
    text = slices("&one {model: m, layer_range: [0, 4]}", "{<<: *one, layer_range: [4, 99]}", "{<<: *one}")
    assert said(text, tmp_path, model).startswith("r.yaml:3:29: layer_range [4, 99] leaves the model")
    text = slices("&one {model: m, layer_range: [4, 4]}", "{<<: *one}")
    assert said(text, tmp_path, model) == f"r.yaml:2:34: layer_range [4, 4] {EMPTY}; did you mean [4, 5]?"


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["auto", "end", "m", "25%", "1-2", "angular"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*OPERATIONS, "model", "sources", "layer_range", "layers", "at", "every", "from", "to", "name", "token", "source", "path"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
keys = ["models", "slices", "merge_method", "depth", "steps", "calibration", "metric", "metrics", "output", "evaluate"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(keys), junk, max_size=3), st.sampled_from(keys), st.lists(junk, max_size=2))
def test_junk_is_told_in_lines_or_planned_and_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, model: Checkpoint, data: dict[str, Any], key: str, entries: list[Any]
) -> None:
    import yaml

    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_text(yaml.safe_dump({"model": "m", **data, key: entries}), encoding="utf-8")
    try:
        plan(path, model)
    except (RecipeError, CheckpointError) as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{path}:"), line
            for jargon in ("Input should", "valid tuple", "discriminator", "pydantic", "Field required", "expected None"):
                assert jargon not in line
