from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, failure, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import LayercutError, RecipeError, RefusedError
from layercut.healing import without
from layercut.metrics import Cosine
from layercut.operations import OPERATIONS, Duplicate, Expand, Keep, Operation, Prune, Reorder, Wish, apply_all
from layercut.plan import Plan, TensorMade
from layercut.planner import build_plan
from layercut.recipe import Recipe, parse_recipe
from layercut.selectors import Every
from layercut.stack import Block, LayerRef, Scaling, Share, Stack
from layercut.yamltext import YamlText

NAMES = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
OUTPUTS = NAMES[:2]


class Site:
    """Answers for the planner: chooses the blocks it was told, knows the tensors of a llama, and remembers what it was asked."""

    def __init__(self, *blocks: Block, outputs: tuple[str, ...] = OUTPUTS) -> None:
        self.blocks, self.known = blocks, outputs
        self.asked: list[Wish] = []
        self.healed: list[tuple[tuple[Block, ...], float]] = []

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return RecipeError(message, where=".".join(map(str, path)), hint=hint)

    def choose(self, wish: Wish) -> tuple[Block, ...]:
        self.asked.append(wish)
        return self.blocks

    def heal(self, stack: Stack, blocks: Sequence[Block], ridge: float) -> Stack:
        self.healed.append((tuple(blocks), ridge))
        return without(stack, blocks)

    def tensors(self, layer: LayerRef) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer.index}.{name}" for name in NAMES)

    def outputs(self, layer: LayerRef) -> tuple[str, ...]:
        return tuple(f"model.layers.{layer.index}.{name}" for name in self.known)


def whole(depth: int) -> Stack:
    return tuple(LayerRef(model="m", index=index) for index in range(depth))


def indices(stack: Stack) -> list[int]:
    return [layer.index for layer in stack]


def refusal(call: Callable[[], Any]) -> str:
    return failure(RecipeError, call)


def make(name: str, **fields: Any) -> Operation:
    return OPERATIONS[name].model_validate(fields)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (make("prune", at=0), [1, 2, 3, 4, 5]),
        (make("prune", at=[-1, "1-2"]), [0, 3, 4]),
        (make("prune", at={"every": 2}), [1, 3, 5]),
        (make("keep", at=["4-5", "0-1"]), [0, 1, 4, 5]),  # in the order of the stack
        (make("keep", at="0-5"), [0, 1, 2, 3, 4, 5]),
        (make("keep", at=3), [3]),
        (make("duplicate", at=2), [0, 1, 2, 2, 3, 4, 5]),
        (make("duplicate", at="1-3"), [0, 1, 2, 3, 1, 2, 3, 4, 5]),
        (make("duplicate", at="0-1", times=3), [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4, 5]),
        (make("duplicate", at=[0, 2, 3, 5]), [0, 0, 1, 2, 3, 2, 3, 4, 5, 5]),
        (make("duplicate", at=[3, 2]), [0, 1, 2, 3, 2, 3, 4, 5]),  # consecutive whatever the order they are written in
        (make("duplicate", at="0-5"), [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]),
        (make("duplicate", at={"every": 1, "from": 4}, times=2), [0, 1, 2, 3, 4, 5, 4, 5, 4, 5]),
        (make("expand", every=2), [0, 1, 1, 2, 3, 3, 4, 5, 5]),
        (make("expand", every=4), [0, 1, 2, 3, 3, 4, 5]),
        (make("expand", at=[0, -1]), [0, 0, 1, 2, 3, 4, 5, 5]),
        (make("merge", at=[2, 3]), [0, 1, 2, 4, 5]),
        (make("merge", at=[5, 0]), [0, 1, 2, 3, 4]),
        (make("replace", at="1-3", **{"with": "linear"}), [0, 4, 5]),
        (make("replace", at=[1, 3, 4], **{"with": "linear"}), [0, 2, 5]),
        (make("prune", at=[1, 3, 4], heal="fold"), [0, 2, 5]),
        (make("scale", tensors="*", by=2), [0, 1, 2, 3, 4, 5]),
        (make("zero", at=3, tensors="*"), [0, 1, 2, 3, 4, 5]),
        (make("reorder", to=[5, "0-4"]), [5, 0, 1, 2, 3, 4]),
        (make("reorder", to=["0-5"]), [0, 1, 2, 3, 4, 5]),
        (make("reorder", to=[{"every": 2}, {"every": 2, "from": 1}]), [0, 2, 4, 1, 3, 5]),
    ],
)
def test_named_layers(operation: Operation, expected: list[int]) -> None:
    site = Site()
    assert indices(operation.apply(whole(6), site)) == expected
    assert site.asked == []


def test_positions_are_those_of_the_stack_not_of_the_model() -> None:
    stack = make("prune", at="0-1").apply(whole(6), Site())
    assert indices(make("prune", at=0).apply(stack, Site())) == [3, 4, 5]
    doubled = make("duplicate", at="0-1").apply(whole(4), Site())
    assert indices(make("keep", at=[2, 3]).apply(doubled, Site())) == [0, 1]


def test_what_a_prune_asks_of_the_planner() -> None:
    site = Site(Block(1, 3), Block(4, 5))
    operation = make("prune", layers=3, metric="cosine", strategy="blocks", protect=[0, -1])
    assert indices(operation.apply(whole(6), site)) == [0, 3, 5]
    (wish,) = site.asked
    assert (wish.verb, wish.stack, wish.budget) == ("remove", whole(6), {"layers": 3})
    assert (wish.strategy, wish.metric, wish.protect) == ("blocks", Cosine(), frozenset({0, 5}))
    assert indices(wish.build([Block(0, 2), Block(3, 4)])) == [2, 4, 5]


@pytest.mark.parametrize(
    ("fields", "budget"),
    [
        ({"layers": "25%"}, {"layers": "25%"}),
        ({"params": "6B"}, {"params": 6 * 10**9}),
        ({"size": "12GB"}, {"size": 12 * 10**9}),
        ({"max_distance": 0.2}, {"max_distance": 0.2}),
    ],
)
def test_budgets(fields: Mapping[str, Any], budget: Mapping[str, Any]) -> None:
    site = Site(Block(0, 1))
    make("prune", **fields).apply(whole(3), site)
    assert site.asked[0].budget == budget
    assert (site.asked[0].strategy, site.asked[0].metric, site.asked[0].protect) == (None, None, frozenset())


def test_duplicate_repeats_the_blocks_that_the_site_chooses() -> None:
    site = Site(Block(0, 1), Block(1, 3))
    assert indices(make("duplicate", layers="50%", times=2).apply(whole(6), site)) == [0, 0, 0, 1, 2, 1, 2, 1, 2, 3, 4, 5]
    (wish,) = site.asked
    assert (wish.verb, wish.budget) == ("repeat", {"layers": "50%"})
    assert indices(wish.build([Block(2, 4)])) == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]


HEALING = [("prune", {"heal": "fold"}, "remove"), ("replace", {"with": "linear"}, "replace")]


@pytest.mark.parametrize(("name", "fields", "verb"), HEALING)
def test_what_is_to_be_healed_is_chosen_as_a_removal_behind_the_first_layer(name: str, fields: dict[str, Any], verb: str) -> None:
    site = Site(Block(1, 2), Block(3, 5))
    stack = make(name, layers=3, strategy="blocks", protect=-1, **fields).apply(whole(6), site)
    assert indices(stack) == [0, 2, 5]
    (wish,) = site.asked
    assert (wish.verb, wish.budget, wish.protect, wish.heals) == (verb, {"layers": 3}, {0, 5}, True)
    assert indices(wish.build([Block(1, 4)])) == [0, 4, 5]
    assert site.healed == [((Block(1, 2), Block(3, 5)), 0.1)]


@pytest.mark.parametrize(("name", "fields", "verb"), HEALING)
def test_layers_that_are_named_are_healed_with_the_ridge_that_is_given(name: str, fields: dict[str, Any], verb: str) -> None:
    site = Site()
    assert indices(make(name, at=["2-3", 5], ridge=0.5, **fields).apply(whole(6), site)) == [0, 1, 4]
    assert site.healed == [((Block(2, 4), Block(5, 6)), 0.5)]
    assert make(name, layers=1, **fields).runs and make(name, at=1, **fields).runs


def test_nothing_is_healed_where_nothing_is_asked_or_removed() -> None:
    site = Site()
    assert indices(make("prune", at=1).apply(whole(3), site)) == [0, 2]
    assert indices(make("prune", size="1GB", heal="fold").apply(whole(3), site)) == [0, 1, 2]
    assert site.healed == [] and not make("prune", at=1).runs


@pytest.mark.parametrize(("name", "fields", "verb"), HEALING)
def test_before_the_first_layer_there_is_nothing_to_fold_into(name: str, fields: dict[str, Any], verb: str) -> None:
    message = "at: no layer stands before layer 0 that a map could be folded into; prune it without a map"
    assert refusal(lambda: make(name, at=["0-1", 4], **fields).apply(whole(6), Site())) == message
    assert refusal(lambda: make(name, at="0-5", **fields).apply(whole(6), Site())) == "at: removes all 6 layers"


def shares(*parts: tuple[int, float]) -> tuple[Share, ...]:
    return tuple(Share(model="m", index=index, weight=weight) for index, weight in parts)


@pytest.mark.parametrize(
    ("fields", "place", "merged"),
    [
        ({"at": [2, 3]}, 2, LayerRef(model="m", index=2, span=2, shares=shares((2, 0.5), (3, 0.5)))),
        ({"at": "1-4"}, 1, LayerRef(model="m", index=1, span=4, shares=shares((1, 0.25), (2, 0.25), (3, 0.25), (4, 0.25)))),
        ({"at": [3, 2], "weights": [3, 1]}, 2, LayerRef(model="m", index=2, span=2, shares=shares((3, 0.75), (2, 0.25)))),
        ({"at": [1, 4], "weights": [1, 1]}, 1, LayerRef(model="m", index=1, span=1, shares=shares((1, 0.5), (4, 0.5)))),
        ({"at": [0, 5], "weights": [2, -1]}, 0, LayerRef(model="m", index=0, span=1, shares=shares((0, 2), (5, -1)))),
        ({"at": [0, 1], "weights": ["1e0", 0]}, 0, LayerRef(model="m", index=0, span=2, shares=shares((0, 1), (1, 0)))),
    ],
)
def test_an_average_stands_where_the_first_stood_and_spans_its_row(fields: Mapping[str, Any], place: int, merged: LayerRef) -> None:
    stack = make("merge", **fields).apply(whole(6), Site())
    assert stack[place] == merged
    assert len(stack) == 6 - len(merged.shares) + 1
    assert all(layer.plain for at, layer in enumerate(stack) if at != place)


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=6))
def test_weights_are_divided_by_their_sum(weights: list[float]) -> None:
    (merged,) = make("merge", at=list(range(len(weights))), weights=weights).apply(whole(len(weights)), Site())
    assert sum(share.weight for share in merged.shares) == pytest.approx(1)
    assert [share.weight * sum(weights) for share in merged.shares] == pytest.approx(weights)


def test_layers_of_two_models_can_be_averaged() -> None:
    stack = (LayerRef(model="a", index=1), LayerRef(model="b", index=2))
    (merged,) = make("merge", at="0-1").apply(stack, Site())
    assert (merged.model, merged.index, merged.span) == ("a", 1, 1)
    assert [(share.model, share.index) for share in merged.shares] == [("a", 1), ("b", 2)]


def zeros(index: int, *names: str) -> tuple[tuple[Scaling, ...], ...]:
    return tuple((Scaling(tensors=f"model.layers.{index}.{name}", by=0),) for name in names)


def test_expand_follows_llama_pro() -> None:
    """8 blocks inserted into 32 layers, one after each 4: arXiv 2401.02415, section 3."""
    stack = Expand(every=4).apply(whole(32), Site())
    assert len(stack) == 40
    copies = [at for at, layer in enumerate(stack) if layer.identity]
    assert copies == [4, 9, 14, 19, 24, 29, 34, 39]
    assert [stack[at].index for at in copies] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert tuple(layer for layer in stack if not layer.identity) == whole(32)
    for at in copies:
        assert stack[at] == LayerRef(model="m", index=stack[at - 1].index, identity=True, scalings=zeros(stack[at].index, *OUTPUTS))


def test_expand_keeps_the_arithmetic_of_what_it_copies() -> None:
    scaled = make("scale", at=1, tensors="*.up_proj.weight", by=0.5).apply(whole(2), Site())
    copy = Expand(at=1).apply(scaled, Site())[2]
    assert copy.scalings == ((Scaling(tensors="*.up_proj.weight", by=0.5),), *zeros(1, *OUTPUTS))
    assert copy.identity


def test_factors_gather_on_the_layers_that_are_named() -> None:
    stack = make("scale", at=["1-2"], tensors="*.down_proj.*", by=0.7).apply(whole(4), Site())
    stack = make("scale", tensors="*.up_proj.*", by="1e-3").apply(stack, Site())
    one, two = (Scaling(tensors="*.down_proj.*", by=0.7),), (Scaling(tensors="*.up_proj.*", by=0.001),)
    assert [layer.scalings for layer in stack] == [(two,), (one, two), (one, two), (two,)]
    assert not any(layer.identity for layer in stack)


def test_a_layer_whose_outputs_are_all_zero_adds_nothing() -> None:
    stack = make("zero", at=1, tensors="*.self_attn.o_proj.weight").apply(whole(3), Site())
    assert not stack[1].identity
    stack = make("zero", at=[0, 1], tensors="*.down_proj.weight").apply(stack, Site())
    assert [layer.identity for layer in stack] == [False, True, False]
    assert make("zero", at=1, tensors="*").apply(whole(3), Site())[1].identity
    assert make("scale", at=1, tensors="*_proj.weight", by=0).apply(whole(3), Site())[1].identity
    silent = make("scale", at=1, tensors="*.up_proj.weight", by=3).apply(stack, Site())
    assert silent[1].identity  # it stays silent whatever comes after


def test_zero_needs_no_known_outputs_but_expand_does() -> None:
    site = Site(outputs=())
    assert not make("zero", at=1, tensors="*").apply(whole(3), site)[1].identity
    message = "layer 1: none of its tensors is known to write to the residual stream"
    assert refusal(lambda: make("expand", every=2).apply(whole(3), site)) == f"every: {message}"
    assert refusal(lambda: make("expand", at=[1]).apply(whole(3), site)) == f"at: {message}"


LINEAR = {"with": "linear"}


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (make("prune", at="0-5"), "at: removes all 6 layers"),
        (make("prune", layers=1, protect=[9]), "protect.0: layer 9 does not exist: the stack has layers 0 to 5 here"),
        (make("keep", at=[0, 6]), "at.1: layer 6 does not exist: the stack has layers 0 to 5 here"),
        (make("duplicate", at=[0, 0]), "at.1: layer 0 is named twice"),
        (make("expand", every=7), "every: every 7 layers, but the stack has 6 here"),
        (make("expand", at=-7), "at: layer -7 does not exist: the stack has layers 0 to 5 here"),
        (make("merge", at=3), "at: an average needs at least two layers"),
        (make("merge", at=[2, 3], weights=[1]), "weights: 1 weights for 2 layers"),
        (make("merge", at=[2, 3], weights=[]), "weights: 0 weights for 2 layers"),
        (make("merge", at=[2, 3], weights=[1, -1]), "weights: weights must not add up to zero"),
        (make("reorder", to=[1, 0]), "to: leaves out layer 2 and 3 more; to drop layers use keep"),
        (make("reorder", to="0-4"), "to: leaves out layer 5; to drop layers use keep"),
        (make("reorder", to=["0-5", 3]), "to.1: layer 3 is named twice"),
        (
            make("scale", at=2, tensors="*.gate_proj.weight", by=2),
            "tensors: no tensor of these layers is named '*.gate_proj.weight'; there are down_proj, input_layernorm, o_proj, up_proj",
        ),
        (
            make("zero", at=2, tensors="model.layers.3.*"),
            "tensors: no tensor of these layers is named 'model.layers.3.*'; there are down_proj, input_layernorm, o_proj, up_proj",
        ),
    ],
)
def test_operations_that_cannot_be(operation: Operation, message: str) -> None:
    assert refusal(lambda: operation.apply(whole(6), Site())) == message


def test_what_has_arithmetic_is_not_averaged() -> None:
    for change in (make("scale", at=1, tensors="*", by=2), make("merge", at=[1, 2])):
        stack = change.apply(whole(6), Site())
        message = "at: layer 1 is not as its model has it: average before other arithmetic"
        assert refusal(lambda stack=stack: make("merge", at=[0, 1]).apply(stack, Site())) == message


EITHER = "takes either one of layers, params, size, max_distance, max_loss_increase (how many) or 'at' (which)"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "prune",
            {"layers": 1, "at": 2},
            EITHER,
        ),
        (
            "prune",
            {"layers": 1, "size": "1GB"},
            EITHER,
        ),
        ("duplicate", {}, "takes either 'layers' (how many) or 'at' (which)"),
        ("replace", LINEAR, "takes either 'layers' (how many) or 'at' (which)"),
        ("prune", {"at": 2, "strategy": "rank"}, "with 'at' nothing is chosen: strategy, metric and protect go with a budget"),
        ("duplicate", {"at": 2, "metric": "cosine"}, "with 'at' nothing is chosen: strategy, metric and protect go with a budget"),
        ("prune", {"at": 2, "ridge": 0.1}, "'ridge' goes with heal: fold"),
        ("prune", {"at": 2, "heal": "fold", "ridge": 0}, "Input should be greater than 0"),
        ("expand", {}, "takes either 'every' or 'at'"),
        ("expand", {"every": 2, "at": 1}, "takes either 'every' or 'at'"),
    ],
)
def test_fields_that_do_not_go_together(name: str, fields: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(name, **fields)
    assert [error["msg"].removeprefix("Value error, ") for error in caught.value.errors()] == [message]


@given(st.integers(1, 12), st.data())
def test_pruning_the_copies_undoes_duplicate(depth: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    times = data.draw(st.integers(1, 3))
    doubled = Duplicate(at=f"{first}-{last}", times=times).apply(whole(depth), Site())
    length = last - first + 1
    assert len(doubled) == depth + times * length
    assert Prune(at=f"{last + 1}-{last + times * length}").apply(doubled, Site()) == whole(depth)
    assert Prune(at=f"{first}-{first + times * length - 1}").apply(doubled, Site()) == whole(depth)


@given(st.integers(1, 12))
def test_keeping_all_is_the_identity(depth: int) -> None:
    for at in (f"0-{depth - 1}", f"{-depth}--1", Every(every=1), tuple(range(depth))):
        assert Keep(at=at).apply(whole(depth), Site()) == whole(depth)


@given(st.integers(2, 12), st.data())
def test_prune_and_keep_are_complements(depth: int, data: st.DataObject) -> None:
    some = data.draw(st.lists(st.integers(0, depth - 1), min_size=1, max_size=depth - 1, unique=True))
    rest = tuple(position for position in range(depth) if position not in some)
    assert Prune(at=tuple(some)).apply(whole(depth), Site()) == Keep(at=rest).apply(whole(depth), Site())


@given(st.permutations(range(7)))
def test_an_order_and_its_inverse_are_the_identity(order: list[int]) -> None:
    inverse = tuple(order.index(position) for position in range(7))
    turned = Reorder(to=tuple(order)).apply(whole(7), Site())
    assert indices(turned) == order
    assert Reorder(to=inverse).apply(turned, Site()) == whole(7)


@given(st.integers(1, 12), st.data())
def test_pruning_what_expand_inserted_undoes_it(depth: int, data: st.DataObject) -> None:
    every = data.draw(st.integers(1, depth))
    stack = Expand(every=every).apply(whole(depth), Site())
    assert len(stack) == depth + depth // every
    copies = tuple(at for at, layer in enumerate(stack) if layer.identity)
    assert Prune(at=copies).apply(stack, Site()) == whole(depth)


def test_apply_all_goes_in_order() -> None:
    steps = [(make("prune", at=0), Site()), (make("duplicate", at=0), Site()), (make("prune", at=-1), Site())]
    assert indices(apply_all(whole(4), steps)) == [1, 1, 2]
    assert apply_all(whole(4), []) == whole(4)


def test_every_operation_says_what_it_does_and_its_examples_are_recipes() -> None:
    for name, kind in OPERATIONS.items():
        assert kind.__name__.lower() == name
        assert kind.__doc__ and kind.__doc__[0].isupper()
        fields = TypeAdapter(kind).json_schema()["properties"]
        assert all(field.get("description") for field in fields.values()), name
        assert kind.examples
        for example in kind.examples:
            found = parse_recipe(YamlText(f"model: m\nsteps:\n{example}\n", "r.yaml"))
            assert [step.name for step in found.steps] == [name]


# Through the planner: bytes that say where they come from


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 8, "vocab_size": 8}
    tensors = {name: ("F32", (4, 4), data) for name, (_, _, data) in byte_tensors(8).items()}
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("operations") / "m", tensors, config, shards=2))


def never(*_: Any) -> Any:
    raise AssertionError("a static recipe measures nothing")


def plan_of(model: Checkpoint, *steps: Mapping[str, Any]) -> Plan:
    recipe = Recipe.model_validate({"model": "m", "steps": [dict(step) for step in steps]})
    return build_plan(recipe, resolve=lambda _: model, measure=never)


def written(plan: Plan, model: Checkpoint) -> dict[int, list[str]]:
    """Where the bytes of every output layer come from: a source layer, an average `2*0.5+3*0.5`, factors `2*[0.7]`, or `zero`."""
    found: dict[int, list[str]] = {at: [] for at in range(len(plan.actions.layers))}
    for file in plan.actions.files:
        for tensor in file.tensors:
            parts = tensor.name.split(".")
            if "layers" not in parts:
                continue
            pieces = []
            for part in tensor.parts if isinstance(tensor, TensorMade) else (tensor,):
                label = (model.folder / part.file).read_bytes()[part.begin : part.end].decode().split(";")[0]
                source = label.split(":")
                assert source[2] == ".".join(parts[3:]), (tensor.name, label)
                weight = f"*{part.weight:g}" if isinstance(tensor, TensorMade) and len(tensor.parts) > 1 else ""
                pieces.append(source[1] + weight)
            by = "".join(f"[{factor:g}]" for factor in tensor.factors) if isinstance(tensor, TensorMade) else ""
            found[int(parts[2])].append("+".join(pieces) + by if pieces else "zero")
    return found


def both(*sources: Any) -> dict[int, list[str]]:
    return {at: [str(part) for part in (source if isinstance(source, tuple) else (source, source))] for at, source in enumerate(sources)}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{"prune": {"at": [1, "3-5"]}}], both(0, 2, 6, 7)),
        ([{"keep": {"at": [7, 0]}}], both(0, 7)),
        ([{"duplicate": {"at": "6-7", "times": 2}}], both(0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7)),
        ([{"reorder": {"to": [7, "0-6"]}}], both(7, 0, 1, 2, 3, 4, 5, 6)),
        ([{"expand": {"every": 4}}], both(0, 1, 2, 3, "zero", 4, 5, 6, 7, "zero")),
        ([{"merge": {"at": [2, 3]}}], both(0, 1, "2*0.5+3*0.5", 4, 5, 6, 7)),
        ([{"merge": {"at": [3, 2], "weights": [3, 1]}}], both(0, 1, "3*0.75+2*0.25", 4, 5, 6, 7)),
        ([{"scale": {"at": 1, "tensors": "*.o_proj.weight", "by": 0.5}}], both(0, ("1[0.5]", "1"), 2, 3, 4, 5, 6, 7)),
        ([{"zero": {"at": 1, "tensors": "*.down_proj.*"}}], both(0, ("1", "zero"), 2, 3, 4, 5, 6, 7)),
        ([{"prune": {"at": "2-5"}}, {"duplicate": {"at": "1-2"}}], both(0, 1, 6, 1, 6, 7)),
        ([{"duplicate": {"at": 0}}, {"scale": {"at": 1, "tensors": "*", "by": 2}}, {"keep": {"at": "0-2"}}], both(0, "0[2]", 1)),
        ([{"keep": {"at": "4-7"}}, {"expand": {"at": 0}}, {"reorder": {"to": [4, 3, 2, 1, 0]}}], both(7, 6, 5, "zero", 4)),
        ([{"reorder": {"to": [1, 0, "2-7"]}}, {"merge": {"at": "0-1"}}, {"prune": {"at": "1-6"}}], both("1*0.5+0*0.5")),
        (
            [{"merge": {"at": [1, 0]}}, {"keep": {"at": "0-1"}}, {"expand": {"at": 0}}, {"scale": {"at": 0, "tensors": "*", "by": 2}}],
            both("1*0.5+0*0.5[2]", "zero", 2),
        ),
        (
            [{"scale": {"at": 3, "tensors": "*", "by": 2}}, {"scale": {"at": 3, "tensors": "*.o_proj.*", "by": 3}}, {"keep": {"at": 3}}],
            both(("3[2][3]", "3[2]")),
        ),
    ],
)  # fmt: skip
def test_the_right_layer_in_the_right_place(steps: list[dict[str, Any]], expected: dict[int, list[str]], model: Checkpoint) -> None:
    plan = plan_of(model, *steps)
    assert written(plan, model) == expected
    assert json.loads(plan.actions.config)["num_hidden_layers"] == len(expected)
    assert Plan.from_json(plan.to_json()) == plan


def test_layers_that_add_nothing_make_no_seam(model: Checkpoint) -> None:
    assert plan_of(model, {"expand": {"every": 2}}).seams == ()
    zero = plan_of(model, {"zero": {"at": 3, "tensors": "*"}})
    assert zero.seams[0].from_boundary, zero.seams[0].to_boundary == (3, 4)  # what it added is missing now
    assert zero.actions.layers[3].identity


def test_averages_of_unlike_layers_are_refused(tmp_path: Path) -> None:
    tensors = byte_tensors(3)
    tensors["model.layers.1.mlp.extra.weight"] = ("F32", (1,), bytes(4))
    tensors["model.layers.2.mlp.down_proj.weight"] = ("F32", (2,), bytes(8))
    source = open_checkpoint(write_checkpoint(tmp_path / "m", tensors, {"model_type": "llama", "num_hidden_layers": 3}))
    for at in ([0, 1], [1, 0]):
        with pytest.raises(RefusedError) as caught:
            plan_of(source, {"merge": {"at": at}})
        assert str(caught.value) == "mlp.extra.weight: layers cannot be averaged when only some of them have a tensor"
    with pytest.raises(RefusedError) as caught:
        plan_of(source, {"prune": {"at": 1}}, {"merge": {"at": [0, 1]}})
    assert (
        str(caught.value) == "model.layers.0.self_attn.o_proj.weight: arithmetic on U8 is refused: quantised weights are not what they say"
    )


steps = st.lists(
    st.one_of(
        st.builds(lambda at: {"prune": {"at": at}}, st.integers(-8, 7)),
        st.builds(
            lambda at, times: {"duplicate": {"at": at, "times": times}}, st.sampled_from(["0-1", 2, {"every": 2}]), st.integers(1, 2)
        ),
        st.builds(lambda at: {"keep": {"at": at}}, st.sampled_from(["0-3", [0, 2, -1], {"every": 1}])),
        st.just({"reorder": {"to": [-1, {"every": 1, "to": -2}]}}),
        st.just({"expand": {"every": 2}}),
    ),
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_any_steps_put_the_layers_of_the_stack_into_the_file(model: Checkpoint, steps: list[dict[str, Any]]) -> None:
    try:
        plan = plan_of(model, *steps)
    except RecipeError:
        return
    assert written(plan, model) == both(*("zero" if layer.identity else layer.index for layer in plan.actions.layers))
