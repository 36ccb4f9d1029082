"""Amends: what is done to the weights of layers whose arithmetic depends on their place, so that at another one they compute the same.

One data row for each group of model types, with the reason. What these types compute after a cut is then what their layers computed
before, whichever layers are left, repeated or moved; only weights that are not plain numbers, the quantised ones, cannot be changed so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from layercut.anatomy import Member, Place
from layercut.header import FLOATS
from layercut.quantization import is_quantized
from layercut.stack import LayerRef
from layercut.views import View


class Seat(NamedTuple):
    """A layer of a new stack, where it comes from: its number there, and the depth of its model."""

    number: int
    depth: int
    silent: bool = False
    """Whether it adds nothing."""


class Change(NamedTuple):
    """What is done to one tensor of a layer."""

    by: float
    """What it is multiplied by."""
    columns: int = 1
    """Of so many equal parts of every row the first is multiplied."""
    along: str | None = None
    """Tensor `k` of the layer: this one is moved along it until exp(tensor . k) is larger by `by`, in place of being multiplied."""

    @property
    def idle(self) -> bool:
        return self.by == (1.0 if self.along is None else 0.0)


Changes = Mapping[str, Change]
"""Changes of a layer, by the name of the tensor below the layer."""


def _inverse_index(order: Sequence[Seat]) -> list[Changes]:
    """Scores are divided by the index, from 1: the query is the first third of what a row of `c_attn` (Conv1D, [in, out]) gives."""
    factors = [(at + 1) / (seat.number + 1) for at, seat in enumerate(order)]
    third = ("attn.c_attn.weight", "attn.c_attn.bias")
    whole = ("crossattention.q_attn.weight", "crossattention.q_attn.bias")
    return [{**dict.fromkeys(third, Change(by, 3)), **dict.fromkeys(whole, Change(by))} for by in factors]


def _lambda_init(index: int) -> float:
    """Ye et al. 2024, Differential Transformer, section 2.1; transformers counts layers from 0."""
    return 0.8 - 0.6 * math.exp(-0.3 * index)


def _differential(order: Sequence[Seat]) -> list[Changes]:
    """lambda = exp(q1 . k1) - exp(q2 . k2) + lambda_init, and what attention gives is multiplied by 1 - lambda_init."""
    found: list[Changes] = []
    for at, seat in enumerate(order):
        old, new = _lambda_init(seat.number), _lambda_init(at)
        raised = Change(max(old - new, 0.0), along="self_attn.lambda_k1")
        lowered = Change(max(new - old, 0.0), along="self_attn.lambda_k2")
        by = Change((1 - old) / (1 - new))
        found.append({"self_attn.o_proj.weight": by, "self_attn.lambda_q1": raised, "self_attn.lambda_q2": lowered})
    return found


def _by_depth(order: Sequence[Seat]) -> list[Changes]:
    """What attention and MLP add is divided by sqrt(depth / 36)."""
    names = [f"{module}.{kind}" for module in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")]
    return [dict.fromkeys(names, Change(math.sqrt(len(order) / seat.depth))) for seat in order]


def _telescoped(order: Sequence[Seat]) -> list[Changes]:
    """The j-th addition, from 2, gives x / sqrt(j) + s * sqrt((j - 1) / j) for the stream s and a normed x.

    The stream is `scale` times what it was: its direction is all that norms hand on. So x, of which the norm holds the scale, follows.
    A layer that adds nothing hands the stream on, and only its scale changes.
    """
    found: list[Changes] = []
    scale = 1.0
    for at, seat in enumerate(order):
        made: dict[str, Change] = {}
        for place, name in ((2, "post_attention_layernorm.weight"), (3, "post_feedforward_layernorm.weight")):
            old, new = 2 * seat.number + place, 2 * at + place
            if seat.silent:
                scale *= math.sqrt((new - 1) / new)
                continue
            if old != new:
                scale *= math.sqrt((new - 1) * old / (new * (old - 1)))
            made[name] = Change(1.0 if (old, scale) == (new, 1.0) else scale * math.sqrt(new / old))
        found.append(made)
    return found


class Amends(NamedTuple):
    """A group of model types, why a layer of them depends on its place, and what makes up for it."""

    model_types: tuple[str, ...]
    reason: str
    changes: Callable[[Sequence[Seat]], list[Changes]]
    """What is done to every layer of a new stack."""
    must: tuple[str, ...]
    """Tensors that every layer has; of the others some may be missing."""
    when: Callable[[Mapping[str, Any]], bool] = lambda node: True
    """Whether the config is one of which this holds."""
    but: str = ""
    """Up to what the result is the same, beside rounding."""


AMENDS = (
    Amends(
        ("gpt2", "gpt-sw3", "imagegpt", "decision_transformer"),
        "scale_attn_by_inverse_layer_idx divides attention by the layer index",
        _inverse_index,
        ("attn.c_attn.weight",),
        lambda node: bool(node.get("scale_attn_by_inverse_layer_idx")),
    ),
    Amends(
        ("diffllama",),
        "lambda_init depends on the layer index",
        _differential,
        ("self_attn.o_proj.weight", *(f"self_attn.lambda_{name}" for name in ("q1", "k1", "q2", "k2"))),
    ),
    Amends(
        ("esmc",),
        "the residual is divided by sqrt(number of layers / 36)",
        _by_depth,
        ("self_attn.o_proj.weight", "mlp.down_proj.weight"),
    ),
    Amends(
        ("beam",),
        "what a layer adds is scaled by its index",
        _telescoped,
        ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"),
        but="the eps of norms, for the stream between the layers is scaled as a whole",
    ),
)


def row_of(member: Member) -> Amends | None:
    """The row of a model, or None when its layers compute the same at every place."""
    view = View(member)
    return next((row for row in AMENDS if view.kind in row.model_types and row.when(view.node)), None)


def changes(members: Mapping[str, Member], order: Sequence[LayerRef]) -> dict[int, Changes]:
    """What is to be done to the layers of a new stack, by position: nothing for layers that are where they were."""
    seats = [Seat(layer.index, members[layer.model].stack.depth, layer.identity) for layer in order]
    found: dict[int, Changes] = {}
    for alias in dict.fromkeys(layer.model for layer in order):
        row = row_of(members[alias])
        if row is None:
            continue
        for at, (layer, change) in enumerate(zip(order, row.changes(seats), strict=True)):
            if layer.model == alias:
                wanted = {name: one for name, one in change.items() if not one.idle}
                there = {name: one for name, one in wanted.items() if name in row.must or _dtype(members[alias], layer.index, name)}
                found.update({at: there} if there else {})
    return dict(sorted(found.items()))


def _dtype(member: Member, layer: int, name: str) -> str | None:
    """Dtype of a tensor of a layer, or None when the layer has none of that name."""
    whole = member.stack.rename(Place(member.stack.prefix, layer, name), layer)
    tensor = member.checkpoint.tensors.get(whole)
    return None if tensor is None else tensor.dtype


def hindrance(members: Mapping[str, Member], order: Sequence[LayerRef]) -> str | None:
    """Why the layers of a new stack cannot be changed as they would have to be, with the reason that they would; or None."""
    for alias in dict.fromkeys(order[at].model for at in changes(members, order)):
        member, row = members[alias], row_of(members[alias])
        lacking = _lacking(member, row.must if row is not None else ())
        if row is not None and lacking is not None:
            return f"{row.reason}, and {lacking}"
    return None


def _lacking(member: Member, must: Sequence[str]) -> str | None:
    """Why the weights of a model cannot make up for anything, or None."""
    if is_quantized(*member) and not all("norm" in name for name in must):  # no scheme packs the weights of norms
        return "quantised weights cannot make up for it"
    for name in must:
        odd = next((layer for layer in range(member.stack.depth) if _dtype(member, layer, name) not in FLOATS), None)
        if odd is not None:
            return f"layer {odd} has no {name} in floating point that could make up for it"
    return None


def told(members: Mapping[str, Member], order: Sequence[LayerRef], dtypes: Sequence[str]) -> list[str]:
    """Notes on what is done to the layers of a new stack, of which the changed tensors are written in these dtypes."""
    found = changes(members, order)
    rows = {alias: row_of(members[alias]) for alias in dict.fromkeys(order[place].model for place in found)}
    notes = []
    for row in AMENDS:
        at = [place for place in found if rows[order[place].model] == row]
        if at:
            names = [name.removesuffix(".weight").removesuffix(".bias") for place in at for name in found[place]]
            short = dict.fromkeys(name.rpartition(".")[2] for name in names)
            coarse = [dtype for dtype in dict.fromkeys(dtypes) if dtype not in ("F32", "F64")]
            end = "".join([f"; in {' and '.join(coarse)} this rounds" * bool(coarse), f"; exact up to {row.but}" * bool(row.but)])
            notes.append(f"{row.reason}: weights of {len(at)} layer{'s' * (len(at) > 1)} make up for it ({', '.join(short)}){end}")
    return notes
