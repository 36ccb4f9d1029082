from __future__ import annotations

from typing import Any

import pytest

from layercut.exceptions import EXCEPTIONS, objection

DEPTH = 6
WHOLE = [0, 1, 2, 3, 4, 5]
TAIL, HEAD, MIDDLE, DOUBLED = [0, 1, 2, 3], [1, 2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5]


def says(kind: str, reason: str) -> str:
    return f"model type {kind}: {reason}, so this stack would load but compute something else"


ON = {"scale_attn_by_inverse_layer_idx": True}
LAMBDA = "lambda_init depends on the layer index"
TABLES = "per-layer embedding tables and shared keys and values are not cut yet"
LOOPED = "layers are looped, paired or shared"


@pytest.mark.parametrize(
    ("kind", "config", "order", "reason"),
    [
        ("gpt2", ON, TAIL, None),
        ("gpt2", ON, MIDDLE, "scale_attn_by_inverse_layer_idx divides attention by the layer index"),
        ("gpt2", {}, MIDDLE, None),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": False}, HEAD, None),
        ("gpt-sw3", ON, HEAD, "scale_attn_by_inverse_layer_idx divides attention by the layer index"),
        ("diffllama", {}, TAIL, None),
        ("diffllama", {}, [0, 1, 2, 3, 4, 5, 5], LAMBDA),
        ("diffllama", {}, HEAD, LAMBDA),
        ("minimax", {}, HEAD, "the decay of lightning attention depends on the layer index"),
        ("minimax", {}, TAIL, None),
        ("beam", {}, MIDDLE, "the residual scale depends on the layer index"),
        ("minicpm3", {}, TAIL, "the residual scale is scale_depth / sqrt(number of layers)"),
        ("minicpm3", {}, [1, 0, 2, 3, 4, 5], None),
        ("rwkv", {}, HEAD, "the first layer has an extra norm (pre_ln)"),
        ("rwkv", {}, MIDDLE, None),
        ("rwkv", {}, [0, 0, 1], "the first layer has an extra norm (pre_ln)"),
        ("modernbert", {}, HEAD, "the first layer has no attention norm"),
        ("modernbert-decoder", {}, HEAD, "the first layer has no attention norm"),
        ("modernbert-decoder", {}, DOUBLED, None),
        ("zaya", {}, MIDDLE, "router state is passed from layer to layer"),
        ("gpt_neox_japanese", {}, TAIL, "only the last layer has an attention bias"),
        ("gpt_neox_japanese", {}, HEAD, None),
        ("gpt_neox_japanese", {}, [4, 5, 5], "only the last layer has an attention bias"),
        ("gemma3n_text", {}, TAIL, TABLES),
        ("gemma4", {}, MIDDLE, TABLES),
        ("zamba2", {}, TAIL, "shared blocks are stored under one layer"),
        ("qwen4_exp", {}, HEAD, "layers read tables or keys and values of other layers"),
        ("mistral_large4_text", {}, TAIL, None),
        ("albert", {}, TAIL, LOOPED),
        ("blt", {}, TAIL, LOOPED),
        ("llama", {}, HEAD, None),
        ("llama", ON, DOUBLED, None),
        ("gemma3_text", {}, MIDDLE, None),
        (None, {}, HEAD, None),
    ],
)
def test_objections(kind: str | None, config: dict[str, Any], order: list[int], reason: str | None) -> None:
    found = objection({"model_type": kind, **config}, order, DEPTH)
    assert found == (None if reason is None or kind is None else says(kind, reason))


def test_a_type_stands_in_one_row_only() -> None:
    kinds = [kind for row in EXCEPTIONS for kind in row.model_types]
    assert len(kinds) == len(set(kinds))


def test_every_row_has_an_order_that_it_refuses() -> None:
    for row in EXCEPTIONS:
        assert any(not row.exact(order, DEPTH) for order in (TAIL, HEAD, MIDDLE, DOUBLED)), row.model_types


def test_index_dependent_types_accept_the_whole_stack() -> None:
    for row in EXCEPTIONS:
        if row.exact(TAIL, DEPTH) or row.exact(HEAD, DEPTH):
            assert row.exact(WHOLE, DEPTH), row.model_types


def test_an_unhashable_model_type_is_no_type() -> None:
    assert objection({"model_type": ["gpt2"]}, HEAD, DEPTH) is None
    assert objection({}, HEAD, DEPTH) is None
