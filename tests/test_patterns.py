"""Patterns: values that spell kinds of layers together are decoded, and spelled again for a new stack, or not at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.anatomy import DepthKey, LayerStack
from layercut.patterns import PATTERNS, SCALARS

ATTENTION, EXPERTS, QWEN, ERNIE, NLLB_ENCODER, NLLB_DECODER, SWITCH_ENCODER, SWITCH_DECODER, EVOLLA, DORY, INKLING = PATTERNS
JAMBA = {"attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1}


def stack(depth: int = 6, name: str = "text", key: str = "num_hidden_layers") -> LayerStack:
    return LayerStack("model.layers.", depth, DepthKey((), key, depth), name=name)


def follow(pattern: Any, node: dict[str, Any], depth: int, *order: int) -> Any:
    """The changes for a new stack, after a check that they say what they should."""
    entries = pattern.decode(node, depth)
    wanted = [entries[index] for index in order]
    changes = pattern.encode(wanted, node)
    if changes is not None:
        assert pattern.decode({**node, **changes}, len(order)) == wanted
        assert set(changes) <= set(pattern.keys)
    return changes


@pytest.mark.parametrize(
    ("pattern", "node", "depth", "order", "changes"),
    [
        (ATTENTION, JAMBA, 8, (4, 5, 6, 7), {}),
        (ATTENTION, JAMBA, 8, (2, 3, 4, 5, 6, 7), {"attn_layer_offset": 0}),
        (ATTENTION, JAMBA, 8, (0, 2, 3, 4, 5, 6, 7), {"attn_layer_offset": 1}),
        (ATTENTION, JAMBA, 8, (2, 6, 7), None),
        (EXPERTS, JAMBA, 8, (2, 3, 4, 5, 6, 7), {}),
        (EXPERTS, JAMBA, 8, (1, 2, 3, 4), {"expert_layer_offset": 0}),
        (EXPERTS, JAMBA, 8, (0, 2, 4), {"expert_layer_period": 4, "expert_layer_offset": 3}),
        (QWEN, {"mlp_only_layers": [1, 4], "decoder_sparse_step": 1}, 6, (1, 2, 3, 4, 5), {"mlp_only_layers": [0, 3]}),
        (QWEN, {"mlp_only_layers": [], "decoder_sparse_step": 2}, 6, (0, 1, 4, 5), {}),
        (QWEN, {"mlp_only_layers": [], "decoder_sparse_step": 2}, 4, (1, 2, 3), {"decoder_sparse_step": 1, "mlp_only_layers": [1]}),
        (
            ERNIE,
            {"moe_layer_start_index": 2, "moe_layer_end_index": -1, "moe_layer_interval": 1},
            6,
            (1, 2, 3),
            {"moe_layer_start_index": 1},
        ),
        (ERNIE, {"moe_layer_start_index": 2, "moe_layer_interval": 1}, 6, (2, 0, 3), None),
        (NLLB_DECODER, {"model_type": "nllb-moe", "decoder_sparse_step": 2}, 4, (0, 1), {}),
        (NLLB_DECODER, {"model_type": "nllb-moe", "decoder_sparse_step": 2}, 4, (1, 2, 3), None),
        (ERNIE, {"moe_layer_start_index": [1, 2], "moe_layer_interval": 1}, 6, (0, 2, 3), {"moe_layer_start_index": [1, 1]}),
        (ERNIE, {"moe_layer_start_index": [1, 3], "moe_layer_interval": 2}, 6, (1, 2, 3), None),
        (
            ERNIE,
            {"moe_layer_start_index": [1, 1], "moe_layer_interval": [2, 1]},
            6,
            (1, 3, 5),
            {"moe_layer_start_index": [0, 0], "moe_layer_interval": [1, 1]},
        ),
        (INKLING, {"n_layers_per_attn_res_block": 2}, 6, (0, 1, 4, 5), {}),
        (INKLING, {"n_layers_per_attn_res_block": 2}, 6, (0, 1, 3, 5), {"n_layers_per_attn_res_block": 4}),
        (INKLING, {"n_layers_per_attn_res_block": 2}, 6, (0, 2, 3), None),
        (EVOLLA, {"aligner_num_add_layers": 2}, 6, (0, 1, 2), {"aligner_num_add_layers": 1}),
    ],
)
def test_spelled_again(pattern: Any, node: dict[str, Any], depth: int, order: tuple[int, ...], changes: Any) -> None:
    assert follow(pattern, node, depth, *order) == changes


@given(st.lists(st.integers(0, 7), max_size=4, unique=True), st.integers(1, 4), st.lists(st.integers(0, 7), min_size=1, max_size=10))
def test_qwens_spelling_can_say_any_order(listed: list[int], step: int, order: list[int]) -> None:
    assert follow(QWEN, {"mlp_only_layers": listed, "decoder_sparse_step": step}, 8, *order) is not None


@given(st.integers(1, 6), st.data())
def test_whole_periods_can_go(period: int, data: st.DataObject) -> None:
    node = {"attn_layer_period": period, "attn_layer_offset": data.draw(st.integers(0, period - 1))}
    assert follow(ATTENTION, node, 4 * period, *range(period), *range(2 * period, 4 * period)) == {}


@pytest.mark.parametrize("number", range(len(PATTERNS)))
def test_an_unchanged_stack_changes_nothing(number: int) -> None:
    nodes = [JAMBA, JAMBA, {"mlp_only_layers": [0]}, {"moe_layer_start_index": 1}]
    sparse = {"encoder_sparse_step": 2, "decoder_sparse_step": 2}
    dory = {"num_hidden_layers": 8, "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2}
    node = [*nodes, *([sparse] * 4), {"aligner_num_add_layers": 2}, dory, {"n_layers_per_attn_res_block": 3}][number]
    assert follow(PATTERNS[number], dict(node), 8, *range(8)) == {}


@pytest.mark.parametrize("value", ["2", None, -1, 1.5, [1], True])
def test_odd_values_are_no_pattern(value: Any) -> None:
    found = ATTENTION.decode({"attn_layer_period": value, "attn_layer_offset": 1}, 8)
    assert found is None if value is not None else found == [index % 8 == 1 for index in range(8)]  # null is the default of the class


def test_patterns_are_for_their_own_models() -> None:
    assert ATTENTION.applies(JAMBA, stack())
    assert not ATTENTION.applies({**JAMBA, "layers_block_type": ["attention"]}, stack())
    assert not ATTENTION.applies({}, stack())
    assert NLLB_ENCODER.applies({"model_type": "nllb-moe"}, stack(name="encoder"))
    assert not NLLB_ENCODER.applies({"model_type": "nllb-moe"}, stack(name="decoder"))
    assert SWITCH_DECODER.applies({"model_type": "switch_transformers"}, stack(name="decoder"))
    assert QWEN.applies({"model_type": "qwen3_moe", "decoder_sparse_step": 1}, stack())
    assert not QWEN.applies({"model_type": "other", "decoder_sparse_step": 1}, stack())


@pytest.mark.parametrize("period", [7, 100, 10**18])
def test_an_offset_from_the_depth_on_means_no_layer(period: int) -> None:
    """The spelling is found without trying as many offsets as a config may name."""
    jamba = {"attn_layer_period": period, "attn_layer_offset": 4}
    assert follow(ATTENTION, jamba, 6, 0, 1, 2, 3, 5) == {"attn_layer_offset": 5}
    assert follow(ATTENTION, jamba, 6, 4, 0, 1, 2) == {"attn_layer_offset": 0}


def test_numbers_that_follow_the_depth() -> None:
    residual, twice, cycles, groups, neomme = SCALARS
    assert residual.applies({"scale_depth": 1.4}, stack()) and not residual.applies({"scale_depth": 1.4, "mup_denominator": 32}, stack())
    assert residual.follow({"scale_depth": 1.4}, 6, 5) == 1.4 * math.sqrt(5 / 6)
    assert not any(residual.applies({"scale_depth": value}, stack()) for value in (10**400, -1e308, "1.4", None))
    assert twice.applies({"num_hidden_layers": 12}, stack(key="num_layers")) and not twice.applies({"num_hidden_layers": 12}, stack())
    assert twice.follow({}, 6, 5) == 10
    assert neomme.follow({}, 8, 5) == 0.25
    assert groups.applies({"num_hidden_groups": 6}, stack()) and groups.follow({}, 6, 5) == 5
    assert not groups.applies({"num_hidden_groups": 1}, stack())
    hrm = stack(key="num_layers_per_stack")
    assert cycles.applies({"num_hidden_layers": 48}, hrm) and cycles.follow({"num_hidden_layers": 48}, 6, 5) == 40
    assert not any(cycles.applies({"num_hidden_layers": value}, hrm) for value in (6, 47, None, "48"))
    assert not cycles.applies({"num_hidden_layers": 48}, stack())


@pytest.mark.parametrize(
    "counts",
    [(2, 3, 2), (9, None, 0), (-1, 7, 2), ("2", 4, 2), (2, 4.0, 2)],
)
def test_sections_that_do_not_fill_the_stack_are_no_pattern(counts: tuple[Any, Any, Any]) -> None:
    node = {"num_hidden_layers": 8, **dict(zip(DORY.keys, counts, strict=True))}
    assert DORY.decode(node, 8) is None
    assert DORY.decode({"num_hidden_layers": 7, "n_input_layers": 2, "n_output_layers": 2}, 8) is None


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4), st.integers(1, 2), st.data())
def test_any_cut_keeps_the_sections(first: int, looped: int, last: int, width: int, data: st.DataObject) -> None:
    depth = first + looped + last
    order = data.draw(st.lists(st.integers(0, max(depth - 1, 0)), min_size=1, unique=True).map(sorted)) if depth else []
    node = {"num_hidden_layers": width * depth, **dict(zip(DORY.keys, (width * first, width * looped, width * last), strict=True))}
    entries = DORY.decode(node, depth)
    if not depth:
        assert entries is None
        return
    assert entries is not None
    changes = DORY.encode([entries[index] for index in order], node)
    parts = [sum(first <= index < first + looped for index in order), sum(index < first for index in order)]
    wanted = dict(zip(DORY.keys, (width * parts[1], width * parts[0], width * (len(order) - sum(parts))), strict=True))
    assert changes == {key: value for key, value in wanted.items() if value != node[key]}
