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
from layercut.errors import CheckpointError, RecipeError, RefusedError
from layercut.metrics import METRICS, Metric
from layercut.operations import OPERATIONS
from layercut.plan import Measurement, Plan, Table
from layercut.planner import build_plan
from layercut.recipe import Recipe, load_recipe

DEPTH = 6
OPERATION_LIST = ", ".join(sorted(OPERATIONS))
METRIC_LIST = ", ".join(METRICS)
SELECTOR = 'expected a layer such as 3, a range such as "20-24", or {every: 2, from: 8, to: 24}'
COUNT = "expected a number of layers such as 6, or a percentage such as 25%"
SIZE = "expected a size such as 5GB, 500MB or 5GiB"
YAML = "not valid YAML:"
INDENT = "check the indentation: what belongs together begins in the same column"
COLON = "check the indentation, and that a space follows every ':'; text with ': ' in it goes in quotes"
NOTHING_BEFORE = "no layer stands before layer 0 that a map could be folded into; prune it without a map"
EITHER = "takes either 'layers' (how many) or 'at' (which)"
BUDGETS = "takes either one of layers, params, size, max_distance, max_loss_increase (how many) or 'at' (which)"
NAMED = "with 'at' nothing is chosen: strategy, metric and protect go with a budget"
PARAMS = "expected a number of parameters such as 6B or 135M"
NUMBER = "expected a number such as 0.5"
FACTOR = "expected a factor such as 0.5, or a list of factors that is spread over the slice"
KEYS = "known keys are at, candidates, layers, metric, protect, strategy"
STRATEGY = "expected 'block', 'blocks', 'rank', 'deepest', 'loss', 'greedy', 'evolve' or 'best'"
DTYPE = "expected 'float16', 'bfloat16', 'float32' or 'float64'"
PAIR = "layer_range takes two boundaries [a, b): layers a to b - 1"
EMPTY = "is empty: [a, b) holds layers a to b - 1"
ONE_SOURCE = "'sources' is a list of exactly one source: {model, layer_range}"
FORMS = "a slice takes either 'layer_range' or 'sources'"
SOURCES = "known are builtin, hub, mix, text"


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
    (
        "model: m\nmerge_method: slerp",
        "r.yaml:2:15: merge_method 'slerp' blends the tensors of models, and layercut only moves layers; use mergekit-yaml for it",
    ),
    ("model: m\ndepth: ten", "r.yaml:2:8: depth: expected a whole number, found 'ten'"),
    ("model: m\ndepth: 2.5", "r.yaml:2:8: depth: expected a whole number, found 2.5"),
    ("model: m\ndepth: true", "r.yaml:2:8: depth: expected a whole number, found true"),
    ("model: m\ndepth: 0", "r.yaml:2:8: depth: expected at least 1, found 0"),
    ("model: m\ndepth: 4", "r.yaml:2:1: 'depth' goes with 'slices'; to remove layers of a model use steps: [{prune: {layers: N}}]"),
    # YAML as it is mistyped
    ("model: m\n steps: []", f"r.yaml:2:7: {YAML} mapping values are not allowed in this context; {COLON}"),
    ("model:m\nsteps: []", f"r.yaml:2:6: {YAML} mapping values are not allowed in this context; {COLON}"),
    ("model: m\nsteps:\n  - prune: {at: 3}\n output: x", f"r.yaml:4:2: {YAML} did not find expected key; {INDENT}"),
    ("model: m\nsteps:\n  - prune:\n  at: 3", f"r.yaml:4:3: {YAML} did not find expected '-' indicator; {INDENT}"),
    (
        "model: m\nsteps:\n  - prune: {at: 3\noutput: x",
        f"r.yaml:4:7: {YAML} did not find expected ',' or '}}'; is the bracket of line 3 closed?",
    ),
    ('model: m\nsteps:\n  - prune: {at: "3-4}\n', f"r.yaml:3:17: {YAML} this quote is not closed"),
    (
        steps("prune: {layers: %25}"),
        f"r.yaml:3:21: {YAML} found character that cannot start any token; a percentage is written 25%",
    ),
    (
        steps("zero: {at: 1, tensors: *.o_proj.weight}"),
        f"r.yaml:3:29: {YAML} did not find expected alphabetic or numeric character; put text that begins with '*' or '&' in quotes",
    ),
    ("model: @m", f"r.yaml:1:8: {YAML} found character that cannot start any token; put the value in quotes"),
    (
        'model: "C:\\models\\m"',
        f"r.yaml:1:11: {YAML} found unknown escape character; "
        "in double quotes a backslash is written twice; in single quotes it stands for itself",
    ),
    # keys that stand too far to the left, or without a space
    ("model: m\nprune: {at: 3}", "r.yaml:2:1: unknown key 'prune'; it belongs below 'steps'"),
    ("model: m\nsamples: 3", "r.yaml:2:1: unknown key 'samples'; it belongs below 'calibration'"),
    ("model: m\nlayer_range: [0, 4]", "r.yaml:2:1: unknown key 'layer_range'; it belongs below 'slices'"),
    (
        "model: m\nsteps:\n  - prune:\n    at: 3",
        "r.yaml:4:5: 'at' stands beside 'prune', not below it; indent it further, or write prune: {at: …}",
    ),
    ("model: m\nsteps:\n  - prune: {at: 1}\n    prun: {at: 3}", "r.yaml:4:5: unknown operation 'prun'; did you mean 'prune'?"),
    (steps("prune: {at:3}"), "r.yaml:3:13: unknown key 'at:3'; write a space behind the ':'"),
    (steps("prune: {at: 3,4}"), "r.yaml:3:19: unknown key '4'; a list goes in brackets, such as [3, 4]"),
    (
        "model: m\nsteps:\n  -prune: {at: 3}",
        'r.yaml:3:3: steps: expected a list, found {"-prune": {"at": 3}}; begin each entry with a dash and a space',
    ),
    # slices
    ("slices: []", "r.yaml:1:9: slices: expected at least one entry, found []"),
    ("slices: 5", "r.yaml:1:9: slices: expected a list, found 5"),
    (slices("5"), "r.yaml:2:5: slices.0: expected a mapping, found 5"),
    (slices("{layer_range: [0, 4]}"), "r.yaml:2:5: which model? neither the slice nor the recipe names one"),
    (slices("{model: m}"), f"r.yaml:2:5: {FORMS}"),
    (slices("{model: m, layer_range: [0, 4], modl: x}"), "r.yaml:2:37: unknown key 'modl'; did you mean 'model'?"),
    (slices("{model: m, range: [0, 4]}"), "r.yaml:2:16: unknown key 'range'; did you mean 'layer_range'?"),
    (
        slices("{model: m, start: 0}"),
        "r.yaml:2:16: unknown key 'start'; known keys are layer_range, max, min, model, overlap, parameters, protect, sources",
    ),
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
    (slices("{model: m, layer_range: [0, auto], min: 0}"), "r.yaml:2:45: slices.0.min: expected at least 1, found 0"),
    (slices("{model: m, layer_range: [0, auto], min: 3, max: 2}"), "r.yaml:2:40: min 3 is more than max 2"),
    (slices("{model: m, layer_range: [0, auto], min: 2.5}"), "r.yaml:2:45: slices.0.min: expected a whole number, found 2.5"),
    (slices("{model: m, layer_range: [0, auto], max: many}"), "r.yaml:2:45: slices.0.max: expected a whole number, found 'many'"),
    (slices("{model: m, layer_range: [0, auto], mn: 2}"), "r.yaml:2:40: unknown key 'mn'; did you mean 'min'?"),
    (slices("{model: m, layer_range: [0, auto], protect: x}"), f"r.yaml:2:49: {SELECTOR}, found 'x'"),
    (slices("{model: m, layer_range: [0, auto], overlap: 1}"), "r.yaml:2:40: 'overlap' goes with a start that is auto"),
    (slices("{model: m, layer_range: [auto, 6], overlap: -1}"), "r.yaml:2:49: slices.0.overlap: expected at least 0, found -1"),
    (slices("{model: m, layer_range: [auto, 6], overlap: 1}"), "r.yaml:2:49: 'overlap' needs a slice of the same model before it"),
    (slices("{model: m, layer_range: [0, 6], min: 2}"), "r.yaml:2:29: min, max, overlap and protect go with an 'auto' boundary"),
    (slices("{model: m, layer_range: [0, 6], overlap: 0}"), "r.yaml:2:37: 'overlap' goes with a start that is auto"),
    (slices("{model: m, layer_range: [2, auto], protect: 1}"), "r.yaml:2:29: no range satisfies the constraints of this slice"),
    (slices("{model: m, layer_range: [0, auto], parameters: 5}"), "r.yaml:2:52: slices.0.parameters: expected a mapping, found 5"),
    (slices("{model: m, layer_range: [0, auto], parameters: {scal: 1}}"), "r.yaml:2:53: unknown key 'scal'; did you mean 'scale'?"),
    (slices("{model: m, layer_range: [0, auto], parameters: {scale: big}}"), f"r.yaml:2:60: {FACTOR}, found 'big'"),
    (slices("{model: m, layer_range: [0, auto], parameters: {scale: [1, x]}}"), f"r.yaml:2:61: {FACTOR}"),
    (
        slices("{model: m, layer_range: [0, auto], parameters: {scale: {filter: 5, value: 1}}}"),
        "r.yaml:2:69: slices.0.parameters.scale.filter: expected text, found 5",
    ),
    (slices("{model: m, layer_range: [0, auto], parameters: {scale: {filter: x}}}"), "r.yaml:2:60: 'value' is missing"),
    (
        slices("{model: m, layer_range: [0, auto], parameters: {scale: [{value: 1, fliter: x}]}}"),
        "r.yaml:2:72: unknown key 'fliter'; did you mean 'filter'?",
    ),
    (
        slices("{model: m, layer_range: [0, auto], parameters: {scale: [1, {value: 2}]}}"),
        "r.yaml:2:61: slices.0.parameters.scale.0: expected a mapping, found 1",
    ),
    (slices("{model: m, layer_range: [0, auto], parameters: {scale: []}}"), f"r.yaml:2:60: {FACTOR}"),
    # steps
    (
        "model: m\nsteps: {prune: {layers: 2}}",
        'r.yaml:2:8: steps: expected a list, found {"prune": {"layers": 2}}; begin each entry with a dash and a space',
    ),
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
    (steps("prune:"), f"r.yaml:3:11: {BUDGETS}"),
    (steps("prune: {}"), f"r.yaml:3:12: {BUDGETS}"),
    (steps("prune: {layers: 2, at: 1}"), f"r.yaml:3:12: {BUDGETS}"),
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
    (steps("prune: {layers: 2, size: 1GB}"), f"r.yaml:3:12: {BUDGETS}"),
    (steps("prune: {params: six}"), f"r.yaml:3:21: {PARAMS}, found 'six'"),
    (steps("prune: {params: 6GB}"), f"r.yaml:3:21: {PARAMS}, found '6GB'"),
    (steps("prune: {params: 0}"), "r.yaml:3:21: a number of parameters must be at least one, found 0"),
    (steps("prune: {params: 10}"), "r.yaml:3:21: cannot come down to 10 parameters: 320 are left when 5 of 6 layers are removed"),
    (steps("prune: {size: 5XB}"), f"r.yaml:3:19: {SIZE}, found '5XB'"),
    (steps("prune: {size: 1B}"), "r.yaml:3:19: cannot come down to 1 bytes: 320 are left when 5 of 6 layers are removed"),
    (steps("prune: {size: true}"), f"r.yaml:3:19: {SIZE}, found true"),
    (steps("prune: {max_distance: 0}"), "r.yaml:3:27: steps.0.prune.max_distance: expected more than 0, found 0"),
    (steps("prune: {max_distance: -1}"), "r.yaml:3:27: steps.0.prune.max_distance: expected more than 0, found -1"),
    (steps("prune: {max_distance: near}"), f"r.yaml:3:27: {NUMBER}, found 'near'"),
    (steps("prune: {max_distance: .inf}"), f"r.yaml:3:27: {NUMBER}, found Infinity"),
    (steps("prune: {max_distance: true}"), f"r.yaml:3:27: {NUMBER}, found true"),
    (steps("prune: {max_distance: 0.1}"), "r.yaml:3:27: no layer of 6 can be removed within a distance of 0.1; the least is 0.25"),
    (steps("prune: {max_distanse: 0.1}"), "r.yaml:3:13: unknown key 'max_distanse'; did you mean 'max_distance'?"),
    (steps("prune: {layers: 2, strategy: besst}"), f"r.yaml:3:34: steps.0.prune.strategy: {STRATEGY}, found 'besst'; did you mean 'best'?"),
    (steps("prune: {layers: 2, strategy: blok}"), f"r.yaml:3:34: steps.0.prune.strategy: {STRATEGY}, found 'blok'; did you mean 'block'?"),
    (steps("prune: {layers: 2, strategy: 5}"), f"r.yaml:3:34: steps.0.prune.strategy: {STRATEGY}, found 5"),
    (steps("prune: {layers: 2, protect: [0, 9]}"), "r.yaml:3:37: layer 9 does not exist: the stack has layers 0 to 5 here"),
    (steps("prune: {layers: 2, protect: all}"), f"r.yaml:3:33: {SELECTOR}, found 'all'"),
    (steps("prune: {layers: 6, protect: 0-5}"), "r.yaml:3:21: cannot remove 6 of 6 layers, 6 of them protected; at most 0"),
    (steps("prune: {at: 2, strategy: rank}"), f"r.yaml:3:20: {NAMED}"),
    (steps("prune: {at: 2, protect: 1}"), f"r.yaml:3:20: {NAMED}"),
    (steps("prune: {at: 2, metric: cosine}"), f"r.yaml:3:20: {NAMED}"),
    (steps("prune: [2]"), "r.yaml:3:12: steps.0.prune: expected a mapping, found [2]"),
    (steps("prune: [{layers: 2}]"), 'r.yaml:3:12: steps.0.prune: expected a mapping, found [{"layers": 2}]'),
    (
        steps("duplicate: {size: 5GB}"),
        f"r.yaml:3:17: unknown key 'size'; {KEYS}, times",
    ),
    (steps("duplicate: {layers: 2, times: 0}"), "r.yaml:3:35: steps.0.duplicate.times: expected at least 1, found 0"),
    (steps("expand: {}"), "r.yaml:3:13: takes either 'every' or 'at'"),
    (steps("expand:"), "r.yaml:3:12: takes either 'every' or 'at'"),
    (steps("expand: {every: 0}"), "r.yaml:3:21: steps.0.expand.every: expected at least 1, found 0"),
    (steps("expand: {every: 9}"), "r.yaml:3:21: every 9 layers, but the stack has 6 here"),
    (steps("expand: {every: 2, at: 1}"), "r.yaml:3:13: takes either 'every' or 'at'"),
    (steps("expand: {every: 2.5}"), "r.yaml:3:21: steps.0.expand.every: expected a whole number, found 2.5"),
    (steps("expand: {at: 9}"), "r.yaml:3:18: layer 9 does not exist: the stack has layers 0 to 5 here"),
    (steps("expand: 4"), "r.yaml:3:13: steps.0.expand: expected a mapping, found 4"),
    (steps("merge: {at: 3}"), "r.yaml:3:17: an average needs at least two layers"),
    (steps("merge: {at: [1, 2], weights: 0.5}"), "r.yaml:3:34: steps.0.merge.weights: expected a list, found 0.5"),
    (steps("merge: {at: [1, 2], weights: [0.5]}"), "r.yaml:3:34: 1 weights for 2 layers"),
    (steps("merge: {at: [1, 2], weights: [1, x]}"), f"r.yaml:3:38: {NUMBER}, found 'x'"),
    (steps("merge: {at: [1, 2], weights: [1, -1]}"), "r.yaml:3:34: weights must not add up to zero"),
    (steps("merge: {at: [1, 2], weights: []}"), "r.yaml:3:34: 0 weights for 2 layers"),
    (steps("merge: {at: [1, 2], weights: [1, .nan]}"), f"r.yaml:3:38: {NUMBER}, found NaN"),
    (steps("merge: {weights: [1, 2]}"), "r.yaml:3:12: 'at' is missing"),
    (steps("merge: {at: [1, 2], weight: [1, 2]}"), "r.yaml:3:25: unknown key 'weight'; did you mean 'weights'?"),
    (
        steps("scale: {at: 1, tensors: '*', by: 2}", "merge: {at: [1, 2]}"),
        "r.yaml:4:17: layer 1 is not as its model has it: average before other arithmetic",
    ),
    (steps("replace: {layers: 2}"), "r.yaml:3:14: 'with' is missing"),
    (steps("replace: {layers: 2, with: cubic}"), "r.yaml:3:32: steps.0.replace.with: expected 'linear', found 'cubic'"),
    (steps("replace: {with: linear}"), f"r.yaml:3:14: {EITHER}"),
    (steps("replace: {layers: 6, with: linear}"), "r.yaml:3:23: cannot replace 6 of 6 layers, 1 of them protected; at most 5"),
    (steps("replace: {at: [0, 3], with: linear}"), f"r.yaml:3:19: {NOTHING_BEFORE}"),
    (steps("prune: {at: 0, heal: fold}"), f"r.yaml:3:17: {NOTHING_BEFORE}"),
    (steps("prune: {at: 2, heal: train}"), "r.yaml:3:26: steps.0.prune.heal: expected 'fold', found 'train'"),
    (steps("prune: {at: 2, ridge: 0.1}"), "r.yaml:3:20: 'ridge' goes with heal: fold"),
    (
        steps("replace: {layers: 2, by: linear}"),
        "r.yaml:3:26: unknown key 'by'; known keys are at, candidates, layers, metric, protect, ridge, strategy, with",
    ),
    (steps("scale: {by: 2}"), "r.yaml:3:12: 'tensors' is missing"),
    (steps("scale: {tensors: '*'}"), "r.yaml:3:12: 'by' is missing"),
    (steps("scale: {tensors: '', by: 2}"), "r.yaml:3:22: steps.0.scale.tensors: expected some text, found ''"),
    (steps("scale: {tensors: 5, by: 2}"), "r.yaml:3:22: steps.0.scale.tensors: expected text, found 5"),
    (steps("scale: {tensors: '*', by: half}"), f"r.yaml:3:31: {NUMBER}, found 'half'"),
    (steps("scale: {tensors: '*', by: .inf}"), f"r.yaml:3:31: {NUMBER}, found Infinity"),
    (
        steps("scale: {tensors: '*.gate.weight', by: 2}"),
        "r.yaml:3:22: no tensor of these layers is named '*.gate.weight'; there are down_proj, o_proj",
    ),
    (
        steps("scale: {at: 1, tensors: down_proj, by: 2}"),
        "r.yaml:3:29: no tensor of these layers is named 'down_proj'; "
        "a pattern is for whole names, such as model.layers.1.mlp.down_proj.weight",
    ),
    (steps("scale: {at: 9, tensors: '*', by: 2}"), "r.yaml:3:17: layer 9 does not exist: the stack has layers 0 to 5 here"),
    (steps("scale: {tensor: '*', by: 2}"), "r.yaml:3:13: unknown key 'tensor'; did you mean 'tensors'?"),
    (steps("zero: {tensors: '*'}"), "r.yaml:3:11: 'at' is missing"),
    (steps("zero: {at: 1}"), "r.yaml:3:11: 'tensors' is missing"),
    (
        steps("zero: {at: 1, tensors: '*.q_proj.*'}"),
        "r.yaml:3:28: no tensor of these layers is named '*.q_proj.*'; there are down_proj, o_proj",
    ),
    (steps("zero: {at: 1, tensors: '*', by: 0}"), "r.yaml:3:33: unknown key 'by'; known keys are at, tensors"),
    (steps("reorder: {to: [1, 0]}"), "r.yaml:3:19: leaves out layer 2 and 3 more; to drop layers use keep"),
    (steps("reorder: {to: [0-5, 1]}"), "r.yaml:3:25: layer 1 is named twice"),
    (steps("reorder: {at: [1, 0]}"), "r.yaml:3:15: unknown key 'at'; known keys are to"),
    (steps("reorder: [1, 0]"), "r.yaml:3:14: steps.0.reorder: expected a mapping, found [1, 0]"),
    (steps("reorder: {to: 0-6}"), "r.yaml:3:19: layer 6 does not exist: the stack has layers 0 to 5 here"),
    # metrics
    ("model: m\nmetric: angulr", f"r.yaml:2:9: unknown metric 'angulr'; did you mean 'angular'? (known: {METRIC_LIST})"),
    (
        "model: m\nmetric: angular:all",
        f"r.yaml:2:9: unknown metric 'angular:all'; write {{name: angular, token: all}} (known: {METRIC_LIST})",
    ),
    ("model: m\nmetrics: [angular, x]", f"r.yaml:2:20: unknown metric 'x' (known: {METRIC_LIST})"),
    ("model: m\nmetrics: angular", "r.yaml:2:10: metrics: expected a list, found 'angular'"),
    ("model: m\nmetrics: []", "r.yaml:2:10: metrics: expected at least one entry, found []"),
    ("model: m\nmetric: {token: all}", f"r.yaml:2:9: a metric needs a name, one of: {METRIC_LIST}"),
    (
        "model: m\nmetric: {name: angular, token: first}",
        "r.yaml:2:32: token must be last, all, completion, skip-first-K such as skip-first-4, or the index of a token, found 'first'",
    ),
    ("model: m\nmetric: {name: angular, tokn: all}", "r.yaml:2:25: unknown key 'tokn'; did you mean 'token'?"),
    ("model: m\nmetric: angular\nmetrics: [cosine]", "r.yaml:3:1: takes 'metric' or 'metrics', not both"),
    (steps("prune: {layers: 2, metric: bi}"), f"r.yaml:3:32: unknown metric 'bi'; the BI score is 'cosine' (known: {METRIC_LIST})"),
    # calibration
    ("model: m\ncalibration:\n", "r.yaml:2:13: calibration: expected a mapping, found nothing"),
    ("model: m\ncalibration: builtin", "r.yaml:2:14: calibration: expected a mapping, found 'builtin'"),
    ("model: m\ncalibration: {samples: 3}", f"r.yaml:2:14: 'source' is missing; {SOURCES}"),
    ("model: m\ncalibration: {source: hubb}", "r.yaml:2:23: unknown source 'hubb'; did you mean 'hub'?"),
    ("model: m\ncalibration: {source: web}", f"r.yaml:2:23: unknown source 'web'; {SOURCES}"),
    ("model: m\ncalibration: {source: hub}", "r.yaml:2:14: 'dataset' is missing"),
    ("model: m\ncalibration: {source: builtin, smples: 3}", "r.yaml:2:32: unknown key 'smples'; did you mean 'samples'?"),
    (
        "model: m\ncalibration: {source: text, path: x, dataset: y}",
        "r.yaml:2:38: unknown key 'dataset'; known keys are batch_size, bos, column, completion, max_length, min_length, packed, path, "
        "prompt, samples, seed, source",
    ),
    ("model: m\ncalibration: {source: text, path: x, prompt: q}", "r.yaml:2:38: 'prompt' goes with 'completion'"),
    (
        "model: m\ncalibration: {source: text, path: x, prompt: q, completion: a, column: c}",
        "r.yaml:2:64: takes 'column', or 'prompt' and 'completion', not both",
    ),
    ("model: m\ncalibration: {source: mix}", "r.yaml:2:14: 'of' is missing"),
    ("model: m\ncalibration: {source: mix, of: []}", "r.yaml:2:32: calibration.of: expected at least one entry, found []"),
    ("model: m\ncalibration: {source: mix, of: [{path: a}]}", "r.yaml:2:33: 'source' is missing; known are builtin, hub, text"),
    ("model: m\ncalibration: {source: mix, of: [{source: txt}]}", "r.yaml:2:42: unknown source 'txt'; did you mean 'text'?"),
    (
        "model: m\ncalibration: {source: mix, of: [{source: builtin, weight: 0}]}",
        "r.yaml:2:59: calibration.of.0.weight: expected more than 0, found 0",
    ),
    (
        "model: m\ncalibration: {source: mix, of: [{source: text, path: a, samples: 3}]}",
        "r.yaml:2:57: unknown key 'samples'; known keys are column, completion, path, prompt, source, weight",
    ),
    (
        "model: m\nevaluate: {perplexity: {source: mix, of: [{source: builtin}]}}",
        "r.yaml:2:33: unknown source 'mix'; known are builtin, hub, text",
    ),
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
    # the other keys of the whole
    ("model: m\nparameters: {scale: true}", f"r.yaml:2:21: {FACTOR}, found true"),
    ("model: m\nparameters: 0.5", "r.yaml:2:13: parameters: expected a mapping, found 0.5"),
    ("model: m\ndtype: int8", f"r.yaml:2:8: dtype: {DTYPE}, found 'int8'"),
    ("model: m\ndtype: fp16", f"r.yaml:2:8: dtype: {DTYPE}, found 'fp16'; did you mean 'float16'?"),
    ("model: m\ndtype: BFloat16", f"r.yaml:2:8: dtype: {DTYPE}, found 'BFloat16'; did you mean 'bfloat16'?"),
    ("model: m\ndtype: bf16", f"r.yaml:2:8: dtype: {DTYPE}, found 'bf16'; did you mean 'bfloat16'?"),
    ("model: m\nout_dtype: 16", f"r.yaml:2:12: out_dtype: {DTYPE}, found 16"),
    ("model: m\nallow: everything", "r.yaml:2:8: allow: expected 'inexact', found 'everything'"),
    ("model: m\nallow: true", "r.yaml:2:8: allow: expected 'inexact', found true"),
    ("model: m\nbase_model: nowhere", "r.yaml:2:13: nowhere: no such folder; check the name"),
    ("model: m\nbase_model: ''", "r.yaml:2:13: base_model: expected some text, found ''"),
    ("model: m\nbase_model: [m]", 'r.yaml:2:13: base_model: expected text, found ["m"]'),
    ("model: m\ntokenizer_source: nowhere", "r.yaml:2:19: nowhere: no such folder; check the name"),
    ("model: m\ntokenizer_source: {model: m}", 'r.yaml:2:19: tokenizer_source: expected text, found {"model": "m"}'),
    (
        "model: m\nchat_template: nobody",
        "r.yaml:2:16: unknown chat template 'nobody'; known are alpaca, chatml, exaone, llama3, mistral; or write its text",
    ),
    ("model: m\nchat_template: chatmll", "r.yaml:2:16: unknown chat template 'chatmll'; did you mean 'chatml'?"),
    ("model: m\nchat_template: ''", "r.yaml:2:16: chat_template: expected some text, found ''"),
    ("model: m\nchat_template: 5", "r.yaml:2:16: chat_template: expected text, found 5"),
    (
        "model: m\nsteps:\n  - prune: {layers: 2}\n    keep: {at: 1}",
        "r.yaml:3:5: a step is one operation, found 2 (prune, keep): write each as a step of its own",
    ),
    ("model: m\nsteps: [[prune]]", f"r.yaml:2:9: expected a step such as 'prune: {{layers: 6}}' (operations: {', '.join(OPERATIONS)})"),
    (
        "model: m\nsteps: ['prune: {layers: 2}']",
        f"r.yaml:2:9: expected a step such as 'prune: {{layers: 6}}' (operations: {', '.join(OPERATIONS)}), found 'prune: {{layers: 2}}'",
    ),
    (
        "model: m\nsteps: [null]",
        f"r.yaml:2:9: expected a step such as 'prune: {{layers: 6}}' (operations: {', '.join(OPERATIONS)}), found nothing",
    ),
    ("model: m\nsteps: [{}]", f"r.yaml:2:9: expected a step such as 'prune: {{layers: 6}}' (operations: {', '.join(OPERATIONS)})"),
]


@pytest.mark.parametrize(("text", "message"), TABLE, ids=[text.replace("\n", "/") or "nothing" for text, _ in TABLE])
def test_what_is_said(text: str, message: str, tmp_path: Path, model: Checkpoint) -> None:
    assert said(text, tmp_path, model) == message


def test_the_known_keys_are_listed_when_none_is_near(tmp_path: Path, model: Checkpoint) -> None:
    message = said("model: m\nxyzzy: red", tmp_path, model)
    assert message == f"r.yaml:2:1: unknown key 'xyzzy'; known keys are {', '.join(sorted(Recipe.model_fields))}"


def test_two_mistakes_are_two_lines(tmp_path: Path, model: Checkpoint) -> None:
    text = steps("prune: {layers: six}", "keep: {at: [a, 1]}") + "output: {path: x, max_shard_size: 5XB}\n"
    assert said(text, tmp_path, model).splitlines() == [
        f"r.yaml:3:21: {COUNT}, found 'six'",
        f"r.yaml:4:17: {SELECTOR}, found 'a'",
        f"r.yaml:5:35: {SIZE}, found '5XB'",
    ]


def test_of_many_mistakes_the_first_are_told(tmp_path: Path, model: Checkpoint) -> None:
    lines = said("model: m\n" + "".join(f"xyz{at}: 1\n" for at in range(30)), tmp_path, model).splitlines()
    assert [line.partition("; ")[0] for line in lines[:12]] == [f"r.yaml:{at + 2}:1: unknown key 'xyz{at}'" for at in range(12)]
    assert ["known keys are" in line for line in lines] == [True] + [False] * 12
    assert lines[12:] == ["and 18 more mistakes; is this a recipe?"]


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
    for assignment, message in (
        ("step.0.prune.at=2", "--set step.0.prune.at: unknown key 'step'; did you mean 'steps'?"),
        ("steps.0.prun.at=2", "--set steps.0.prun.at: unknown operation 'prun'; did you mean 'prune'?"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, [assignment])
        assert str(caught.value) == message
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["steps.-1.prune.colour=red"])
    assert str(caught.value).startswith("--set steps.-1.prune.colour: unknown key 'colour'; known keys are at, candidates, heal, layers, ")


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
                [
                    *OPERATIONS,
                    "model",
                    "sources",
                    "layer_range",
                    "layers",
                    "at",
                    "every",
                    "from",
                    "to",
                    "name",
                    "token",
                    "source",
                    "path",
                    "min",
                    "max",
                    "protect",
                    "overlap",
                    "parameters",
                    "scale",
                    "filter",
                    "value",
                    "params",
                    "size",
                    "max_distance",
                    "strategy",
                    "weights",
                    "with",
                    "tensors",
                    "by",
                    "times",
                    "output",
                    "max_shard_size",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
keys = [key for key in Recipe.model_fields if key not in ("model", "base_model", "tokenizer_source")]


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
    except RefusedError as error:  # arithmetic on bytes, which names the tensor
        assert str(error).count("\n") == 0
    except (RecipeError, CheckpointError) as error:
        for line in str(error).splitlines():
            assert line.startswith(f"{path}:"), line
            for jargon in ("Input should", "valid tuple", "discriminator", "pydantic", "Field required", "expected None"):
                assert jargon not in line
