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
from layercut.plan import Choice, Distance, LeftOut, Measurement, Plan, Seam, Table
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
        for metric in metrics:
            mean = tuple(tuple(row) for row in self.matrices[metric.label])
            stderr = tuple(tuple(self.stderr for _ in row) for row in mean)
            tables += [Table(metric=metric.label, a=name, b=name, mean=mean, stderr=stderr) for name in members]
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
    assert [left.what.partition(" (")[0] for left in plan.left_out] == [f"layer {index}" for index in range(2, 11)]
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
