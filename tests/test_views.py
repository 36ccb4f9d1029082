"""Views: what a config says of each layer, whichever node, side or spelling it says it in, and what a recipe adds to that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from layercut.anatomy import DepthKey, LayerStack, Member
from layercut.architecture import find_stack
from layercut.checkpoint import open_checkpoint
from layercut.declarations import Architecture
from layercut.rules import INDICES, INDICES_FROM_1, KEYED, LETTERS, LIST, PERIOD, PREFIX, RULES, SUFFIX, Rule
from layercut.views import SIDES, View, decode

S, F = "sliding_attention", "full_attention"


def view(folder: Path, config: dict[str, Any], *prefixes: str, stack: str | None = None, **declared: tuple[str, ...]) -> View:
    """The view of a checkpoint whose prefixes have as many layers as they say behind a colon."""
    tensors = {}
    for prefix in prefixes or ("model.layers.:4",):
        name, _, count = prefix.partition(":")
        tensors |= {f"{name}{at}.w": ("U8", (1,), b".") for at in range(int(count))}
    checkpoint = open_checkpoint(write_checkpoint(folder, tensors, config))
    return View(Member(checkpoint, find_stack(checkpoint, stack, Architecture(**declared))))


def of(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, **more: Any) -> View:
    return view(tmp_path_factory.mktemp("view"), config, **more)


TEXT = {"model_type": "gemma3_text", "num_hidden_layers": 4, "sliding_window": 4}
TOWERS = ("language_model.model.layers.:4", "vision_tower.encoder.layers.:4")
NESTED = {
    "model_type": "gemma3", "layer_types": ["root"] * 4,
    "text_config": {**TEXT, "layer_types": [S, F, S, F], "rope_scaling": {"window_sizes": [1, 2, 3, 4], "type": "linear"}},
    "vision_config": {"num_hidden_layers": 4, "layer_types": ["v"] * 4},
}  # fmt: skip


def test_the_node_of_the_stack_is_meant(tmp_path: Path) -> None:
    text = view(tmp_path / "m", NESTED, *TOWERS)
    assert text.kind == "gemma3_text"
    assert text.value(("layer_types",)) == [S, F, S, F]
    assert text.dotted(("layer_types",)) == "text_config.layer_types"
    assert text.value(("rope_scaling", "window_sizes")) == [1, 2, 3, 4]
    assert text.dotted(("rope_scaling", "window_sizes")) == "text_config.rope_scaling.window_sizes"
    vision = view(tmp_path / "m", NESTED, *TOWERS, stack="vision")
    assert (vision.kind, vision.value(("layer_types",))) == ("gemma3", ["v"] * 4), "a node without a type has that of the whole"
    root = view(tmp_path / "plain", {**TEXT, "layer_types": [S] * 4})
    assert (root.kind, root.dotted(("layer_types",))) == ("gemma3_text", "layer_types")


@pytest.mark.parametrize(
    "path", [("absent",), ("absent", "inner"), ("model_type", "inner"), ("rope_scaling", "absent"), ("layer_types", "0")]
)
def test_what_is_not_there_is_none(tmp_path: Path, path: tuple[str, ...]) -> None:
    assert view(tmp_path / "m", NESTED, *TOWERS).value(path) is None


@pytest.mark.parametrize("kind", [None, 3, ["llama"], {"a": 1}])
def test_a_type_that_is_no_text_is_none(tmp_path: Path, kind: Any) -> None:
    assert view(tmp_path / "m", {"model_type": kind, "num_hidden_layers": 4}).kind is None


def test_values_that_the_class_makes(tmp_path: Path) -> None:
    """What is not written is implied, and never overrides what is."""
    made = view(tmp_path / "a", {"model_type": "gemma2", "num_hidden_layers": 4})
    assert made.implied == {"layer_types": [S, F, S, F]}
    assert made.node == {"model_type": "gemma2", "num_hidden_layers": 4, "layer_types": [S, F, S, F]}
    assert "layer_types" not in made.written
    assert made.entries(LIST, ("layer_types",)) == [S, F, S, F]
    said = view(tmp_path / "b", {"model_type": "gemma2", "num_hidden_layers": 4, "layer_types": [F] * 4})
    assert said.implied == {} and said.value(("layer_types",)) == [F] * 4


def test_paths_that_a_rule_may_apply_to(tmp_path: Path) -> None:
    """Members of the node, and those of plain dicts in it that have a rule: not those of a dict that is a model, or a value by layer."""
    config = {
        "model_type": "novel", "num_hidden_layers": 4, "layer_types": list("abcd"), "hidden_size": 8,
        "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "num_heads": 4},
        "per_layer_config": {"0": {"layer_types": list("abcd")}},
        "other": {"model_type": "clip", "layer_types": list("abcd")},
        "deep": {"n_layer": 4, "layer_types": list("abcd")},
        "wrong": {"layer_types": list("abc")},
    }  # fmt: skip
    assert view(tmp_path / "m", config).paths() == [
        ("model_type",), ("num_hidden_layers",), ("layer_types",), ("hidden_size",), ("linear_attn_config",),
        ("linear_attn_config", "full_attn_layers"), ("linear_attn_config", "kda_layers"), ("per_layer_config",), ("other",), ("deep",),
        ("wrong",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("layer_types", list("abcd"), LIST),
        ("layer_types", list("abc"), None),
        ("moe_layer_freq", [0, 1, 1, 1], LIST),
        ("moe_layer_freq", 2, PERIOD),
        ("mlp_only_layers", [0, 3], INDICES),
        ("mlp_only_layers", [0, 9], INDICES),  # a default of the class, for more layers
        ("mlp_only_layers", [0, -1], None),
        ("mlp_only_layers", ["0"], None),
        ("full_attn_layers", [4], INDICES_FROM_1),
        ("full_attn_layers", [5], INDICES_FROM_1),
        ("full_attn_layers", [0], None),
        ("num_kv_shared_layers", 2, SUFFIX),
        ("first_k_dense_replace", 2, PREFIX),
        ("per_layer_config", {"1": {}}, KEYED),
        ("hidden_size", 4, None),
    ],
)
def test_the_rule_of_a_value(tmp_path: Path, key: str, value: Any, rule: Rule | None) -> None:
    assert view(tmp_path / "m", {"model_type": "x", "num_hidden_layers": 4, key: value}).rule((key,)) is rule


@pytest.mark.parametrize(
    ("value", "entries"),
    [
        ([0, 3], [True, False, False, True]),
        ([0, 9], [True, False, False, False]),
        ([3, 9], [False, False, False, True]),
        ([4], [False] * 4),
        ([], [False] * 4),
    ],
)
def test_an_index_beyond_the_depth_names_no_layer(tmp_path: Path, value: list[int], entries: list[bool]) -> None:
    found = view(
        tmp_path / "m", {"model_type": "x", "num_hidden_layers": 4, "mlp_only_layers": value, "full_attn_layers": [i + 1 for i in value]}
    )
    assert found.entries(INDICES, ("mlp_only_layers",)) == entries
    assert found.entries(INDICES_FROM_1, ("full_attn_layers",)) == entries


# What a recipe declares


@pytest.mark.parametrize(
    ("word", "value", "rule"),
    [
        ("lists", list("abcd"), LIST),
        ("lists", "abcd", LETTERS),
        ("lists", list("abc"), None),
        ("indices", [0, 3], INDICES),
        ("numbers", [1, 4], INDICES_FROM_1),
        ("numbers", [0], None),
        ("counts", 3, PREFIX),
        ("counts", True, None),
        ("ignore", list("abcd"), None),
        ("tables", list("abcd"), None),
    ],
)
def test_words_of_a_recipe(tmp_path: Path, word: str, value: Any, rule: Rule | None) -> None:
    config = {"model_type": "x", "num_hidden_layers": 4, "novelty": value}
    assert view(tmp_path / "m", config, **{word: ("novelty",)}).rule(("novelty",)) is rule
    assert view(tmp_path / "m", config).rule(("novelty",)) is None


def test_a_recipe_knows_better_than_the_table(tmp_path: Path) -> None:
    """`[1, 3]` from 1 or from 0; and what it says to ignore has no rule, in this node or in every one."""
    config = {"model_type": "x", "text_config": {"num_hidden_layers": 4, "mlp_only_layers": [1, 3], "layer_types": list("abcd")}}
    names = ("language_model.model.layers.:4",)
    plain = view(tmp_path / "m", config, *names)
    assert plain.rule(("mlp_only_layers",)) is INDICES and plain.rule(("layer_types",)) is LIST
    told = view(tmp_path / "m", config, *names, numbers=("text_config.mlp_only_layers",), ignore=("layer_types",))
    assert told.rule(("mlp_only_layers",)) is INDICES_FROM_1 and told.rule(("layer_types",)) is None
    other = view(tmp_path / "m", config, *names, numbers=("vision_config.mlp_only_layers",), ignore=("vision_config.layer_types",))
    assert other.rule(("mlp_only_layers",)) is INDICES and other.rule(("layer_types",)) is LIST


# Sides


PAIR = {"model_type": "led", "encoder_layers": 4, "decoder_layers": 4, "attention_window": [1, 2, 3, 4], "decoder_layer_types": [1] * 4}


@pytest.mark.parametrize(
    ("stack", "of_other"),
    [
        ("encoder", {"attention_window": False, "encoder_x": False, "decoder_x": True, "x": False, "num_decoder_heads": True}),
        ("decoder", {"attention_window": True, "encoder_x": True, "decoder_x": False, "x": False, "num_decoder_heads": False}),
    ],
)
def test_keys_of_the_other_side(tmp_path: Path, stack: str, of_other: dict[str, bool]) -> None:
    found = view(tmp_path / "m", PAIR, "led.encoder.layers.:4", "led.decoder.layers.:4", stack=stack)
    assert {key: found.of_other_side(key) for key in of_other} == of_other
    assert (found.rule(("attention_window",)) is LIST) == (stack == "encoder")
    assert SIDES == {"attention_window": "encoder"}


def test_a_model_without_sides_has_no_other_side(tmp_path: Path) -> None:
    """Longformer's windows are those of its only stack."""
    found = view(tmp_path / "m", {"model_type": "longformer", "num_hidden_layers": 4, "attention_window": [1, 2, 3, 4]})
    assert found.stack.name == "text"
    assert not found.of_other_side("attention_window") and found.rule(("attention_window",)) is LIST
    assert not found.of_other_side("decoder_x") and not found.of_other_side("encoder_x")


# Values that speak of prediction layers too


@pytest.mark.parametrize(
    ("value", "entries"),
    [(list("abcd"), list("abcd")), (list("abcdef"), list("abcdef")), (list("abcde"), None), (list("abc"), None)],
)
def test_a_list_may_be_padded_as_far_as_is_declared(tmp_path: Path, value: list[str], entries: list[str] | None) -> None:
    found = view(tmp_path / "m", {"model_type": "x", "num_hidden_layers": 4, "num_nextn_predict_layers": 2, "layer_types": value})
    assert found.extra == 2
    assert found.entries(LIST, ("layer_types",)) == entries
    plain = view(tmp_path / "p", {"model_type": "x", "num_hidden_layers": 4, "layer_types": value})
    assert plain.extra == 0 and plain.entries(LIST, ("layer_types",)) == (value if len(value) == 4 else None)


def test_indices_of_prediction_layers(tmp_path: Path) -> None:
    config = {"model_type": "x", "num_hidden_layers": 4, "num_nextn_predict_layers": 2, "moe_layers": [1, 5], "full_attn_layers": [6, 7]}
    found = view(tmp_path / "m", config)
    assert found.entries(INDICES, ("moe_layers",)) == [False, True, False, False, False, True]
    assert found.entries(INDICES_FROM_1, ("full_attn_layers",)) == [False] * 4, "7 names no layer, so 6 is beyond the depth too"


# Properties


STACK = LayerStack("model.layers.", 6, DepthKey((), "num_hidden_layers", 6))
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text("ab0,1", max_size=8),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text("01ab", max_size=2), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(RULES)), ANY, st.integers(0, 3))
def test_whatever_stands_there_gives_one_entry_a_layer_or_none(key: str, value: Any, extra: int) -> None:
    """Configs are hostile: no value is an error."""
    config = {"num_hidden_layers": 6, "num_nextn_predict_layers": extra, key: value}
    for rule in RULES[key]:
        entries = decode(rule, value, config, STACK)
        assert entries is None or len(entries) in (6, 6 + extra)


@given(ANY)
def test_any_node_can_be_looked_at(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    found = of(
        {"num_hidden_layers": 4, "model_type": "x", "anything": value, "layer_types": value, "linear_attn_config": value}, tmp_path_factory
    )
    assert all(path[0] in found.node and len(path) <= 2 for path in found.paths())
    assert all(found.rule(path) is None or found.entries(found.rule(path), path) is not None for path in found.paths())  # type: ignore[arg-type]
