"""Anatomy: numbered lists, config nodes and depth keys are what their names say, and stacks name their tensors both ways."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_architecture import expand

from layercut.anatomy import (
    DEPTH_KEYS,
    MTP_KEYS,
    NUMBER,
    TOWER_DEPTH_KEYS,
    DepthKey,
    LayerStack,
    Place,
    Sibling,
    config_node,
    config_nodes,
    depth_keys,
    is_index,
    lengths,
    mtp_layers,
    numbered_prefixes,
)
from layercut.declarations import Architecture

# Numbered lists


def test_numbered_prefixes() -> None:
    names = expand(["a.{2}.b.{3}.w", "a.{2}.c", "x.{3}.w", "y.1.w", "z.0.w", "z.2.w", "plain", "q.{2}"])
    assert numbered_prefixes(names) == {"a.": 2, "x.": 3}
    assert numbered_prefixes([]) == {}
    assert numbered_prefixes(["0.weight", "1.weight"]) == {"": 2}


def test_a_broken_outer_list_does_not_hide_the_list_inside() -> None:
    assert numbered_prefixes(expand(["a.1.b.{2}.w"])) == {"a.1.b.": 2}


def test_the_outermost_list_counts_however_deep_it_stands() -> None:
    assert numbered_prefixes(expand(["deep.model.layers.{3}.experts.{3}.{2}.w", "deep.model.layers.{3}.norm.w"])) == {
        "deep.model.layers.": 3
    }


def test_lists_side_by_side_are_all_there_in_their_order() -> None:
    names = expand(["b.{2}.w", "a.{2}.w", "a.{2}.c.{3}.w", "c.0.w"])
    assert numbered_prefixes(names) == {"b.": 2, "a.": 2, "c.": 1}
    assert list(numbered_prefixes(names)) == ["b.", "a.", "c."]


def test_a_list_is_not_inside_one_whose_name_it_begins_with() -> None:
    assert numbered_prefixes(expand(["a.{2}.w", "a.b.{2}.w", "aa.{2}.w", "axb.{2}.w"])) == {"a.": 2, "a.b.": 2, "aa.": 2, "axb.": 2}
    assert numbered_prefixes(expand(["a.b.{2}.w", "aXb.5.c.{2}.w"])) == {"a.b.": 2, "aXb.5.c.": 2}, "a dot is a dot"


@given(st.integers(1, 12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(count: int, parts: list[str], chance: Any) -> None:
    head = "".join(f"{part}." for part in parts)
    names = [f"{head}{index}.{rest}" for index in range(count) for rest in ("w", "experts.0.w", "experts.1.w")]
    chance.shuffle(names)
    assert numbered_prefixes(names) == {head: count}
    assert numbered_prefixes([name for name in names if not name.startswith(f"{head}0.")]).get(head) is None


@pytest.mark.parametrize(
    ("part", "index"),
    [("0", True), ("12", True), ("007", True), ("999999", True), ("1000000", False), ("", False), ("-1", False), ("1.", False),
     ("²", False), ("٣", False), ("x1", False), (" 1", False)],
)  # fmt: skip
def test_indices(part: str, index: bool) -> None:
    import re

    assert is_index(part) is index
    assert (re.fullmatch(NUMBER, part) is not None) is index, "the pattern and the function agree"


# Stacks and their tensors


STACK = LayerStack("model.layers.", 4, DepthKey((), "num_hidden_layers", 4))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.experts.2.w1.weight", Place("model.layers.", 3, "mlp.experts.2.w1.weight")),
        ("model.layers.12.w", Place("model.layers.", 12, "w")),
        ("model.layers.3.a\nb", Place("model.layers.", 3, "a\nb")),
        ("model.layers.3", None),
        ("model.layers.3.", None),
        ("model.layers.x.w", None),
        ("model_layers.3.w", None),
        ("modelXlayers.3.w", None),
        ("xmodel.layers.3.w", None),
        ("language_model.model.layers.3.w", None),
        ("model.norm.weight", None),
    ],
)
def test_places(name: str, place: Place | None) -> None:
    assert STACK.place(name) == place
    if place is not None:
        assert STACK.rename(place, place.layer) == name
        assert STACK.rename(place, 7) == f"model.layers.7.{place.rest}"


LISTS = LayerStack("model.layers.", 8, DepthKey((), "num_hidden_layers", 8), siblings=(Sibling("model.norms."), Sibling("model.cross.", 4)))


def test_lists_beside_the_layers() -> None:
    """The second cross layer belongs to layer 4."""
    assert LISTS.prefixes == ("model.layers.", "model.norms.", "model.cross.")
    assert LISTS.place("model.norms.3.w") == Place("model.norms.", 3, "w")
    assert LISTS.place("model.cross.1.w") == Place("model.cross.", 4, "w")
    assert LISTS.rename(Place("model.norms.", 3, "w"), 2) == "model.norms.2.w"
    assert LISTS.rename(Place("model.cross.", 4, "w"), 0) == "model.cross.0.w"
    assert STACK.prefixes == ("model.layers.",)


@given(st.sampled_from(LISTS.prefixes), st.integers(0, 99), st.text("ab.0", min_size=1, max_size=6))
def test_a_place_has_its_name(prefix: str, number: int, rest: str) -> None:
    name = f"{prefix}{number}.{rest}"
    place = LISTS.place(name)
    assert place is not None and (place.prefix, place.rest) == (prefix, rest)
    assert place.layer == number * (4 if prefix == "model.cross." else 1)
    assert LISTS.rename(place, place.layer) == name


def test_the_node_of_a_stack_is_that_of_its_key() -> None:
    key = DepthKey(("text_config", "inner_config"), "n_layer", 2)
    assert LayerStack("h.", 2, key).node == ("text_config", "inner_config")
    assert (str(key), str(DepthKey((), "n_layer", 2))) == ("text_config.inner_config.n_layer", "n_layer")


# Nodes and keys


def test_depth_keys_look_into_nested_configs() -> None:
    config = {
        "num_hidden_layers": 4, "n_layer": 0, "layers": [1], "other": {"num_layers": 9}, "a.b_config": {"n_layers": 9},
        "text_config": {"num_hidden_layers": 6, "deep_config": {"n_layers": 2}}, "decoder": {"num_layers": 3}, "num_blocks": False,
    }  # fmt: skip
    found = list(depth_keys(config))
    assert found == [
        DepthKey((), "num_hidden_layers", 4),
        DepthKey(("text_config",), "num_hidden_layers", 6),
        DepthKey(("text_config", "deep_config"), "n_layers", 2),
        DepthKey(("decoder",), "num_layers", 3),
    ]
    assert [str(key) for key in found] == [
        "num_hidden_layers", "text_config.num_hidden_layers", "text_config.deep_config.n_layers", "decoder.num_layers",
    ]  # fmt: skip
    assert config_node(config, ("text_config", "deep_config")) == {"n_layers": 2}
    assert config_node(config, ()) is config


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("text_config", True), ("encoder", True), ("decoder", True), ("text_encoder", True), ("_config", True),
        ("config", False), ("text_configs", False), ("rope_scaling", False), ("a.b_config", False), ("encoders", False),
    ],
)  # fmt: skip
def test_which_members_are_nodes(name: str, node: bool) -> None:
    config = {name: {"n_layer": 3}}
    assert list(config_nodes(config)) == [((), config), *([((name,), {"n_layer": 3})] if node else [])]


def test_nodes_are_looked_for_only_so_deep() -> None:
    """A config nested without end is no reason to go on without end."""
    config: dict[str, Any] = {"n_layer": 9}
    for _ in range(10):
        config = {"a_config": config, "n_layer": 1}
    assert [len(node) for node, _ in config_nodes(config)] == [0, 1, 2, 3, 4]
    assert len(list(depth_keys(config))) == 5
    assert list(config_nodes({"a_config": [1], "b_config": "x", "c_config": None})) == [
        ((), {"a_config": [1], "b_config": "x", "c_config": None})
    ]


@pytest.mark.parametrize("value", [0, -1, True, 4.0, "4", None, [4]])
def test_odd_values_state_no_depth(value: Any) -> None:
    assert list(depth_keys({"num_hidden_layers": value})) == []


def test_towers_have_keys_of_their_own() -> None:
    config = {"depth": 4, "vision_config": {"depth": 5, "n_blocks": 6}, "text_config": {"depth": 7}}
    assert list(depth_keys(config)) == [DepthKey(("vision_config",), "depth", 5), DepthKey(("vision_config",), "n_blocks", 6)]
    assert not set(TOWER_DEPTH_KEYS) & set(DEPTH_KEYS)


def test_keys_that_a_recipe_declares() -> None:
    config = {"floors": 4, "text_config": {"floors": 5, "stairs": 5}, "stairs": 6}
    declared = Architecture(depth_keys=("floors", "text_config.stairs"))
    assert [str(key) for key in depth_keys(config, (), declared)] == ["floors", "text_config.floors", "text_config.stairs"]
    assert list(depth_keys(config)) == []


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"layers_block_type": ["a", "b"]}, [DepthKey((), "layers_block_type", 2, "length")]),
        ({"hybrid_override_pattern": "ME*"}, [DepthKey((), "hybrid_override_pattern", 3, "length")]),
        ({"hybrid_override_pattern": "ME*", "num_hidden_layers": 3}, []),
        ({"layers_block_type": []}, []),
        ({"layers_block_type": 3}, []),
        ({"n_layer": "3", "layers_block_type": ["a"]}, [DepthKey((), "layers_block_type", 1, "length")]),
        ({"n_layer": 3, "text_config": {"layers_block_type": ["a"]}}, [DepthKey(("text_config",), "layers_block_type", 1, "length")]),
    ],
)
def test_lists_that_are_the_depth_where_no_key_states_it(config: dict[str, Any], found: list[DepthKey]) -> None:
    assert list(lengths(config)) == found


@pytest.mark.parametrize(
    ("node", "count"),
    [
        ({}, 0),
        ({"num_nextn_predict_layers": 2}, 2),
        ({"num_mtp_layers": 3}, 3),
        ({"num_nextn_predict_layers": 1, "num_mtp_layers": 3}, 1),
        ({"num_nextn_predict_layers": "1", "num_mtp_layers": 3}, 3),
        ({"num_nextn_predict_layers": -1}, 0),
        ({"num_nextn_predict_layers": True}, 0),
    ],
)
def test_layers_that_predict_further_tokens(node: dict[str, Any], count: int) -> None:
    assert mtp_layers(node) == count
    assert MTP_KEYS == ("num_nextn_predict_layers", "num_mtp_layers")
