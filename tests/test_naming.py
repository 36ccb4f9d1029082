from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from layercut.anatomy import DepthKey, LayerStack, Sibling
from layercut.architecture import find_stack
from layercut.checkpoint import open_checkpoint
from layercut.naming import Module, Naming, Spot, ancestors, is_pattern, is_regex

KEY = DepthKey((), "num_hidden_layers", 4)
LLAMA = LayerStack("model.layers.", 4, KEY)
HRM = LayerStack("model.H_module.layers.", 4, KEY, siblings=(Sibling("model.L_module.layers."),))
IDEFICS = LayerStack("model.layers.", 4, KEY, siblings=(Sibling("model.gated_cross_attn_layers.", 2),))


def names(stack: LayerStack, *rests: str) -> list[str]:
    """Tensors of a stack: every list has the same modules."""
    strides = (1, *(sibling.stride for sibling in stack.siblings))
    lists = zip(stack.prefixes, strides, strict=True)
    return [f"{prefix}{at}.{rest}" for prefix, stride in lists for at in range(stack.depth // stride) for rest in rests]


@pytest.mark.parametrize(
    ("stack", "text", "layer"),
    [
        (LLAMA, "model.layers.3.mlp", 3),
        (LLAMA, "layers.3", 3),
        (LLAMA, "model.language_model.layers.12.mlp", 12),
        (LLAMA, "transformer.layers.1", 1),
        (LLAMA, "vision_tower.layers.1", None),
        (LLAMA, "model.sublayers.1", None),
        (LLAMA, "model.layers.1a", None),
        (LLAMA, "model.layers.*.mlp", None),
        (LLAMA, "re:model\\.layers\\.2\\.mlp", 2),
        (LLAMA, "re:.*layers.2.*", None),  # 20 too
        (LLAMA, "re:.*vision.*layers\\.2\\.mlp", None),
        (LLAMA, "model.layers.(1|2).mlp", None),
        (LLAMA, "lm_head", None),
        (HRM, "model.H_module.layers.2.attn", 2),
        (HRM, "model.L_module.layers.3", 3),
        (HRM, "L_module.layers.1.mlp", 1),
        (HRM, "model.M_module.layers.1", None),
        (IDEFICS, "model.gated_cross_attn_layers.1.mlp", 2),
        (IDEFICS, "model.layers.1.mlp", 1),
    ],
)
def test_the_layer_that_a_name_means(stack: LayerStack, text: str, layer: int | None) -> None:
    spot = Naming(stack, names(stack, "mlp.weight")).spot(text)
    assert (None if spot is None else spot.layer) == layer
    if spot is not None and text.isascii():
        assert int(text[spot.start : spot.stop]) * spot.stride == layer


def test_a_spot_says_where_its_number_stands() -> None:
    assert Naming(IDEFICS).spot("model.gated_cross_attn_layers.1.mlp") == Spot(30, 31, 2, 2)
    assert Naming(LLAMA).spot("model.layers.10.mlp") == Spot(13, 15, 10)


@pytest.mark.parametrize("text", ["model.layers.1.mlp.layers.2.w", "re:model\\.layers\\.1\\.layers\\.2"])
def test_the_first_number_counts_unless_the_name_is_a_pattern(text: str) -> None:
    nested = LayerStack("model.layers.", 4, KEY)
    found = Naming(nested).spot(text)
    assert found is not None and found.layer == 1


def test_a_wildcard_before_the_name_may_mean_another_stack() -> None:
    own = names(LLAMA, "mlp.weight")
    assert Naming(LLAMA, own).spot("*.layers.1.mlp") == Spot(9, 10, 1)
    assert Naming(LLAMA, [*own, *(f"vision.layers.{at}.mlp.weight" for at in range(3))]).spot("*.layers.1.mlp") is None
    assert Naming(HRM, names(HRM, "mlp.weight")).spot("*.layers.1.mlp") == Spot(9, 10, 1)  # a sibling is no other stack


def test_modules_of_a_layer_by_their_list() -> None:
    own = [*names(HRM, "attn.o_proj.weight", "attn.o_proj.weight.absmax"), "model.embed_tokens.weight"]
    naming = Naming(HRM, own)
    assert naming.modules[0] == [Module(number, rest) for number in (0, 1) for rest in ("", "attn", "attn.o_proj")]
    assert list(naming.modules) == [0, 1, 2, 3]
    assert naming.outside == ["model", "model.embed_tokens"]
    strided = Naming(IDEFICS, names(IDEFICS, "w"))
    assert strided.modules == {0: [Module(0, ""), Module(1, "")], 1: [Module(0, "")], 2: [Module(0, ""), Module(1, "")], 3: [Module(0, "")]}


@pytest.mark.parametrize(
    ("stack", "prefixes"),
    [
        (LLAMA, [("model.layers.",), ("layers.",), ("model.language_model.layers.",), ("language_model.model.layers.",)]),
        (
            HRM,
            [
                ("model.H_module.layers.", "model.L_module.layers."),
                ("H_module.layers.", "L_module.layers."),
                ("model.language_model.H_module.layers.", "model.language_model.L_module.layers."),
                ("language_model.model.H_module.layers.", "language_model.model.L_module.layers."),
            ],
        ),
    ],
)
def test_prefixes_of_the_file_come_before_those_of_loaders(stack: LayerStack, prefixes: Any) -> None:
    assert Naming(stack).prefixes == prefixes


@given(st.integers(0, 3), st.integers(0, 11), st.sampled_from([LLAMA, HRM, IDEFICS]))
def test_a_name_that_is_made_is_read_again(layer: int, index: int, stack: LayerStack) -> None:
    naming = Naming(stack, names(stack, "mlp.weight"))
    for prefixes in naming.prefixes:
        for module in naming.modules[layer]:
            stride = naming.lists[module.number].stride
            spot = naming.spot(naming.named(prefixes, module, index))
            assert spot is not None and (spot.layer, spot.stride) == (index // stride * stride, stride)


@pytest.mark.parametrize(
    ("text", "touches"),
    [("re:.*layers\\.[0-3]\\..*", True), ("re:.*layers\\.\\d+\\..*", False), ("model.layers.(?:1|2)", True), ("re:.*experts\\.1", False)],
)
def test_patterns_with_a_number_where_a_layer_stands(text: str, touches: bool) -> None:
    assert Naming(LLAMA).touches(text) is touches


def test_a_stack_without_a_name_before_its_numbers_has_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {f"{layer}.w": ("U8", (4,), b"....") for layer in range(3)}, {"num_hidden_layers": 3})
    checkpoint = open_checkpoint(tmp_path)
    naming = Naming(find_stack(checkpoint), checkpoint.tensors)
    assert naming.spot("layers.0.w") is None and naming.spot("0.w") is None and not naming.touches("re:layers.[01]")


def test_lists_of_single_tensors_have_no_modules() -> None:
    bare = LayerStack("model.llm.layers.", 4, KEY, siblings=(Sibling("model.llm.attn_res.queries.", first=1, bare=True),))
    naming = Naming(bare, [*names(LLAMA, "w"), *(f"model.llm.layers.{at}.w" for at in range(4)), "model.llm.attn_res.queries.0"])
    assert [listed.prefix for listed in naming.lists] == ["model.llm.layers."]
    assert naming.modules[1] == [Module(0, "")]


def test_what_is_a_pattern() -> None:
    assert [is_regex(text) for text in ("a.b", "re:a", "a.*", "a|b", "a\\.b")] == [False, True, False, True, True]
    assert [is_pattern(text) for text in ("a.b", "re:a", "a.*", "a?", "a[1]")] == [False, True, True, True, True]


def test_the_modules_that_a_tensor_is_part_of() -> None:
    assert list(ancestors("a.b.weight.absmax")) == ["a", "a.b"]
    assert list(ancestors("a.b.bias")) == ["a", "a.b"]
    assert list(ancestors("bias")) == []
