from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, failure, write_checkpoint

from layercut.architecture import Member, find_stack
from layercut.boundaries import Window
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import CheckpointError, LayercutError, RecipeError
from layercut.recipe import Recipe, parse_recipe
from layercut.scalings import factors
from layercut.stack import LayerRef
from layercut.start import end_scalings, find_windows, model_of, open_members, reachable_depth, stack_of
from layercut.yamltext import YamlText

DEPTHS = {"m": 6, "n": 4}


def read(text: str) -> Recipe:
    return parse_recipe(YamlText(text, "r.yaml"))


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Member]:
    found = {}
    for name, depth in DEPTHS.items():
        folder = write_checkpoint(tmp_path_factory.mktemp("start") / name, byte_tensors(depth, name), {"num_hidden_layers": depth})
        checkpoint = open_checkpoint(folder)
        found[name] = Member(checkpoint, find_stack(checkpoint))
    return found


def refusal(text: str, members: Mapping[str, Member]) -> str:
    recipe = read(text)
    return failure(LayercutError, lambda: reachable_depth(recipe, find_windows(recipe, members), members))


# Models


class Hub:
    """Opens models by their reference, and remembers the order."""

    def __init__(self, **known: Checkpoint) -> None:
        self.known = known
        self.asked: list[str] = []

    def __call__(self, reference: str) -> Checkpoint:
        self.asked.append(reference)
        if reference not in self.known:
            raise CheckpointError("no such folder", where=f"/x/{reference}", hint="check the name")
        return self.known[reference]


@pytest.mark.parametrize(
    ("text", "aliases", "asked"),
    [
        ("model: m", ["m"], ["m"]),
        ("models: {chat: m}\nmodel: chat", ["chat"], ["m"]),
        (
            "slices: [{model: n, layer_range: [0, 1]}, {model: m, layer_range: [0, 1]}, {model: n, layer_range: [1, 2]}]",
            ["n", "m"],
            ["n", "m"],
        ),
        ("model: m\nslices: [{layer_range: [0, 1]}, {model: n, layer_range: [0, 1]}]", ["m", "n"], ["m", "n"]),
        ("model: m\nslices: [{model: n, layer_range: [0, 1]}]", ["n"], ["n"]),  # no slice is taken from m
        ("models: {a: m, b: m}\nslices: [{model: b, layer_range: [0, 1]}]", ["b"], ["m"]),
        ("model: m\nbase_model: n", ["m", "n"], ["m", "n"]),
        ("model: m\nbase_model: m", ["m"], ["m"]),
        ("model: m\ntokenizer_source: n", ["m", "n"], ["m", "n"]),
        ("model: m\ntokenizer_source: base", ["m"], ["m"]),
        ("models: {t: n}\nmodel: m\ntokenizer_source: t\nbase_model: t", ["m", "t"], ["m", "n"]),
    ],
)
def test_models_are_opened_once_by_alias_the_slices_first(text: str, aliases: list[str], asked: list[str], members: Any) -> None:
    hub = Hub(**{name: member.checkpoint for name, member in members.items()})
    found = open_members(read(text), hub)
    assert (list(found), hub.asked) == (aliases, asked)
    assert all(member.stack.depth == DEPTHS["n" if member.checkpoint is members["n"].checkpoint else "m"] for member in found.values())


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("model: bad", "r.yaml:1:8"),
        ("models: {x: bad}\nmodel: x", "r.yaml:2:8"),
        ("slices: [{model: bad, layer_range: [0, 1]}]", "r.yaml:1:18"),
        ("slices:\n- sources: [{model: bad, layer_range: [0, 1]}]", "r.yaml:2:21"),
        ("model: bad\nslices: [{layer_range: [0, 1]}]", "r.yaml:2:10"),
        ("model: m\nbase_model: bad", "r.yaml:2:13"),
        ("model: m\ntokenizer_source: bad", "r.yaml:2:19"),
    ],
)
def test_a_model_that_cannot_be_opened_is_told_with_its_place(text: str, where: str, members: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_members(read(text), Hub(m=members["m"].checkpoint))
    assert str(caught.value) == f"{where}: /x/bad: no such folder; check the name"


def test_a_slice_needs_a_model(members: Any) -> None:
    recipe = read("slices: [{model: m, layer_range: [0, 1]}, {layer_range: [0, 1]}]")
    assert recipe.slices is not None
    assert model_of(recipe, 0, recipe.slices[0]) == "m"
    with pytest.raises(RecipeError) as caught:
        open_members(recipe, Hub(m=members["m"].checkpoint))
    assert str(caught.value) == "r.yaml:1:43: which model? neither the slice nor the recipe names one"


# Slices


@pytest.mark.parametrize(
    ("part", "window"),
    [
        ("{model: m, layer_range: [0, 6]}", Window("m", 0, 6)),
        ("{model: m, layer_range: [2, end]}", Window("m", 2, 6)),
        ("{model: n, layer_range: [2, end]}", Window("n", 2, 4)),
        ("{model: m, layer_range: [0, auto]}", Window("m", 0, None)),
        ("{model: m, layer_range: [auto, end]}", Window("m", None, 6)),
        ("{model: m, layer_range: [auto, auto], min: 2, max: 3}", Window("m", None, None, 2, 3)),
        ("{model: m, layer_range: [auto, 5], protect: [-2, 1]}", Window("m", None, 5, holds=(4, 1))),
        ("{sources: [{model: m, layer_range: [0, auto]}], max: 3}", Window("m", 0, None, None, 3)),
    ],
)
def test_slices_as_windows(part: str, window: Window, members: Any) -> None:
    assert find_windows(read(f"slices: [{part}]"), members) == [window]


def test_an_overlap_goes_with_the_slice_before(members: Any) -> None:
    text = "slices: [{model: m, layer_range: [0, auto]}, {model: m, layer_range: [auto, end], overlap: 0}]"
    assert find_windows(read(text), members)[1] == Window("m", None, 6, overlap=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "slices: [{model: m, layer_range: [0, 7]}]",
            "1:34: layer_range [0, 7] leaves the model, which has 6 layers; the largest range is [0, 6]",
        ),
        (
            "slices: [{model: n, layer_range: [4, end]}]",
            "1:34: layer_range [4, end] leaves the model, which has 4 layers; the largest range is [0, 4]",
        ),
        ("slices: [{model: m, layer_range: [0, 3], min: 2}]", "1:34: min, max, overlap and protect go with an 'auto' boundary"),
        ("slices: [{model: m, layer_range: [0, 3], protect: 1}]", "1:34: min, max, overlap and protect go with an 'auto' boundary"),
        ("slices: [{model: m, layer_range: [0, end], max: 9}]", "1:34: min, max, overlap and protect go with an 'auto' boundary"),
        ("slices: [{model: m, layer_range: [auto, 2], min: 3}]", "1:34: no range satisfies the constraints of this slice"),
        ("slices: [{model: m, layer_range: [2, auto], protect: 1}]", "1:34: no range satisfies the constraints of this slice"),
        ("slices: [{model: m, layer_range: [auto, 2], protect: 4}]", "1:34: no range satisfies the constraints of this slice"),
        (
            "slices: [{model: m, layer_range: [auto, auto], max: 2, protect: [0, 3]}]",
            "1:34: no range satisfies the constraints of this slice",
        ),
        (
            "slices: [{model: m, layer_range: [auto, end], protect: [0, 6]}]",
            "1:60: layer 6 does not exist: the stack has layers 0 to 5 here",
        ),
        ("slices: [{model: m, layer_range: [auto, end], overlap: 1}]", "1:56: 'overlap' needs a slice of the same model before it"),
        (
            "slices: [{model: n, layer_range: [0, 2]}, {model: m, layer_range: [auto, end], overlap: 1}]",
            "1:89: 'overlap' needs a slice of the same model before it",
        ),
        (
            "slices: [{model: m, layer_range: [0, auto]}]",
            "1:9: 'auto' boundaries need a target 'depth'; these slices can hold 1 to 6 layers",
        ),
        (
            "slices: [{model: m, layer_range: [0, auto], min: 2, max: 4}, {model: n, layer_range: [auto, end]}]",
            "1:9: 'auto' boundaries need a target 'depth'; these slices can hold 3 to 8 layers",
        ),
        (
            "depth: 9\nslices: [{model: m, layer_range: [0, auto], max: 4}, {model: n, layer_range: [auto, end]}]",
            "1:8: depth 9 cannot be reached: the slices hold 2 to 8 layers",
        ),
        ("depth: 5\nslices: [{model: m, layer_range: [0, 4]}]", "1:8: depth 5 cannot be reached: the slices hold exactly 4 layers"),
    ],
)
def test_slices_that_cannot_be(text: str, message: str, members: Any) -> None:
    assert refusal(text, members) == f"r.yaml:{message}"


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("slices: [{model: m, layer_range: [0, 4]}, {model: n, layer_range: [1, end]}]", 7),
        ("depth: 4\nslices: [{model: m, layer_range: [0, 4]}]", 4),
        ("depth: 6\nslices: [{model: m, layer_range: [0, auto]}, {model: n, layer_range: [auto, end]}]", 6),
        ("slices: [{model: m, layer_range: [0, auto], min: 3, max: 3}]", 3),  # one depth alone is possible
    ],
)
def test_the_depth_of_slices(text: str, depth: int, members: Any) -> None:
    recipe = read(text)
    assert reachable_depth(recipe, find_windows(recipe, members), members) == depth


# Factors


def by(layer: LayerRef, name: str = "mlp.down_proj.weight") -> float:
    found = factors(layer.scalings, name)
    return found[0] if found else 1.0


LEVELS = """\
slices:
- sources: [{{model: m, layer_range: [0, 2]{source}}}]
{slice}
- {{model: m, layer_range: [2, 5]}}
{recipe}
"""


@pytest.mark.parametrize(
    ("source", "part", "recipe", "first", "second"),
    [
        ("", "", "", 1, 1),
        ("", "", "parameters: {scale: 5}", 5, 5),
        ("", "  parameters: {scale: 3}", "parameters: {scale: 5}", 3, 5),
        (", parameters: {scale: 2}", "  parameters: {scale: 3}", "parameters: {scale: 5}", 2, 5),
        (", parameters: {scale: {filter: up_proj, value: 2}}", "  parameters: {scale: 3}", "parameters: {scale: 5}", 3, 5),
        (", parameters: {scale: {filter: up_proj, value: 2}}", "", "parameters: {scale: 5}", 5, 5),
    ],
)
def test_source_then_slice_then_recipe(source: str, part: str, recipe: str, first: float, second: float) -> None:
    found = read(LEVELS.format(source=source, slice=part, recipe=recipe))
    stack = stack_of(found, [("m", 0, 2), ("m", 2, 5)])
    assert [layer.index for layer in stack] == [0, 1, 2, 3, 4]
    assert [by(layer) for layer in stack] == [first, first, second, second, second]


def test_lists_are_spread_over_each_slice_by_itself() -> None:
    text = (
        "parameters: {scale: [0, 1]}\n"
        "slices: [{model: m, layer_range: [0, 3]}, {model: m, layer_range: [2, 3]}, {model: m, layer_range: [0, 2]}]"
    )
    recipe = read(text)
    stack = stack_of(recipe, [("m", 0, 3), ("m", 2, 3), ("m", 0, 2)])
    assert [by(layer) for layer in stack] == [0, 0.5, 1, 1, 0, 1]
    before, behind = end_scalings(recipe)
    assert (factors(before, "x"), factors(behind, "x")) == ((0.0,), (0.0,))  # both at position 0 (mergekit's rule)


def test_ends_take_the_factors_of_the_first_and_the_last_slice() -> None:
    text = (
        "slices: [{model: m, layer_range: [0, 1], parameters: {scale: 0.5}}, {model: m, layer_range: [1, 2]}, "
        "{model: m, layer_range: [2, 3], parameters: {scale: [2, 7]}}]"
    )
    before, behind = end_scalings(read(text))
    assert (factors(before, "model.embed_tokens.weight"), factors(behind, "lm_head.weight")) == ((0.5,), (2.0,))


def test_a_model_without_slices_is_one_slice() -> None:
    recipe = read("model: m\nparameters: {scale: [1, 2]}")
    assert [by(layer) for layer in stack_of(recipe, [("m", 0, 5)])] == [1, 1.25, 1.5, 1.75, 2]
    assert end_scalings(recipe) == ((), ())
    assert stack_of(read("model: m"), [("m", 0, 2)]) == (LayerRef(model="m", index=0), LayerRef(model="m", index=1))
    before, behind = end_scalings(read("model: m\nparameters: {scale: 3}"))
    assert factors(before, "x") == factors(behind, "x") == (3.0,)


def test_a_stack_that_no_machine_could_run_is_refused(tmp_path: Path) -> None:
    recipe = read("model: m\nslices: [{layer_range: [0, 1]}]")
    with pytest.raises(RecipeError, match=r"^r\.yaml:2:9: 900000000 layers are too many: a stack has [0-9]+ at most$"):
        stack_of(recipe, [("m", 0, 900_000_000)])
