from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layercut.architecture import Member
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import CheckpointError, LayercutError, RecipeError, RefusedError
from layercut.metrics import Metric
from layercut.plan import Choice, Distance, LeftOut, Measurement, Plan, Seam, Table, TensorMade
from layercut.planner import build_plan
from layercut.recipe import Recipe, parse_recipe
from layercut.yamltext import YamlText

DEPTH = 12
Matrix = Sequence[Sequence[float]]


def read(text: str) -> Recipe:
    return parse_recipe(YamlText(text, "r.yaml"))


class Meter:
    """A measuring function that answers from matrices by metric label, and counts its calls."""

    def __init__(self, matrices: Mapping[str, Matrix] | Matrix, stderr: float = 0.0) -> None:
        self.matrices = matrices if isinstance(matrices, Mapping) else {"angular[last]": matrices}
        self.stderr = stderr
        self.calls: list[tuple[list[str], list[str], Any]] = []

    def __call__(self, members: Mapping[str, Member], metrics: Sequence[Metric], calibration: Any) -> Measurement:
        self.calls.append((list(members), [metric.label for metric in metrics], calibration))
        tables = []
        pairs = itertools.combinations_with_replacement(members, 2)
        for metric, (a, b) in itertools.product(metrics, pairs):
            mean = tuple(tuple(row) for row in self.matrices[metric.label if a == b else f"{a} {b}"])
            stderr = tuple(tuple(self.stderr for _ in row) for row in mean)
            tables.append(Table(metric=metric.label, a=a, b=b, mean=mean, stderr=stderr))
        return Measurement(tables=tuple(tables), samples=3, tokens=30, details={"made": "by hand"})


def never(*_: Any) -> Measurement:
    raise AssertionError("a static recipe measures nothing")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": DEPTH, "vocab_size": 8}
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("planner") / "m", byte_tensors(DEPTH), config, shards=3))


Planning = Callable[..., Plan]


@pytest.fixture(scope="module")
def planned(model: Checkpoint) -> Planning:
    def plan(text: str, measure: Any = never) -> Plan:
        return build_plan(read(text), resolve=lambda reference: model, measure=measure)

    return plan


def symmetric(dice: random.Random, values: Sequence[float]) -> list[list[float]]:
    matrix = [[0.0] * (DEPTH + 1) for _ in range(DEPTH + 1)]
    for i in range(DEPTH + 1):
        for j in range(i):
            matrix[i][j] = matrix[j][i] = dice.choice(values)
    return matrix


def least_block(matrix: Matrix, length: int) -> int:
    """The first start whose block has the least distance from its input to its output: plain loops."""
    best = 0
    for start in range(DEPTH - length + 1):
        if matrix[start][start + length] < matrix[best][best + length]:
            best = start
    return best


def indices(plan: Plan) -> list[int]:
    return [layer.index for layer in plan.actions.layers]


PLANTED = symmetric(random.Random(7), [0.3, 0.35, 0.4, 0.45, 0.5, 0.2, 0.2])


@pytest.mark.parametrize("length", range(1, DEPTH))
def test_prune_takes_the_block_of_brute_force(length: int, planned: Planning) -> None:
    plan = planned(f"model: m\nsteps: [{{prune: {{layers: {length}}}}}]", Meter(PLANTED))
    start = least_block(PLANTED, length)
    assert indices(plan) == [index for index in range(DEPTH) if not start <= index < start + length]
    choice = plan.choices[0]
    assert choice.where == "steps.0.prune"
    assert choice.chosen == f"remove layers [{start}, {start + length})"
    assert choice.cost == PLANTED[start][start + length]
    assert [(c.start, c.stop, c.cost) for c in choice.candidates] == [
        (s, s + length, PLANTED[s][s + length]) for s in range(DEPTH - length + 1)
    ]


@pytest.mark.parametrize("length", range(1, DEPTH + 1))
def test_duplicate_takes_the_block_of_brute_force(length: int, planned: Planning) -> None:
    plan = planned(f"model: m\nsteps: [{{duplicate: {{layers: {length}}}}}]", Meter(PLANTED))
    start = least_block(PLANTED, length)
    assert indices(plan) == [*range(start + length), *range(start, DEPTH)]
    assert plan.choices[0].chosen == f"repeat layers [{start}, {start + length})"
    assert plan.choices[0].cost == PLANTED[start][start + length]


def test_a_planted_block_is_found_by_both_forms(planned: Planning) -> None:
    matrix = [[0.5 if i != j else 0.0 for j in range(DEPTH + 1)] for i in range(DEPTH + 1)]
    matrix[5][9] = matrix[9][5] = 0.01
    assert indices(planned("model: m\nsteps: [{prune: {layers: 4}}]", Meter(matrix))) == [0, 1, 2, 3, 4, 9, 10, 11]
    text = "slices: [{model: m, layer_range: [0, auto]}, {model: m, layer_range: [auto, end]}]\ndepth: 8"
    plan = planned(text, Meter(matrix))
    assert indices(plan) == [0, 1, 2, 3, 4, 9, 10, 11]
    assert plan.choices == (Choice(where="slices", metric="angular[last]", chosen="slices [0, 5) + [9, 12)", cost=0.01),)
    assert plan.seams == (
        Seam(
            at=5, from_model="m", from_boundary=5, to_model="m", to_boundary=9, distances={"angular[last]": Distance(mean=0.01, stderr=0)}
        ),
    )


def slices(depth: int, last: object = "end") -> str:
    return f"slices: [{{model: m, layer_range: [0, auto]}}, {{model: m, layer_range: [auto, {last}]}}]\ndepth: {depth}"


def same(one: Plan, two: Plan) -> None:
    assert one.digest == two.digest
    assert one.actions == two.actions
    assert one.seams == two.seams
    assert one.edits == two.edits
    assert one.left_out == two.left_out
    assert one.choices[0].cost == two.choices[0].cost


matrices = st.builds(
    symmetric,
    st.randoms(use_true_random=False),
    st.sampled_from([[0.1, 0.2], [0.0, 0.5], [0.25], [0.1, 0.2, 0.3, 0.4], [k / 97 for k in range(97)]]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(matrices, st.integers(1, DEPTH - 1), st.sampled_from(["end", 12]))
def test_auto_slices_make_the_plan_of_prune(planned: Planning, matrix: Matrix, length: int, last: object) -> None:
    same(
        planned(f"model: m\nsteps: [{{prune: {{layers: {length}}}}}]", Meter(matrix)), planned(slices(DEPTH - length, last), Meter(matrix))
    )


@settings(max_examples=60, deadline=None)
@given(matrices, st.integers(1, DEPTH))
def test_auto_slices_make_the_plan_of_duplicate(planned: Planning, matrix: Matrix, length: int) -> None:
    same(planned(f"model: m\nsteps: [{{duplicate: {{layers: {length}}}}}]", Meter(matrix)), planned(slices(DEPTH + length), Meter(matrix)))


def test_the_depth_of_the_model_changes_nothing(planned: Planning, model: Checkpoint) -> None:
    plan = planned(slices(DEPTH), Meter(PLANTED))
    assert indices(plan) == list(range(DEPTH))
    assert (plan.seams, plan.edits, plan.left_out) == ((), (), ())
    assert plan.actions.config == model.config_text


def test_a_step_sees_the_stack_of_the_steps_before_it(planned: Planning) -> None:
    """Total cost counts: after the first cut, the second is priced with the seam that is already there."""
    matrix = [[abs(i - j) / 10 for j in range(DEPTH + 1)] for i in range(DEPTH + 1)]
    matrix[2][4] = matrix[4][2] = 0.01
    matrix[2][6] = matrix[6][2] = 0.02  # widening the first cut is cheaper than a second seam
    meter = Meter(matrix)
    plan = planned("model: m\nsteps: [{prune: {layers: 2}}, {prune: {layers: 2}}]", meter)
    assert indices(plan) == [0, 1, 6, 7, 8, 9, 10, 11]
    assert [choice.chosen for choice in plan.choices] == ["remove layers [2, 4)", "remove layers [2, 4)"]
    assert [choice.cost for choice in plan.choices] == [0.01, 0.02]
    assert len(meter.calls) == 1


def brute(stack: list[int], length: int, matrix: Matrix) -> list[int]:
    def cost(order: list[int]) -> int:
        ends = [-1, *order, DEPTH]
        pairs = [(before + 1, after) for before, after in itertools.pairwise(ends)]
        return sum(round(matrix[b][a] * 10**12) for b, a in pairs if b != a)

    options = [stack[:start] + stack[start + length :] for start in range(len(stack) - length + 1)]
    return min(options, key=cost)  # min takes the first of equals


@settings(max_examples=40, deadline=None)
@given(matrices, st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_several_prunes_are_brute_force_each(planned: Planning, matrix: Matrix, lengths: list[int]) -> None:
    expected = list(range(DEPTH))
    for length in lengths:
        if length < len(expected):
            expected = brute(expected, length, matrix)
        else:
            return
    text = "model: m\nsteps: [" + ", ".join(f"{{prune: {{layers: {length}}}}}" for length in lengths) + "]"
    assert indices(planned(text, Meter(matrix))) == expected


STATIC = [
    "model: m",
    "model: m\nsteps: [{prune: {at: [3, 4]}}, {duplicate: {at: 0}}, {keep: {at: 0-3}}]",
    "slices: [{model: m, layer_range: [0, 8]}, {model: m, layer_range: [4, end]}]",
    "slices: [{model: m, layer_range: [0, 4]}]\ndepth: 4",
]


@pytest.mark.parametrize("text", STATIC)
def test_a_static_recipe_measures_nothing(text: str, planned: Planning) -> None:
    plan = planned(text, never)
    assert plan.measurement is None
    assert plan.choices == ()
    assert all(seam.distances == {} for seam in plan.seams)


def test_measuring_happens_once_with_the_metrics_of_recipe_and_steps(planned: Planning) -> None:
    flat = [[0.1 if i != j else 0.0 for j in range(DEPTH + 1)] for i in range(DEPTH + 1)]
    falling = [[(20 - i) / 50 if i != j else 0.0 for j in range(DEPTH + 1)] for i in range(DEPTH + 1)]
    meter = Meter({"angular[all]": flat, "cosine[all]": falling, "angular[last]": PLANTED}, stderr=0.3)
    plan = planned(
        "model: m\nmetrics: [{name: angular, token: all}]\ncalibration: {source: builtin, samples: 3}\n"
        "steps: [{prune: {layers: 1}}, {prune: {layers: 2, metric: cosine}}, {duplicate: {layers: 1, metric: angular}}, {prune: {at: 0}}]",
        meter,
    )
    assert [(models, labels) for models, labels, _ in meter.calls] == [(["m"], ["angular[all]", "cosine[all]", "angular[last]"])]
    assert meter.calls[0][2].samples == 3
    assert [choice.metric for choice in plan.choices] == ["angular[all]", "cosine[all]", "angular[last]"]
    assert all(set(seam.distances) == {"angular[all]", "cosine[all]", "angular[last]"} for seam in plan.seams)
    assert plan.seams and plan.seams[0].distances["angular[all]"] == Distance(mean=0.1, stderr=0.3)
    assert plan.measurement is not None and plan.measurement.details == {"made": "by hand"}


def test_the_metric_of_a_step_decides_there(planned: Planning) -> None:
    one, two = symmetric(random.Random(1), [0.5]), symmetric(random.Random(1), [0.5])
    one[3][5] = one[5][3] = two[8][10] = two[10][8] = 0.1
    meter = Meter({"angular[last]": one, "cosine[all]": two})
    assert indices(planned("model: m\nsteps: [{prune: {layers: 2}}]", meter)) == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert indices(planned("model: m\nsteps: [{prune: {layers: 2, metric: cosine}}]", meter)) == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert indices(planned("model: m\nmetrics: [cosine, angular]\nsteps: [{prune: {layers: 2}}]", meter)) == [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        10,
        11,
    ]


def test_candidates_carry_their_standard_error(planned: Planning) -> None:
    plan = planned("model: m\nsteps: [{prune: {at: 2}}, {prune: {layers: 1}}]", Meter(PLANTED, stderr=0.3))
    errors = [candidate.stderr for candidate in plan.choices[0].candidates]
    one, two = pytest.approx(0.3), pytest.approx(0.3 * 2**0.5)
    assert errors == [two, one, one, *[two] * 8]  # beside the first cut there is still one seam


def test_an_invalid_recipe_is_told_before_anything_is_measured(planned: Planning) -> None:
    with pytest.raises(RecipeError, match="the range 4 to 2 is empty"):
        planned("model: m\nsteps: [{prune: {at: 4-2}}, {prune: {layers: 2}}]", never)
    with pytest.raises(RecipeError, match="cannot remove 12 of 12 layers"):
        planned("model: m\nsteps: [{prune: {layers: 12}}]", never)


def test_a_whole_plan(planned: Planning, model: Checkpoint) -> None:
    plan = planned("model: m\nsteps: [{prune: {at: 2-10}}, {duplicate: {at: 0}}]\noutput: {path: ./out, max_shard_size: 128B}")
    assert plan.output == "./out"
    assert plan.donor == "m"
    assert list(plan.sources) == ["m"]
    source = plan.sources["m"]
    assert (source.reference, source.folder, source.revision, source.depth) == (model.reference, str(model.folder), None, DEPTH)
    assert (source.parameters, source.digest) == (model.parameters, model.digest)
    assert source.files == {
        f"model-0000{n}-of-00003.safetensors": model.files[f"model-0000{n}-of-00003.safetensors"].size for n in (1, 2, 3)
    }
    assert indices(plan) == [0, 0, 1, 11]
    assert [(seam.at, seam.from_boundary, seam.to_boundary) for seam in plan.seams] == [(1, 1, 0), (3, 2, 11)]
    assert [(edit.key, edit.before, edit.after) for edit in plan.edits] == [("num_hidden_layers", 12, 4)]
    assert json.loads(plan.actions.config)["num_hidden_layers"] == 4
    assert [left.what for left in plan.left_out] == ["layers 2 to 10 (18 tensors, model.layers.*)"]
    assert [len(file.tensors) for file in plan.actions.files] == [2, 2, 2, 2, 2, 1]
    assert plan.weight_bytes == 11 * 64
    names = [tensor.name for file in plan.actions.files for tensor in file.tensors]
    assert list(json.loads(plan.actions.index or "")["weight_map"]) == sorted(names)
    assert Plan.from_json(plan.to_json()) == plan


def test_companions_and_what_is_left_lying_are_listed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", byte_tensors(3), {"model_type": "llama", "num_hidden_layers": 3})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"x")
    plan = build_plan(read("model: m\nsteps: [{prune: {at: 1}}]"), resolve=lambda _: open_checkpoint(folder), measure=never)
    assert [(c.name, c.model, c.size) for c in plan.actions.companions] == [("tokenizer.json", "m", 2)]
    assert LeftOut(model="m", what="training_args.bin", reason="pickle of a training run: runs code when it is read") in plan.left_out


def test_aliases_name_models(model: Checkpoint) -> None:
    asked: list[str] = []

    def resolve(reference: str) -> Checkpoint:
        asked.append(reference)
        return model

    text = "models: {chat: ./a, code: ./b}\nslices: [{model: chat, layer_range: [0, 4]}, {model: chat, layer_range: [2, 12]}]"
    plan = build_plan(read(text), resolve=resolve, measure=never)
    assert asked == ["./a"]
    assert plan.donor == "chat"
    assert {layer.model for layer in plan.actions.layers} == {"chat"}
    assert indices(plan) == [0, 1, 2, 3, *range(2, 12)]


def test_a_misspelt_alias_is_told_with_the_alias(model: Checkpoint) -> None:
    def resolve(reference: str) -> Checkpoint:
        raise CheckpointError("no such folder", where=reference, hint="check the network")

    with pytest.raises(CheckpointError) as caught:
        build_plan(read("models: {chat: ./a}\nslices: [{model: caht, layer_range: [0, 4]}]"), resolve=resolve, measure=never)
    assert str(caught.value) == "r.yaml:2:18: caht: no such folder; did you mean 'chat'?"
    with pytest.raises(CheckpointError) as caught:
        build_plan(read("models: {chat: ./a}\nslices: [{model: chat, layer_range: [0, 4]}]"), resolve=resolve, measure=never)
    assert str(caught.value) == "r.yaml:2:18: ./a: no such folder; check the network"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("no such folder", where="/x", hint="look"), "r.yaml:1:34: /x: no such folder; look"),
        (CheckpointError("no config.json in /x"), "r.yaml:1:34: no config.json in /x"),
    ],
)
def test_a_model_that_cannot_be_opened_is_told_with_its_place(error: LayercutError, message: str, model: Checkpoint) -> None:
    def resolve(reference: str) -> Checkpoint:
        if reference == "bad":
            raise error
        return model

    text = "slices: [{layer_range: [0, 4]}, {model: bad, layer_range: [0, 4]}]\nmodel: m"
    with pytest.raises(CheckpointError) as caught:
        build_plan(read(text), resolve=resolve, measure=never)
    assert str(caught.value) == message.replace("1:34", "1:41")


def test_a_refusal_of_the_surgeon_reaches_the_user(tmp_path: Path) -> None:
    config = {"model_type": "diffllama", "num_hidden_layers": 3}
    folder = write_checkpoint(tmp_path / "m", byte_tensors(3), config)
    with pytest.raises(RefusedError, match="lambda_init depends on the layer index"):
        build_plan(read("model: m\nsteps: [{prune: {at: 0}}]"), resolve=lambda _: open_checkpoint(folder), measure=never)
    plan = build_plan(read("model: m\nsteps: [{prune: {at: 2}}]"), resolve=lambda _: open_checkpoint(folder), measure=never)
    assert indices(plan) == [0, 1]


def test_the_same_recipe_gives_the_same_text(planned: Planning) -> None:
    text = "model: m\nsteps: [{prune: {layers: 5}}, {duplicate: {layers: 2}}]"
    assert planned(text, Meter(PLANTED)).to_json() == planned(text, Meter(PLANTED)).to_json()


# Several models


F32 = dict[str, tuple[str, tuple[int, ...], bytes]]


def f32_tensors(name: str, layers: int, head: bool = True) -> F32:
    """Floating-point tensors whose bytes say where they come from."""
    return {key: ("F32", (4, 4), data) for key, (_, _, data) in byte_tensors(layers, name).items() if head or key != "lm_head.weight"}


class Models:
    """Small models in a folder, opened by their name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, name: str, layers: int = 4, head: bool = True, files: Mapping[str, str] | None = None, **config: Any) -> None:
        whole = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 4, "rms_norm_eps": 1e-5, **config}
        write_checkpoint(self.folder / name, f32_tensors(name, layers, head), whole)
        for file, text in (files or {}).items():
            (self.folder / name / file).write_text(text)

    def plan(self, text: str, measure: Any = never) -> Plan:
        return build_plan(read(text), resolve=lambda name: open_checkpoint(self.folder / name), measure=measure)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


def sources(plan: Plan) -> list[tuple[str, int]]:
    return [(layer.model, layer.index) for layer in plan.actions.layers]


def given(plan: Plan, models: Models) -> dict[str, str]:
    """Which model and layer the bytes of every copied tensor come from."""
    found = {}
    for file in plan.actions.files:
        for tensor in file.tensors:
            part = tensor.parts[0] if isinstance(tensor, TensorMade) else tensor
            data = (models.folder / part.model / part.file).read_bytes()[part.begin : part.end]
            found[tensor.name] = data.decode().split(";")[0].rpartition(":")[0]
    return found


TWO = "slices: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [1, 4]}, {model: a, layer_range: [3, 4]}]"


def test_layers_of_two_models_stand_where_the_slices_say(models: Models) -> None:
    models.make("a")
    models.make("b", layers=5)
    plan = models.plan(TWO)
    assert sources(plan) == [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3), ("a", 3)]
    found = given(plan, models)
    assert [found[f"model.layers.{at}.mlp.down_proj.weight"] for at in range(6)] == ["a:0", "a:1", "b:1", "b:2", "b:3", "a:3"]
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == "a"
    assert json.loads(plan.actions.config)["num_hidden_layers"] == 6
    assert (plan.donor, list(plan.sources)) == ("a", ["a", "b"])
    assert [(s.at, s.from_model, s.from_boundary, s.to_model, s.to_boundary) for s in plan.seams] == [
        (2, "a", 2, "b", 1),
        (5, "b", 4, "a", 3),
    ]
    assert [(left.model, left.what.partition(" (")[0]) for left in plan.left_out] == [
        ("a", "layer 2"), ("b", "layer 0"), ("b", "layer 4"), ("b", "model.embed_tokens.weight"), ("b", "model.norm.weight"),
        ("b", "lm_head.weight"), ("b", "config.json"),
    ]  # fmt: skip
    assert Plan.from_json(plan.to_json()) == plan


def test_the_last_slice_gives_norm_and_head(models: Models) -> None:
    models.make("a")
    models.make("b")
    found = given(models.plan("slices: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]"), models)
    assert (found["model.embed_tokens.weight"], found["model.norm.weight"], found["lm_head.weight"]) == ("a", "b", "b")


@pytest.mark.parametrize("best", [(a, b) for a in range(1, 4) for b in range(1, 4)])
def test_a_planted_hand_over_is_found(best: tuple[int, int], models: Models) -> None:
    """From the state of a to that of b at any boundaries: here one is much nearer than the others."""
    models.make("a")
    models.make("b")
    cross = [[0.8] * 5 for _ in range(5)]
    cross[best[0]][best[1]] = 0.05
    own = [[0.0 if i == j else 0.9 for j in range(5)] for i in range(5)]
    depth = best[0] + 4 - best[1]
    meter = Meter({"angular[last]": own, "a b": cross})
    plan = models.plan(f"slices: [{{model: a, layer_range: [0, auto]}}, {{model: b, layer_range: [auto, end]}}]\ndepth: {depth}", meter)
    assert sources(plan) == [("a", index) for index in range(best[0])] + [("b", index) for index in range(best[1], 4)]
    assert plan.choices == (
        Choice(where="slices", metric="angular[last]", chosen=f"slices [0, {best[0]}) + [{best[1]}, 4)", cost=0.05),
    )  # fmt: skip
    assert plan.seams[0].distances == {"angular[last]": Distance(mean=0.05, stderr=0)}
    assert [models for models, _, _ in meter.calls] == [["a", "b"]]


def test_a_way_there_and_back(models: Models) -> None:
    models.make("a")
    models.make("b")
    cross = [[0.8] * 5 for _ in range(5)]
    cross[1][1] = cross[3][4] = 0.05
    own = [[0.0 if i == j else 0.9 for j in range(5)] for i in range(5)]
    slices = ", ".join(
        f"{{model: {m}, layer_range: [{a}, {b}]}}" for m, a, b in (("a", 0, "auto"), ("b", "auto", "auto"), ("a", "auto", "end"))
    )
    plan = models.plan(f"slices: [{slices}]\ndepth: 5", Meter({"angular[last]": own, "a b": cross}))
    assert sources(plan) == [("a", 0), ("b", 1), ("b", 2), ("b", 3), ("a", 3)]
    assert plan.choices[0].cost == 0.1


def test_depth_that_constraints_do_not_allow(models: Models) -> None:
    models.make("a")
    text = "slices: [{model: a, layer_range: [0, auto]}, {model: a, layer_range: [auto, end], overlap: 1}]\ndepth: 8"
    own = [[0.0 if i == j else 0.9 for j in range(5)] for i in range(5)]
    with pytest.raises(RecipeError) as caught:
        models.plan(text, Meter(own))
    assert str(caught.value) == "r.yaml:1:9: depth 8 cannot be reached under the constraints of the slices"


def test_models_that_do_not_fit_are_refused_unless_told_so(models: Models) -> None:
    models.make("a")
    models.make("b", rms_norm_eps=1e-6)
    message = "'a' and 'b' would load together but compute something else: config rms_norm_eps is 1e-05 in one and 1e-06 in the other"
    with pytest.raises(RefusedError) as caught:
        models.plan(TWO)
    assert str(caught.value) == f"r.yaml:1:51: {message}; to stack them all the same, say 'allow: inexact' in the recipe"
    plan = models.plan(f"{TWO}\nallow: inexact")
    assert plan.notes == (message,)
    assert json.loads(plan.actions.config)["rms_norm_eps"] == 1e-5


FILES = {name: name for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md")}


def companions(plan: Plan) -> dict[str, str]:
    return {companion.name: companion.model for companion in plan.actions.companions}


def test_config_and_companions_come_from_the_base_model(models: Models) -> None:
    models.make("a", files={"generation_config.json": "a"})
    models.make("b", files=FILES)
    models.make(
        "base", layers=6, files={"tokenizer.json": "tokenizer.json", "special_tokens_map.json": "x"}, extra_key="of base", vocab_size=4
    )
    text = f"{TWO}\nallow: inexact\nbase_model: base"
    plan = models.plan(text)
    assert plan.donor == "base"
    assert companions(plan) == {"tokenizer.json": "base", "special_tokens_map.json": "base"}
    config = json.loads(plan.actions.config)
    assert (config["extra_key"], config["num_hidden_layers"]) == ("of base", 6)
    assert set(given(plan, models).values()) >= {"a", "a:0", "b:1"}
    assert not any("base" in origin for origin in given(plan, models).values())
    reasons = {(left.model, left.what): left.reason for left in plan.left_out}
    assert reasons["base", "all weights (15 tensors)"] == "no layer of this model is in the stack"
    assert reasons["a", "config.json"] == reasons["b", "config.json"] == "it comes from 'base'"
    assert reasons["a", "generation_config.json"] == reasons["b", "tokenizer.json"] == "such files come from 'base'"
    assert list(plan.sources) == ["a", "b", "base"]


def test_a_base_model_changes_nothing_but_config_and_companions_of_one_model(models: Models) -> None:
    models.make("a")
    models.make("base", files={"tokenizer.json": "{}"}, tie_word_embeddings=True, head=False)
    plan = models.plan("model: a\nbase_model: base")
    assert [(edit.key, edit.before, edit.after) for edit in plan.edits] == [("tie_word_embeddings", True, False)]
    assert set(given(plan, models).values()) == {"a", *(f"a:{index}" for index in range(4))}
    assert plan.seams == ()


def test_tokenizer_files_travel_together(models: Models) -> None:
    models.make("a", files=FILES)
    models.make("t", files={"tokenizer.json": "tokenizer.json", "tokenizer.model": "m", "generation_config.json": "t", "merges.txt": "x"})
    plan = models.plan("model: a\ntokenizer_source: t")
    assert companions(plan) == {
        "README.md": "a", "generation_config.json": "a", "merges.txt": "t", "tokenizer.json": "t", "tokenizer.model": "t",
    }  # fmt: skip
    reasons = {(left.model, left.what): left.reason for left in plan.left_out}
    assert reasons["a", "tokenizer_config.json"] == "such files come from 't'"
    assert reasons["t", "generation_config.json"] == "such files come from 'a'"
    assert reasons["t", "all weights (11 tensors)"] == "no layer of this model is in the stack"
    for source in ("base", "union"):
        assert companions(models.plan(f"model: a\ntokenizer_source: {source}"))["tokenizer.json"] == "a"


def test_every_file_of_every_source_is_carried_or_listed(models: Models) -> None:
    models.make("a", files=FILES)
    models.make("b", files={**FILES, "training_args.bin": "x", "chat_template.jinja": "old"})
    plan = models.plan(f"{TWO}\ntokenizer_source: b\nchat_template: '{{{{ messages }}}}'")
    assert plan.actions.texts == {"chat_template.jinja": "{{ messages }}"}
    listed = {(left.model, left.what) for left in plan.left_out}
    for alias in "ab":
        for path in (models.folder / alias).iterdir():
            carried = (
                companions(plan).get(path.name) == alias or path.suffix == ".safetensors" or (path.name == "config.json" and alias == "a")
            )
            assert carried != ((alias, path.name) in listed), path
    reasons = {(left.model, left.what): left.reason for left in plan.left_out}
    assert reasons["b", "chat_template.jinja"] == "the recipe writes its own"


def test_a_model_of_which_no_layer_is_left_gives_nothing(models: Models) -> None:
    models.make("a", files={"tokenizer.json": "{}"})
    models.make("b", files={"tokenizer.json": "{}", "merges.txt": "b"})
    models.make("t", files={"tokenizer.json": "{}", "merges.txt": "t"})
    plan = models.plan(f"{TWO}\nsteps: [{{keep: {{at: 2-4}}}}]")
    assert (plan.donor, list(plan.sources)) == ("b", ["b"])
    assert companions(plan) == {"tokenizer.json": "b", "merges.txt": "b"}
    assert set(given(plan, models).values()) == {"b", "b:1", "b:2", "b:3"}
    plan = models.plan(f"{TWO}\ntokenizer_source: t\nsteps: [{{keep: {{at: 2-4}}}}]")
    assert companions(plan) == {"tokenizer.json": "t", "merges.txt": "t"}


# Dtypes and factors


@pytest.mark.parametrize(
    ("config", "recipe", "edits"),
    [
        ({}, "dtype: bfloat16", [("torch_dtype", None, "bfloat16")]),
        ({"torch_dtype": "float32"}, "dtype: bfloat16", [("torch_dtype", "float32", "bfloat16")]),
        ({"dtype": "float32"}, "dtype: float32\nout_dtype: float16", [("dtype", "float32", "float16")]),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "out_dtype: bfloat16", [("dtype", "float32", "bfloat16")]),
        ({"torch_dtype": "bfloat16"}, "dtype: bfloat16", []),
        ({"torch_dtype": "float32"}, "", []),
    ],
)
def test_the_config_says_the_dtype_of_the_recipe(config: dict[str, str], recipe: str, edits: list[Any], models: Models) -> None:
    models.make("a", **config)
    plan = models.plan(f"model: a\n{recipe}")
    assert [(edit.key, edit.before, edit.after) for edit in plan.edits] == edits
    after = json.loads(plan.actions.config)
    assert all(after[key] == value for key, _, value in edits)
    dtypes = {tensor.dtype for file in plan.actions.files for tensor in file.tensors}
    assert dtypes == {{"bfloat16": "BF16", "float16": "F16"}.get(recipe.rpartition(" ")[2], "F32")}


def test_a_quantised_model_is_not_cast(models: Models) -> None:
    models.make("a", quantization_config={"quant_method": "fp8"})
    with pytest.raises(RefusedError) as caught:
        models.plan("model: a\ndtype: bfloat16")
    assert str(caught.value) == f"{models.folder / 'a'}: a quantised checkpoint cannot be cast; leave out dtype"


def test_factors_reach_layers_and_ends(models: Models) -> None:
    models.make("a")
    models.make("b")
    plan = models.plan(
        "slices: [{model: a, layer_range: [0, 2], parameters: {scale: [2, 3]}}, {model: b, layer_range: [2, 4]}]\n"
        "parameters: {scale: [{filter: o_proj, value: 1}, {filter: down_proj, value: 0}, {value: 5}]}"
    )
    found = {}
    for file in plan.actions.files:
        for tensor in file.tensors:
            found[tensor.name] = (tensor.factors if tensor.parts else 0) if isinstance(tensor, TensorMade) else "copy"
    layers = {name: by for name, by in found.items() if ".layers." in name}
    assert {name.removeprefix("model.layers."): by for name, by in layers.items()} == {
        "0.self_attn.o_proj.weight": (2.0,), "0.mlp.down_proj.weight": (2.0,), "1.self_attn.o_proj.weight": (3.0,),
        "1.mlp.down_proj.weight": (3.0,), "2.self_attn.o_proj.weight": "copy", "2.mlp.down_proj.weight": 0,
        "3.self_attn.o_proj.weight": "copy", "3.mlp.down_proj.weight": 0,
    }  # fmt: skip
    assert {name: by for name, by in found.items() if ".layers." not in name} == {
        "model.embed_tokens.weight": (2.0,), "model.norm.weight": (5.0,), "lm_head.weight": (5.0,),
    }  # fmt: skip


def test_arithmetic_changes_the_digest(models: Models) -> None:
    models.make("a")
    scale = "steps: [{{scale: {{at: {}, tensors: '{}', by: {}}}}}]"
    texts = ["", "dtype: float16", "dtype: bfloat16", "dtype: float64\nout_dtype: float16", "parameters: {scale: 2}"]
    texts += [scale.format(*values) for values in ((1, "*", 2), (2, "*", 2), (1, "*", 3), (1, "*o_proj*", 2))]
    texts += ["steps: [{merge: {at: [1, 2]}}]", "steps: [{merge: {at: [1, 2], weights: [1, 2]}}]", "steps: [{expand: {at: 1}}]"]
    digests = [models.plan(f"model: a\n{text}").digest for text in texts]
    assert len(set(digests)) == len(texts)
    assert models.plan("model: a\nparameters: {scale: 1.0}").digest == digests[0]
