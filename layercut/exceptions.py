"""Architectures whose layers know their place: one data row each, with the reason.

A cut that would load but compute something else is refused here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Order = Sequence[int]


def _tail(order: Order, depth: int) -> bool:
    """Every layer keeps its index: only layers at the end were cut."""
    return list(order) == list(range(len(order)))


def _first(order: Order, depth: int) -> bool:
    """Layer 0, and no other, stands where layer 0 stood."""
    return order[0] == 0 and 0 not in order[1:]


def _last(order: Order, depth: int) -> bool:
    """The last layer, and no other, stands last."""
    return order[-1] == depth - 1 and depth - 1 not in order[:-1]


def _never(order: Order, depth: int) -> bool:
    return False


class Exceptional(NamedTuple):
    """A group of model types, the condition on their config, the orders that stay exact, and why others do not."""

    model_types: tuple[str, ...]
    exact: Callable[[Order, int], bool]
    reason: str
    when: Callable[[Mapping[str, Any]], bool] = lambda config: True


EXCEPTIONS = (
    Exceptional(
        ("gpt2", "gpt-sw3"),
        _tail,
        "scale_attn_by_inverse_layer_idx divides attention by the layer index",
        lambda config: bool(config.get("scale_attn_by_inverse_layer_idx")),
    ),
    Exceptional(("diffllama",), _tail, "lambda_init depends on the layer index"),
    Exceptional(("minimax",), _tail, "the decay of lightning attention depends on the layer index"),
    Exceptional(("beam",), _tail, "the residual scale depends on the layer index"),
    Exceptional(("minicpm3",), lambda order, depth: len(order) == depth, "the residual scale is scale_depth / sqrt(number of layers)"),
    Exceptional(("rwkv",), _first, "the first layer has an extra norm (pre_ln)"),
    Exceptional(("modernbert", "modernbert-decoder"), _first, "the first layer has no attention norm"),
    Exceptional(("zaya",), _tail, "router state is passed from layer to layer"),
    Exceptional(("gpt_neox_japanese",), _last, "only the last layer has an attention bias"),
    Exceptional(
        ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        _never,
        "per-layer embedding tables and shared keys and values are not cut yet",
    ),
    Exceptional(("zamba", "zamba2"), _never, "shared blocks are stored under one layer"),
    Exceptional(
        ("qwen4_exp", "qwen4_exp_text", "mistral_large4", "mistral_large4_text"),
        _tail,
        "layers read tables or keys and values of other layers",
    ),
    Exceptional(
        ("dory", "hrm_text", "inkling2", "inkling2_loop", "albert", "perceiver", "funnel", "blt", "reformer"),
        _never,
        "layers are looped, paired or shared",
    ),
)


def objection(config: Mapping[str, Any], order: Order, depth: int) -> str | None:
    """Why a stack with these source indices would compute something else than its layers did, or None."""
    kind = config.get("model_type")
    for row in EXCEPTIONS:
        if kind in row.model_types and row.when(config) and not row.exact(order, depth):
            return f"model type {kind}: {row.reason}, so this stack would load but compute something else"
    return None
