from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
from conftest import failure, write_checkpoint

from layercut.architecture import Member, find_stack
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.choices import Evidence, StepSite
from layercut.errors import CalibrationError, CheckpointError, LayercutError, RecipeError, RefusedError
from layercut.metrics import Angular, Cosine
from layercut.operations import Wish
from layercut.plan import Candidate, Choice, Measurement, Plan, Table, TensorMade, Trial
from layercut.planner import build_plan
from layercut.recipe import Recipe, parse_recipe
from layercut.stack import Block, Fold, LayerRef, Stack
from layercut.trials import Loss, Misses
from layercut.yamltext import YamlText

DEPTH = 6
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


class Meter:
    """A measuring function with one matrix for every metric and every pair of models; counts its calls."""

    def __init__(self, matrix: Sequence[Sequence[float]], stderr: float = 0.0) -> None:
        self.rows = tuple(tuple(row) for row in matrix)
        self.stderr = tuple(tuple(stderr for _ in row) for row in matrix)
        self.calls = 0

    def __call__(self, members: Mapping[str, Member], metrics: Sequence[Any], calibration: Any) -> Measurement:
        self.calls += 1
        names = list(members)
        pairs = [(a, b) for at, a in enumerate(names) for b in names[at:]]
        tables = [Table(metric=metric.label, a=a, b=b, mean=self.rows, stderr=self.stderr) for metric in metrics for a, b in pairs]
        return Measurement(tables=tuple(tables), samples=1, tokens=1, details={})


def never(*_: Any) -> Measurement:
    raise AssertionError("nothing is to be measured")


def distances(seed: int = 3, depth: int = DEPTH) -> list[list[float]]:
    dice = random.Random(seed)
    matrix = [[0.0] * (depth + 1) for _ in range(depth + 1)]
    for i in range(depth + 1):
        for j in range(i):
            matrix[i][j] = matrix[j][i] = dice.choice([0.1, 0.2, 0.3, 0.4, 0.5])
    return matrix


def f32(*shape: int) -> tuple[str, tuple[int, ...], bytes]:
    return "F32", shape, bytes(4 * prod(shape))


def staircase(tied: bool = False, embedding: int = 16) -> Tensors:
    """Six layers of different size: layer i has 2 (i + 1) + 2 elements."""
    tensors: Tensors = {"model.embed_tokens.weight": f32(embedding, 2)}
    for layer in range(DEPTH):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] = f32(layer + 1, 2)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = f32(2)
    tensors["model.norm.weight"] = f32(2)
    return tensors if tied else {**tensors, "lm_head.weight": f32(embedding, 2)}


def checkpoint(folder: Path, tensors: Tensors, **config: Any) -> Checkpoint:
    return open_checkpoint(write_checkpoint(folder, tensors, {"model_type": "llama", "num_hidden_layers": DEPTH, **config}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("choices") / "m", staircase())


def plan_of(text: str, measure: Any, **models: Checkpoint) -> Plan:
    return build_plan(parse_recipe(YamlText(text, "r.yaml")), resolve=models.__getitem__, measure=measure)


def pruned(model: Checkpoint, prune: str, measure: Any = None, more: str = "") -> Plan:
    return plan_of(f"model: m\n{more}steps:\n- prune: {{{prune}}}", measure or Meter(distances()), m=model)


def parameters(plan: Plan) -> int:
    return sum(prod(tensor.shape) for file in plan.actions.files for tensor in file.tensors)


def said(*arguments: Any, **more: Any) -> str:
    return failure(RecipeError, lambda: pruned(*arguments, **more))


# The outputs of a layer

FAMILIES = {
    "llama": (
        ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"),
        (1, 3),
    ),
    "qwen2 with biases": (("self_attn.q_proj.bias", "self_attn.o_proj.bias", "mlp.gate_proj.weight", "mlp.down_proj.bias"), (1, 3)),
    "gpt2": (
        (
            "ln_1.weight",
            "attn.c_attn.weight",
            "attn.c_proj.weight",
            "attn.c_proj.bias",
            "mlp.c_fc.bias",
            "mlp.c_proj.weight",
            "mlp.c_proj.bias",
        ),
        (2, 3, 5, 6),
    ),
    "mixtral": (
        (
            "self_attn.o_proj.weight",
            "block_sparse_moe.gate.weight",
            "block_sparse_moe.experts.0.w1.weight",
            "block_sparse_moe.experts.0.w2.weight",
            "block_sparse_moe.experts.11.w2.weight",
            "block_sparse_moe.experts.11.w3.weight",
        ),
        (0, 3, 4),
    ),
    "fused experts": (("self_attn.o_proj.weight", "mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"), (0, 3)),
    "deepseek": (
        (
            "self_attn.kv_b_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.experts.7.down_proj.weight",
            "mlp.shared_experts.down_proj.weight",
            "mlp.shared_experts.up_proj.weight",
        ),
        (1, 2, 3),
    ),
    "falcon": (
        ("self_attention.query_key_value.weight", "self_attention.dense.weight", "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
        (1, 3),
    ),
    "gpt neox": (("attention.query_key_value.bias", "attention.dense.bias", "mlp.dense_h_to_4h.bias", "mlp.dense_4h_to_h.bias"), (1, 3)),
    "bloom": (
        ("self_attention.dense.weight", "self_attention.dense.bias", "mlp.dense_4h_to_h.bias", "post_attention_layernorm.bias"),
        (0, 1, 2),
    ),
    "phi": (
        ("self_attn.q_proj.bias", "self_attn.dense.weight", "self_attn.dense.bias", "mlp.fc1.weight", "mlp.fc2.weight", "mlp.fc2.bias"),
        (1, 2, 4, 5),
    ),
    "opt": (
        ("self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc1.weight", "fc2.weight", "fc2.bias", "final_layer_norm.bias"),
        (0, 1, 3, 4),
    ),
    "gpt j": (("attn.out_proj.weight", "mlp.fc_in.weight", "mlp.fc_out.weight", "mlp.fc_out.bias"), (0, 2, 3)),
    "mpt": (("attn.Wqkv.weight", "attn.out_proj.weight", "ffn.up_proj.weight", "ffn.down_proj.weight"), (1, 3)),
    "internlm2": (
        ("attention.wqkv.weight", "attention.wo.weight", "feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight"),
        (1, 3),
    ),
    "starcoder2": (("self_attn.o_proj.bias", "mlp.c_fc.weight", "mlp.c_proj.weight"), (0, 2)),
    "jamba": (
        ("mamba.in_proj.weight", "mamba.out_proj.weight", "feed_forward.experts.3.down_proj.weight", "feed_forward.router.weight"),
        (1, 2),
    ),
    "nobody knows": (("time_mix.value.weight", "channel_mix.key.weight", "dense.weight", "w22.weight", "xfc2.weight"), ()),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_to_the_residual_stream(family: str, tmp_path: Path) -> None:
    names, wanted = FAMILIES[family]
    tensors = {f"h.{layer}.{name}": f32(1) for layer in range(2) for name in names}
    source = open_checkpoint(write_checkpoint(tmp_path / "m", tensors, {"num_hidden_layers": 2}))
    site = StepSite(Evidence(Recipe(model="m"), {"m": Member(source, find_stack(source))}, never), ("steps", 0, "expand"))
    layer = LayerRef(model="m", index=1)
    assert site.tensors(layer) == tuple(f"h.1.{name}" for name in names)
    assert site.outputs(layer) == tuple(f"h.1.{names[at]}" for at in wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon", "phi"])
def test_expand_zeroes_exactly_the_outputs(family: str, tmp_path: Path) -> None:
    names, wanted = FAMILIES[family]
    tensors = {f"h.{layer}.{name}": f32(1) for layer in range(4) for name in names}
    source = open_checkpoint(write_checkpoint(tmp_path / "m", tensors, {"num_hidden_layers": 4}))
    plan = plan_of("model: m\nsteps: [{expand: {every: 2}}]", never, m=source)
    made = [tensor.name for file in plan.actions.files for tensor in file.tensors if isinstance(tensor, TensorMade)]
    assert made == [f"h.{layer}.{names[at]}" for layer in (2, 5) for at in wanted]
    assert all(tensor.parts == () for file in plan.actions.files for tensor in file.tensors if isinstance(tensor, TensorMade))
    assert plan.seams == ()


# Counts


@pytest.mark.parametrize(("share", "count"), [("17%", 1), ("34%", 2), ("50%", 3), ("66.6%", 3), ("83.4%", 5)])
def test_percentages_are_rounded_down(share: str, count: int, model: Checkpoint) -> None:
    assert len(pruned(model, f"layers: {share}").actions.layers) == DEPTH - count


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("layers: 6", "r.yaml:3:19: cannot remove 6 of 6 layers; at most 5"),
        ("layers: 5, protect: [0, -1]", "r.yaml:3:19: cannot remove 5 of 6 layers, 2 of them protected; at most 4"),
        ("layers: 1, protect: 0-5", "r.yaml:3:19: cannot remove 1 of 6 layers, 6 of them protected; at most 0"),
        ("layers: 4, protect: 3", "r.yaml:3:19: cannot remove 4 of 6 layers, 1 of them protected; "
         "strategy blocks takes layers that are not consecutive"),
        ("layers: 3, strategy: deepest, protect: 2", "r.yaml:3:19: cannot remove 3 of 6 layers, 1 of them protected; "
         "strategy blocks takes layers that are not consecutive"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be(prune: str, message: str, model: Checkpoint) -> None:
    assert said(model, prune) == message


@pytest.mark.parametrize("prune", ["layers: 6", "layers: 5, protect: [0, -1]", "layers: 10%"])
def test_a_number_that_cannot_be_is_told_before_anything_is_measured(prune: str, model: Checkpoint) -> None:
    assert said(model, prune, never).startswith("r.yaml:3:19: ")


# Budgets


@pytest.mark.parametrize("strategy", ["block", "blocks", "rank", "deepest"])
@pytest.mark.parametrize("protect", ["", ", protect: [0, -1]"])
@pytest.mark.parametrize("more", ["", "dtype: bfloat16\n"])
def test_size_and_params_remove_the_fewest_layers_that_fit(strategy: str, protect: str, more: str, model: Checkpoint) -> None:
    """Against plans with each smaller number of layers, weighed by what they would write."""
    meter = Meter(distances())
    whole = pruned(model, "at: 0", never, more)
    most = 4 if protect else 5
    ladder = [pruned(model, f"layers: {count}, strategy: {strategy}{protect}", meter, more) for count in range(1, most + 1)]
    for weigh, key, unit in ((lambda plan: plan.weight_bytes, "size", "B"), (parameters, "params", "")):
        weights = [weigh(plan) for plan in ladder]
        assert weigh(whole) > min(weights)
        for limit in sorted({*weights, *(weight + 1 for weight in weights), *(weight - 1 for weight in weights)}):
            fits = [at for at, weight in enumerate(weights) if weight <= limit]
            if not fits:
                continue
            plan = pruned(model, f"{key}: {limit}{unit}, strategy: {strategy}{protect}", meter, more)
            assert plan.actions.layers == ladder[fits[0]].actions.layers, (key, limit)
            assert plan.choices[-1].chosen == ladder[fits[0]].choices[-1].chosen


@pytest.mark.parametrize("strategy", ["block", "blocks"])
def test_max_distance_removes_the_most_layers_within_it(strategy: str, model: Checkpoint) -> None:
    meter = Meter(distances())
    ladder = {count: pruned(model, f"layers: {count}, strategy: {strategy}", meter) for count in range(1, DEPTH)}
    costs = {count: plan.choices[0].cost for count, plan in ladder.items()}
    for limit in sorted({*costs.values(), *(cost * 1.01 for cost in costs.values())}):
        most = max(count for count, cost in costs.items() if cost <= limit)
        plan = pruned(model, f"max_distance: {limit}, strategy: {strategy}", meter)
        assert len(plan.actions.layers) == DEPTH - most, limit
        assert plan.choices[0].cost <= limit


def test_a_model_that_fits_already_is_left_alone_and_not_measured(model: Checkpoint) -> None:
    plan = pruned(model, "params: 1K", never)
    assert len(plan.actions.layers) == DEPTH
    assert plan.notes == ("steps.0.prune: the model has 120 parameters: nothing is removed",)
    assert pruned(model, "size: 480B", never).notes == ("steps.0.prune: the model has 480 bytes: nothing is removed",)
    assert len(pruned(model, "size: 479B").actions.layers) == DEPTH - 1


def test_tied_embeddings_weigh_once(tmp_path: Path) -> None:
    tied = checkpoint(tmp_path / "m", staircase(tied=True), tie_word_embeddings=True)
    assert pruned(tied, "params: 1K", never).notes == ("steps.0.prune: the model has 88 parameters: nothing is removed",)
    plan = pruned(tied, "params: 84")
    assert len(plan.actions.layers) == DEPTH - 1
    assert parameters(plan) <= 84


@pytest.mark.parametrize(("first", "last"), [(True, True), (True, False), (False, True), (False, False)])
def test_several_models_weigh_what_is_written(first: bool, last: bool, tmp_path: Path) -> None:
    """Embeddings of one, head of the other: counted as the plan lays them out."""
    models = {
        name: checkpoint(tmp_path / name, staircase(tied=tied), tie_word_embeddings=tied) for name, tied in (("a", first), ("b", last))
    }
    start = "slices: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [3, 6]}]\nsteps:\n- prune: "
    meter = Meter(distances())
    whole = plan_of(start + "{at: 0}", never, **models)
    assert pruned_note(start + f"{{params: {parameters(whole) + 4}}}", models) == parameters(whole) + 4
    ladder = [plan_of(start + f"{{layers: {count}}}", meter, **models) for count in range(1, DEPTH)]
    for limit in {parameters(plan) for plan in ladder}:
        fits = next(plan for plan in ladder if parameters(plan) <= limit)
        assert plan_of(start + f"{{params: {limit}}}", meter, **models).actions == fits.actions


def pruned_note(text: str, models: Mapping[str, Checkpoint]) -> int:
    notes = [note for note in plan_of(text, never, **models).notes if "nothing is removed" in note]
    assert len(notes) == 1
    return int(notes[0].split()[4])


def test_an_unchanged_stack_weighs_its_prediction_layer(tmp_path: Path) -> None:
    """It is left out once a layer goes: the first layer that is removed takes it along."""
    tensors = {**staircase(), f"model.layers.{DEPTH}.eh_proj.weight": f32(50, 2)}
    source = checkpoint(tmp_path / "m", tensors, num_nextn_predict_layers=1)
    plan = pruned(source, "params: 150")
    assert len(plan.actions.layers) == DEPTH - 1
    assert parameters(plan) <= 120


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("params: 10", "cannot come down to 10 parameters: 80 are left when 5 of 6 layers are removed"),
        ("size: 100B", "cannot come down to 100 bytes: 320 are left when 5 of 6 layers are removed"),
        ("params: 1, protect: [4, 5]", "cannot come down to 1 parameters: 92 are left when 4 of 6 layers are removed, 2 of them protected"),
        ("size: 1B, protect: 0-5", "cannot come down to 1 bytes: 480 are left when 0 of 6 layers are removed, 6 of them protected"),
        ("max_distance: 0.01", "no layer of 6 can be removed within a distance of 0.01; the least is 0.1"),
        ("max_distance: 0.01, protect: 0-5", "no layer of 6, 6 of them protected can be removed within a distance of 0.01"),
    ],
)
def test_budgets_out_of_reach(prune: str, message: str, model: Checkpoint) -> None:
    matrix = [[0.0 if i == j else (max(i, j) if max(i, j) < 6 else 5) / 10 for j in range(7)] for i in range(7)]
    assert said(model, prune, Meter(matrix)) == f"r.yaml:3:{18 if 'max' not in prune else 25}: {message}".replace(
        ":18:", f":{11 + prune.index(':') + 2}:"
    )


# The evidence


def test_the_deepest_block_asks_for_healing(model: Checkpoint) -> None:
    plan = pruned(model, "layers: 2, strategy: deepest")
    assert [layer.index for layer in plan.actions.layers] == [0, 1, 2, 5]
    assert plan.notes == ("steps.0.prune: cutting the deepest layers needs healing (training after the cut); distance did not decide",)
    assert plan.choices[0].candidates == ()


def test_what_is_kept_of_a_choice(model: Checkpoint) -> None:
    matrix = distances()
    plan = pruned(model, "layers: 4, metric: cosine", Meter(matrix, stderr=0.5))
    best = min(range(3), key=lambda start: (matrix[start][start + 4], start))
    candidates = tuple(Candidate(start=start, stop=start + 4, cost=matrix[start][start + 4], stderr=0.5) for start in range(3))
    assert plan.choices == (
        Choice(
            where="steps.0.prune",
            metric="cosine[all]",
            chosen=f"remove layers [{best}, {best + 4})",
            cost=matrix[best][best + 4],
            candidates=candidates,
        ),
    )
    several = pruned(model, "layers: 3, strategy: rank", Meter(matrix)).choices[0]
    assert several.candidates == ()
    assert several.chosen.startswith("remove layers [")
    budget = pruned(model, "params: 100", Meter(matrix)).choices[0]
    assert len(budget.candidates) == DEPTH - (budget.candidates[0].stop - budget.candidates[0].start) + 1


def test_measuring_happens_once_for_all_metrics(model: Checkpoint) -> None:
    meter = Meter(distances())
    evidence = Evidence(
        Recipe.model_validate({"model": "m", "metrics": ["cosine", "angular"]}), {"m": Member(model, find_stack(model))}, meter
    )
    assert evidence.measurement is None
    assert evidence.prices(None).metric == "cosine[all]"
    assert evidence.prices(Angular()).metric == "angular[last]"
    assert evidence.prices(Cosine()).metric == "cosine[all]"
    assert meter.calls == 1


def test_a_choice_of_blocks_can_be_asked_for_directly(model: Checkpoint) -> None:
    stack: Stack = tuple(LayerRef(model="m", index=index) for index in range(DEPTH))
    evidence = Evidence(Recipe(model="m"), {"m": Member(model, find_stack(model))}, Meter(distances()))
    wish = Wish("repeat", stack, lambda blocks: stack, {"layers": 6}, "block", None, frozenset())
    assert StepSite(evidence, ("steps", 3, "duplicate")).choose(wish) == (Block(0, 6),)
    assert evidence.choices[0].where == "steps.3.duplicate"


# Losses


class Running:
    """Losses by which layers are missing, on either text; counts what is asked."""

    def __init__(self, *costs: float, held_out: Sequence[float] | None = None) -> None:
        self.costs = {"calibration": costs, "held out": costs if held_out is None else held_out}
        self.opened, self.asked, self.released = 0, 0, 0
        self.shares: list[float] = []

    def __call__(self, members: Mapping[str, Member], calibration: Any) -> Running:
        self.opened += 1
        return self

    def losses(self, stacks: Sequence[Stack], part: str = "calibration", share: float = 1.0) -> list[Loss]:
        self.asked += len(stacks)
        self.shares.append(share)
        missing = [{*range(DEPTH)} - {layer.index for layer in stack} for stack in stacks]
        return [Loss((4 + sum(self.costs[part][at] for at in sorted(gone)),), (1,)) for gone in missing]

    def check_foldable(self, stack: Stack) -> None:
        pass

    def fit(self, given: Stack, wanted: Stack, ridge: float) -> Fold:
        """A map that changes no loss."""
        return Fold(sha256="0" * 64, size=2, module="o_proj", tokens=1, ridge=ridge, explained=0)

    def misses(self, given: Stack, wanted: Stack, fold: Fold) -> Misses:
        """It leads to where it should; what that makes of the loss is another matter."""
        return Misses(Loss((0.5,), (1,)), Loss((0.25,), (1,)))

    def about(self) -> dict[str, Any]:
        return {"unit": "nats a token"}

    def release(self) -> None:
        self.released += 1


def searched(model: Checkpoint, prune: str, run: Any, measure: Any = never, more: str = "") -> Plan:
    recipe = parse_recipe(YamlText(f"model: m\n{more}steps:\n- prune: {{{prune}}}\n", "r.yaml"))
    return build_plan(recipe, resolve=lambda _: model, measure=measure, run=run)


def complaint(*arguments: Any, **more: Any) -> str:
    return failure(LayercutError, lambda: searched(*arguments, **more))


def kept(plan: Plan) -> list[int]:
    return [layer.index for layer in plan.actions.layers]


def test_a_choice_by_loss_measures_no_distance(model: Checkpoint) -> None:
    run = Running(0.5, 0.1, 0.3, 0.2, 0.4, 0.6)
    plan = searched(model, "layers: 2, strategy: loss", run)
    assert kept(plan) == [0, 2, 4, 5] and plan.measurement is None and run.opened == 1
    (choice,) = plan.choices
    assert (choice.metric, choice.chosen, choice.candidates) == ("loss", "remove layers [1, 2) + [3, 4)", ())
    assert choice.cost == pytest.approx(4.3) and choice.run_on == {"unit": "nats a token"}
    assert [trial.name for trial in choice.trials] == ["as it is", *(f"layer {at}" for at in range(6))]
    trial = choice.trials[2]
    assert trial.increase == pytest.approx(0.025)
    assert trial == Trial(name="layer 1", chosen="[1, 2)", loss=4.1, increase=trial.increase, stderr=0.0, text="calibration")
    assert all(seam.distances == {} for seam in plan.seams)


def test_protected_layers_stay(model: Checkpoint) -> None:
    for strategy in ("loss", "greedy", "evolve"):
        run = Running(0.0, 0.1, 0.3, 0.2, 0.4, 0.0)
        assert kept(searched(model, f"layers: 2, strategy: {strategy}, protect: [0, -1]", run)) == [0, 2, 4, 5]


def test_as_few_layers_as_bring_the_size_down(model: Checkpoint) -> None:
    """Layer i has 2 i + 4 parameters, all have 120; numbers that cannot do are not tried."""
    run = Running(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    plan = searched(model, f"params: {120 - 26}, strategy: greedy", run)
    assert parameters(plan) <= 120 - 26 and kept(plan) == [4, 5]
    assert run.asked == 2 + (6 + 5) + (6 + 5 + 4) + (6 + 5 + 4 + 3), "one layer is never enough"
    run = Running(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert kept(searched(model, "params: 120, strategy: loss", run)) == [0, 1, 2, 3, 4, 5] and run.opened == 0


def test_as_many_layers_as_are_near_enough_by_a_search(model: Checkpoint) -> None:
    plan = searched(model, "max_distance: 0.9, strategy: loss", Running(0.5, 0.1, 0.3, 0.2, 0.4, 0.6), Meter(distances()))
    assert plan.measurement is not None and plan.choices[0].metric == "loss"


def test_best_compares_on_held_out_text_and_takes_the_best(model: Checkpoint) -> None:
    run = Running(0.5, 0.1, 0.3, 0.2, 0.4, 0.6, held_out=(0.5, 0.4, 0.3, 0.4, 0.1, 0.2))
    plan = searched(model, "layers: 1, strategy: best, candidates: [loss, deepest]", run, Meter(distances()))
    assert kept(plan) == [0, 1, 2, 3, 5]
    assert [(trial.name, trial.chosen, trial.text) for trial in plan.choices[0].trials] == [
        ("as it is", "", "held out"),
        ("loss", "[1, 2)", "held out"),
        ("deepest", "[4, 5)", "held out"),
    ]
    assert plan.choices[0].cost == 4.1


def test_the_most_layers_within_an_increase(model: Checkpoint) -> None:
    """The curve on held-out text is 5 %, 2.5 %, 10 %, 15 %, 25 %: two layers, though one is too many."""
    run = Running(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, held_out=(0.2, -0.1, 0.3, 0.2, 0.4, 0.5))
    plan = searched(model, "max_loss_increase: 3%, strategy: greedy", run)
    assert kept(plan) == [2, 3, 4, 5]
    assert [round(trial.increase, 6) for trial in plan.choices[0].trials] == [0.0, 0.05, 0.025, 0.1, 0.15, 0.25]
    assert kept(searched(model, "max_loss_increase: 10%, strategy: loss", run)) == [3, 4, 5]
    assert kept(searched(model, "max_loss_increase: 1000%, strategy: blocks", run, Meter(distances()))) != []


def test_an_increase_that_no_layer_keeps(model: Checkpoint) -> None:
    run = Running(0.4, 0.8, 0.4, 0.4, 0.4, 0.4)
    message = "r.yaml:3:30: no layer of 6 can be removed within a loss increase of 5%; the least is 10.00%, of 1 layer"
    assert complaint(model, "max_loss_increase: 5%, strategy: loss", run) == message
    message = complaint(model, "max_loss_increase: 5%, strategy: loss, protect: '0-5'", run)
    assert message == "r.yaml:3:30: no layer of 6, 6 of them protected can be removed within a loss increase of 5%"


@pytest.mark.parametrize("value", ["5", "0.05", "true", "-5%", "five"])
def test_increases_that_are_none(model: Checkpoint, value: str) -> None:
    assert "expected a percentage such as 5%" in complaint(model, f"max_loss_increase: {value}", Running())


def test_candidates_go_with_best(model: Checkpoint) -> None:
    assert "'candidates' goes with strategy best" in complaint(model, "layers: 1, strategy: loss, candidates: [block]", Running())
    assert "candidates" in complaint(model, "layers: 1, strategy: best, candidates: [best]", Running())
    assert "expected at least one entry" in complaint(model, "layers: 1, strategy: best, candidates: []", Running())


def test_too_many_layers_for_a_search(model: Checkpoint) -> None:
    run = Running()
    assert complaint(model, "layers: 6, strategy: greedy", run) == "r.yaml:3:19: cannot remove 6 of 6 layers; at most 5"
    assert run.opened == 0


def test_layers_are_repeated_by_loss(model: Checkpoint) -> None:
    """The fake sees what is missing only: nothing is, so the first layers are as good as any."""
    recipe = parse_recipe(YamlText("model: m\nsteps:\n- duplicate: {layers: 2, strategy: loss}\n", "r.yaml"))
    plan = build_plan(recipe, resolve=lambda _: model, measure=never, run=Running(*[1.0] * 6))
    assert kept(plan) == [0, 0, 1, 1, 2, 3, 4, 5] and plan.choices[0].chosen == "repeat layers [0, 1) + [1, 2)"


def test_a_distance_after_a_loss_gives_memory_back_first(model: Checkpoint) -> None:
    run = Running(0.5, 0.1, 0.3, 0.2, 0.4, 0.6)
    plan = searched(model, "layers: 1, strategy: loss}\n- prune: {layers: 1, strategy: block", run, Meter(distances()))
    assert run.released == 1 and [choice.metric for choice in plan.choices] == ["loss", "angular[last]"]


def test_losses_settle_nothing(model: Checkpoint) -> None:
    text = "calibration: {source: builtin, samples: auto}\n"
    for prune in ("layers: 1, strategy: loss", "layers: 1, strategy: best", "max_loss_increase: 5%"):
        message = complaint(model, prune, Running(), more=text)
        assert message == (
            "r.yaml:2:41: samples: auto cannot tell whether a choice by loss is settled (steps.0.prune); give a number of samples"
        )


def test_ends_that_are_scaled_are_not_run(model: Checkpoint) -> None:
    scaled = "parameters: {scale: [{filter: lm_head, value: 0.5}]}\n"
    message = complaint(model, "layers: 1, strategy: loss", Running(), more=scaled)
    what = "lm_head.weight is outside the layers and scaled: what stacks lose with that is not known (steps.0.prune)"
    assert message == f"r.yaml:2:13: {what}; choose by distance, or scale tensors of layers only"
    of_layers = "parameters: {scale: [{filter: o_proj, value: 0.5}]}\n"
    assert kept(searched(model, "layers: 1, strategy: loss", Running(0.5, 0.1, 0.3, 0.2, 0.4, 0.6), more=of_layers)) == [0, 2, 3, 4, 5]


def test_a_planner_that_cannot_run_anything_says_so(model: Checkpoint) -> None:
    assert complaint(model, "layers: 1, strategy: loss", None) == "nothing is given that stacks could be run with; choose by distance"


# Without a strategy


def planted() -> list[list[float]]:
    """Layers 1 and 4 change the state least, each by itself; no two seams are as cheap as that over layers 2 and 3."""
    matrix = [[0.0 if i == j else 0.5 for j in range(DEPTH + 1)] for i in range(DEPTH + 1)]
    for i, j, value in ((1, 2, 0.05), (4, 5, 0.05), (2, 3, 0.3), (3, 4, 0.3), (2, 4, 0.08)):
        matrix[i][j] = matrix[j][i] = value
    return matrix


def by_rank() -> Running:
    """Held-out text on which layers 1 and 4 are missed least."""
    return Running(*[9.0] * 6, held_out=(9, 0.1, 0.3, 0.3, 0.1, 9))


class Unable(Running):
    """Models that cannot be run."""

    def __init__(self, error: LayercutError) -> None:
        super().__init__()
        self.error = error

    def losses(self, stacks: Sequence[Stack], part: str = "calibration", share: float = 1.0) -> list[Loss]:
        self.asked += 1
        raise self.error


ALONE = "steps.0.prune: chosen by distance alone (strategy block): "


def test_choices_by_distance_are_compared_by_loss(model: Checkpoint) -> None:
    run, measure = by_rank(), Meter(planted())
    plan = searched(model, "layers: 2", run, measure)
    (choice,) = plan.choices
    assert (choice.metric, choice.chosen, choice.cost) == ("loss", "remove layers [1, 2) + [4, 5)", 4.2)
    assert [(trial.name, trial.chosen, trial.text) for trial in choice.trials] == [
        ("as it is", "", "held out"),
        ("block", "[2, 4)", "held out"),
        ("blocks", "[2, 4)", "held out"),
        ("rank", "[1, 2) + [4, 5)", "held out"),
    ]
    assert kept(plan) == [0, 2, 3, 5] and plan.notes == () and measure.calls == 1
    assert {*run.shares} == {0.5}, "half of the text"
    assert [round(seam.distances["angular[last]"].mean, 6) for seam in plan.seams] == [0.05, 0.05]
    near = searched(model, "layers: 2", Running(*[9.0] * 6, held_out=(9, 0.3, 0.1, 0.1, 0.3, 9)), Meter(planted()))
    assert near.choices[0].chosen == "remove layers [2, 4)" and kept(near) == [0, 1, 4, 5]


def test_of_equal_losses_the_block_is_taken(model: Checkpoint) -> None:
    assert kept(searched(model, "layers: 2", Running(*[0.1] * 6), Meter(planted()))) == [0, 1, 4, 5]


def test_candidates_are_chosen_by_the_metric_of_the_step(model: Checkpoint) -> None:
    def measure(members: Any, metrics: Sequence[Any], calibration: Any) -> Measurement:
        found = [Meter(planted() if metric.name == "cosine" else distances())(members, [metric], calibration) for metric in metrics]
        return found[0].model_copy(update={"tables": tuple(table for one in found for table in one.tables)})

    plan = searched(model, "layers: 2, metric: cosine", by_rank(), measure)
    assert [trial.chosen for trial in plan.choices[0].trials] == ["", "[2, 4)", "[2, 4)", "[1, 2) + [4, 5)"]


@pytest.mark.parametrize(
    "error",
    [
        CalibrationError("losses need the models in memory: 9 GB, and 2 GB are left", hint="give more"),
        RefusedError("model 'm' is an encoder-decoder: the loss of predicting a text is not defined for it", where="/home/me/m"),
        CheckpointError("the loss of the stack m[0, 1) is not finite"),
    ],
)
def test_where_no_loss_can_be_had_distance_decides(model: Checkpoint, error: LayercutError) -> None:
    """And the plan says why, without folders of this machine. Who asks for a loss gets the error."""
    run = Unable(error)
    plan = searched(model, "layers: 2", run, Meter(planted()))
    (choice,) = plan.choices
    assert (choice.metric, choice.chosen, choice.trials) == ("angular[last]", "remove layers [2, 4)", ())
    assert len(choice.candidates) == 5
    assert plan.notes == (f"{ALONE}{error.message}",)
    for named in ("strategy: best", "candidates: [block, rank]", "strategy: loss"):
        assert complaint(model, f"layers: 2, {named}", run, Meter(planted())) == str(error)
    with pytest.raises(type(error)):
        searched(model, "max_loss_increase: 5%", run, Meter(planted()))


def test_what_cannot_be_run_is_not_tried_for_every_step(model: Checkpoint) -> None:
    run = Unable(CalibrationError("no room"))
    plan = searched(model, "layers: 1}\n- prune: {layers: 1", run, Meter(planted()))
    assert run.asked == 1
    assert plan.notes == (f"{ALONE}no room", f"{ALONE}no room".replace("s.0", "s.1"))


def test_what_distances_lack_is_no_reason_to_measure_again(model: Checkpoint) -> None:
    measured = []

    def failing(*_: Any) -> Measurement:
        measured.append(1)
        raise CalibrationError("the text is empty")

    assert complaint(model, "layers: 1", by_rank(), failing) == "the text is empty"
    assert measured == [1]


@pytest.mark.parametrize(
    ("prune", "more", "why"),
    [
        ("max_distance: 0.1", "", "max_distance bounds a distance"),
        ("layers: 2", "calibration: {source: builtin, samples: auto}\n", "samples: auto weighs distances"),
        (
            "layers: 2",
            "parameters: {scale: [{filter: lm_head, value: 0.5}]}\n",
            "lm_head.weight is outside the layers and scaled: what stacks lose with that is not known",
        ),
    ],
)
def test_recipes_that_only_a_distance_suits(model: Checkpoint, prune: str, more: str, why: str) -> None:
    run = by_rank()

    def measure(*given: Any, **_: Any) -> Measurement:
        return Meter(planted())(*given)

    plan = searched(model, prune, run, measure, more)
    assert plan.notes == (f"{ALONE}{why}",) and run.opened == 0
    assert plan.choices[0].chosen == "remove layers [2, 4)"


def test_what_is_replaced_is_compared_as_what_is_removed(model: Checkpoint) -> None:
    """And then a map is tried; here it changes no loss, so that it is not taken."""
    recipe = parse_recipe(YamlText("model: m\nsteps:\n- replace: {layers: 2, with: linear}\n", "r.yaml"))
    plan = build_plan(recipe, resolve=lambda _: model, measure=Meter(planted()), run=by_rank())
    chosen, healed = plan.choices
    assert [trial.name for trial in chosen.trials] == ["as it is", "block", "blocks", "rank"]
    assert (chosen.where, chosen.chosen) == ("steps.0.replace", "replace layers [1, 2) + [4, 5)")
    assert (healed.where, healed.chosen) == ("steps.0.replace.heal", "no map helps: the cut alone")
    assert [trial.name for trial in healed.trials] == ["as it is", "the cut", "map for [1, 2), not taken", "map for [4, 5), not taken"]
    assert [(one.block, one.cut.mean, one.healed.mean, one.taken) for one in healed.maps] == [
        ("[1, 2)", 0.5, 0.25, False),
        ("[4, 5)", 0.5, 0.25, False),
    ]
    words = "is not taken: held-out text loses 4.2000 ± 0.0000 nats a token with it and 4.2000 ± 0.0000 without it"
    assert plan.notes[-2:] == tuple(
        f"steps.0.replace.heal: the map for {block} {words}, a difference of +0.0000 ± 0.0000" for block in ("[1, 2)", "[4, 5)")
    )
    assert plan.maps == {} and kept(plan) == [0, 2, 3, 5]


def test_repeated_layers_are_compared_too(model: Checkpoint) -> None:
    recipe = parse_recipe(YamlText("model: m\nsteps:\n- duplicate: {layers: 2}\n", "r.yaml"))
    plan = build_plan(recipe, resolve=lambda _: model, measure=Meter(planted()), run=by_rank())
    assert [trial.name for trial in plan.choices[0].trials] == ["as it is", "block", "blocks", "rank"]
    assert plan.choices[0].chosen == "repeat layers [2, 4)" and kept(plan) == [0, 1, 2, 3, 2, 3, 4, 5]


def test_without_a_strategy_candidates_are_compared(model: Checkpoint) -> None:
    """On all of the held-out text, as for strategy best."""
    run = by_rank()
    plan = searched(model, "layers: 2, candidates: [deepest, rank]", run, Meter(planted()))
    assert [trial.name for trial in plan.choices[0].trials] == ["as it is", "deepest", "rank"] and {*run.shares} == {1.0}


def test_a_candidate_that_is_too_heavy_is_not_taken(model: Checkpoint) -> None:
    """Layers 1 and 4 are missed least, but weigh 18 of the 120 parameters; 2 and 3 weigh 18 too, 3 and 4 weigh 22."""
    matrix = planted()
    matrix[2][4] = matrix[4][2] = 0.5
    matrix[3][5] = matrix[5][3] = 0.01
    plan = searched(model, f"params: {120 - 20}", by_rank(), Meter(matrix))
    assert kept(plan) == [0, 1, 2, 5] and parameters(plan) == 98
    assert [trial.name for trial in plan.choices[0].trials] == ["as it is", "block", "blocks"]


def test_as_many_layers_as_the_loss_allows_in_any_way(model: Checkpoint) -> None:
    plan = searched(model, "max_loss_increase: 6%", by_rank(), Meter(planted()))
    assert kept(plan) == [0, 2, 3, 5]
    assert [trial.chosen for trial in plan.choices[0].trials[1:3]] == ["[1, 2)", "[1, 2) + [4, 5)"]


JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2}


def test_what_no_config_can_describe_is_not_taken(tmp_path: Path) -> None:
    """Every second layer is of another kind: two layers side by side can go, layers 1 and 4 cannot."""
    hybrid = checkpoint(tmp_path / "m", staircase(), **JAMBA | {"model_type": "jamba"})
    plan = searched(hybrid, "layers: 2", by_rank(), Meter(planted()))
    assert kept(plan) == [0, 1, 4, 5] and [trial.name for trial in plan.choices[0].trials[1:]] == ["block", "blocks"]
    followed = searched(hybrid, 'layers: 2}\n- keep: {at: "0-3"', by_rank(), Meter(planted()))
    assert kept(followed) == [0, 1, 4, 5] and followed.choices[0].metric == "angular[last]"
    assert followed.notes == (f"{ALONE}no config can describe what was chosen by loss",)
    mended = searched(hybrid, "layers: 2}\n- reorder: {to: [0, 2, 1, 3]", by_rank(), Meter(planted()))
    assert kept(mended) == [0, 3, 2, 5] and mended.choices[0].metric == "loss"


def test_distance_decides_where_the_loss_would_break_a_later_step(tmp_path: Path) -> None:
    """The second step scales a tensor that only layer 1 has: where the loss takes that layer away, the step finds none."""
    source = checkpoint(tmp_path / "m", {**staircase(), "model.layers.1.extra.weight": f32(2)})
    later = "layers: 2}\n- scale: {at: 1, tensors: '*extra.weight', by: 0.5"
    plan = searched(source, later, by_rank(), Meter(planted()))
    assert kept(plan) == [0, 1, 4, 5] and [choice.metric for choice in plan.choices] == ["angular[last]"]
    why = "r.yaml:4:27: no tensor of these layers is named '*extra.weight'"
    assert plan.notes == (f"{ALONE}what was chosen by loss does not go with the other steps ({why.partition(': ')[2]})",)
    asked = complaint(source, "strategy: best, " + later, by_rank(), Meter(planted()))
    assert asked.startswith(why)
    never_there = complaint(source, "layers: 2}\n- scale: {at: 1, tensors: nothing, by: 2", by_rank(), Meter(planted()))
    assert "no tensor of these layers is named 'nothing'" in never_there
