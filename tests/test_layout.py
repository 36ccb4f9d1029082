from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.architecture import Member, find_stack
from layercut.checkpoint import open_checkpoint
from layercut.ends import find_ends
from layercut.errors import LayercutError, RefusedError
from layercut.header import ITEM_BITS
from layercut.layout import Cast, Layout, Layouter
from layercut.operations import OPERATIONS, Wish, apply_all
from layercut.plan import LeftOut, Map, OutputFile, Part, TensorCopy, TensorMade
from layercut.scalings import Groups
from layercut.shards import Grid
from layercut.stack import Block, Fold, LayerRef, Scaling, Share, Stack

LARGE = 10**9
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def member(folder: Path, tensors: Any, layers: int, shards: int = 1, **config: Any) -> Member:
    checkpoint = open_checkpoint(write_checkpoint(folder, tensors, {"num_hidden_layers": layers, **config}, shards))
    return Member(checkpoint, find_stack(checkpoint))


def zeros(shapes: Shapes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    sized = {}
    for name, (dtype, shape) in shapes.items():
        count = 1
        for side in shape:
            count *= side
        sized[name] = (dtype, shape, bytes(count * ITEM_BITS[dtype] // 8))
    return sized


def refs(*indices: int, model: str = "m") -> Stack:
    return tuple(LayerRef(model=model, index=index) for index in indices)


def lay_out(
    members: Mapping[str, Member], order: Stack, limit: int = LARGE, cast: Cast | None = None, scalings: tuple[Groups, Groups] = ((), ())
) -> Layout:
    """The layout of a stack between the ends of its first and its last model."""
    first, last = order[0].model, order[-1].model
    return Layouter(members, order, cast or Cast()).lay_out(find_ends(members, first, first, last), limit, scalings)


def names(layout: Layout) -> list[str]:
    return [tensor.name for file in layout.files for tensor in file.tensors]


def content(source: Member, tensor: TensorCopy) -> bytes:
    return (source.checkpoint.folder / tensor.file).read_bytes()[tensor.begin : tensor.end]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Member:
    """Twelve layers in three files; the bytes of every tensor say where it comes from."""
    return member(tmp_path_factory.mktemp("layout") / "m", byte_tensors(12), 12, shards=3)


def test_layers_are_renumbered_and_bytes_are_those_of_the_source(twelve: Member) -> None:
    layout = lay_out({"m": twelve}, refs(0, 5, 5, 11), LARGE)
    expected = [("model.embed_tokens.weight", "m:embed;")]
    for position, index in enumerate((0, 5, 5, 11)):
        for part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            expected.append((f"model.layers.{position}.{part}", f"m:{index}:{part};"))
    expected += [("model.norm.weight", "m:norm;"), ("lm_head.weight", "m:head;")]
    assert names(layout) == [name for name, _ in expected]
    for tensor, (_, origin) in zip(layout.files[0].tensors, expected, strict=True):
        assert content(twelve, tensor).startswith(origin.encode())
        assert tensor.end - tensor.begin == 64
        assert tensor.model == "m"


def test_layers_stand_in_the_order_of_numbers(twelve: Member) -> None:
    layout = lay_out({"m": twelve}, refs(*range(12)), LARGE)
    layers = [int(name.split(".")[2]) for name in names(layout) if ".layers." in name]
    assert layers == sorted(layers)
    assert layers[-1] == 11


def test_one_file(twelve: Member) -> None:
    layout = lay_out({"m": twelve}, refs(0, 1), LARGE)
    assert [file.name for file in layout.files] == ["model.safetensors"]
    assert layout.files[0].metadata == {"format": "pt"}
    assert layout.index_text is None


@pytest.mark.parametrize(
    ("limit", "counts"),
    [(7 * 64, [7]), (7 * 64 - 1, [6, 1]), (4 * 64, [4, 3]), (3 * 64 + 63, [3, 3, 1]), (64, [1] * 7), (1, [1] * 7)],
)
def test_files_are_filled_up_to_the_limit(twelve: Member, limit: int, counts: list[int]) -> None:
    layout = lay_out({"m": twelve}, refs(0, 1), limit)
    assert [len(file.tensors) for file in layout.files] == counts
    total = len(counts)
    expected = ["model.safetensors"] if total == 1 else [f"model-{n + 1:05d}-of-{total:05d}.safetensors" for n in range(total)]
    assert [file.name for file in layout.files] == expected


def test_a_tensor_above_the_limit_gets_a_file_of_its_own(tmp_path: Path) -> None:
    shapes: Shapes = {
        "model.embed_tokens.weight": ("U8", (10,)), "model.layers.0.big": ("U8", (1000,)), "model.layers.0.small": ("U8", (10,)),
        "model.layers.1.big": ("U8", (100,)), "model.layers.1.small": ("U8", (10,)), "model.norm.weight": ("U8", (10,)),
    }  # fmt: skip
    layout = lay_out({"m": member(tmp_path / "m", zeros(shapes), 2)}, refs(0, 1), 110)
    assert [[tensor.name for tensor in file.tensors] for file in layout.files] == [
        ["model.embed_tokens.weight"],
        ["model.layers.0.big"],
        ["model.layers.0.small", "model.layers.1.big"],
        ["model.layers.1.small", "model.norm.weight"],
    ]


def test_the_index_lists_every_tensor_and_the_size(twelve: Member) -> None:
    layout = lay_out({"m": twelve}, refs(0, 0, 3), 5 * 64)
    assert layout.index_text is not None and layout.index_text.endswith("}\n")
    index = json.loads(layout.index_text)
    assert list(index) == ["metadata", "weight_map"]
    assert index["metadata"] == {"total_size": 9 * 64}
    assert index["weight_map"] == {tensor.name: file.name for file in layout.files for tensor in file.tensors}
    assert list(index["weight_map"]) == sorted(names(layout))
    assert layout.index_text.startswith('{\n  "metadata": {\n    "total_size": 576\n  },\n  "weight_map": {\n    "lm_head.weight": ')


def test_metadata_is_carried_over(tmp_path: Path, twelve: Member) -> None:
    other = Member(twelve.checkpoint.__class__(**{**vars(twelve.checkpoint), "metadata": {"format": "pt", "made": "by me"}}), twelve.stack)
    assert lay_out({"m": other}, refs(0), LARGE).files[0].metadata == {"format": "pt", "made": "by me"}
    bare = Member(twelve.checkpoint.__class__(**{**vars(twelve.checkpoint), "metadata": {}}), twelve.stack)
    assert lay_out({"m": bare}, refs(0), LARGE).files[0].metadata == {"format": "pt"}


def aligned(file: OutputFile) -> bool:
    position = 0
    for tensor in file.tensors:
        if position % max(1, ITEM_BITS[tensor.dtype] // 8):
            return False
        position += tensor.end - tensor.begin
    return True


def test_natural_order_where_it_is_aligned(tmp_path: Path) -> None:
    shapes: Shapes = {"e": ("F32", (3,)), "h.0.a": ("BF16", (2,)), "h.0.b": ("F32", (1,)), "h.1.a": ("BF16", (2,)), "h.1.b": ("F32", (1,))}
    layout = lay_out({"m": member(tmp_path / "m", zeros(shapes), 2)}, refs(1, 0), LARGE)
    assert names(layout) == ["e", "h.0.a", "h.0.b", "h.1.a", "h.1.b"]
    assert aligned(layout.files[0])


def test_the_widest_types_come_first_where_natural_order_is_not_aligned(tmp_path: Path) -> None:
    shapes: Shapes = {"e": ("U8", (3,)), "h.0.a": ("BF16", (3,)), "h.0.b": ("F32", (1,)), "h.1.a": ("BF16", (3,)), "h.1.b": ("F32", (1,))}
    layout = lay_out({"m": member(tmp_path / "m", zeros(shapes), 2)}, refs(0, 1), LARGE)
    assert names(layout) == ["h.0.b", "h.1.b", "h.0.a", "h.1.a", "e"]
    assert aligned(layout.files[0])


dtypes = st.sampled_from(["U8", "BOOL", "F8_E4M3", "F16", "BF16", "F32", "I64", "F64", "C64"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(dtypes, st.integers(0, 5)), min_size=1, max_size=8), st.integers(1, 200))
def test_every_file_is_aligned_without_holes(tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, int]], limit: int) -> None:
    shapes: Shapes = {f"h.0.t{number}": (dtype, (size,)) for number, (dtype, size) in enumerate(kinds)}
    source = member(tmp_path_factory.getbasetemp() / "aligned", zeros(shapes), 1)
    layout = lay_out({"m": source}, refs(0, 0), limit)
    assert all(aligned(file) for file in layout.files)
    assert sorted(names(layout)) == sorted(name.replace("h.0.", f"h.{n}.") for name in shapes for n in (0, 1))
    for file in layout.files:
        assert len(file.tensors) == 1 or sum(tensor.end - tensor.begin for tensor in file.tensors) <= limit


def test_layers_that_differ_in_their_tensors(tmp_path: Path) -> None:
    shapes: Shapes = {"h.0.a": ("U8", (1,)), "h.0.b": ("U8", (2,)), "h.1.a": ("U8", (3,)), "h.1.experts.0.w": ("U8", (4,))}
    source = member(tmp_path / "m", zeros(shapes), 2)
    layout = lay_out({"m": source}, refs(1, 0), LARGE)
    assert [(t.name, t.end - t.begin) for t in layout.files[0].tensors] == [
        ("h.0.a", 3),
        ("h.0.experts.0.w", 4),
        ("h.1.a", 1),
        ("h.1.b", 2),
    ]


MTP = "multi-token-prediction layer: the library reads it at one fixed index only"
GONE = "not in the stack that the recipe asks for"
ENDS = "embeddings and head come from the ends of the stack"


def test_layers_that_are_left_out_are_named_with_their_reason(tmp_path: Path) -> None:
    shapes: Shapes = {f"model.layers.{n}.{part}": ("U8", (1,)) for n in range(4) for part in "ab"}
    source = member(tmp_path / "m", zeros({**shapes, "model.layers.4.eh_proj": ("U8", (1,))}), 4, num_nextn_predict_layers=1)
    assert source.stack.extra == 1
    layout = lay_out({"m": source}, refs(0, 2, 2), LARGE)
    assert layout.left_out == (
        LeftOut(model="m", what="layer 1 (2 tensors, model.layers.*)", reason=GONE),
        LeftOut(model="m", what="layer 3 (2 tensors, model.layers.*)", reason=GONE),
        LeftOut(model="m", what="layer 4 (1 tensor, model.layers.*)", reason=MTP),
    )
    assert lay_out({"m": source}, refs(3), LARGE).left_out == (
        LeftOut(model="m", what="layers 0 to 2 (6 tensors, model.layers.*)", reason=GONE),
        LeftOut(model="m", what="layer 4 (1 tensor, model.layers.*)", reason=MTP),
    )
    assert "model.layers.4.eh_proj" not in names(layout)
    whole = lay_out({"m": source}, refs(0, 1, 2, 3), LARGE)
    assert whole.left_out == ()
    assert names(whole)[-1] == "model.layers.4.eh_proj"
    assert lay_out({"m": source}, refs(0, 1, 2, 3, 3), LARGE).left_out[-1].reason == MTP


def test_two_models_give_what_stands_before_and_behind(tmp_path: Path) -> None:
    one = member(tmp_path / "a", byte_tensors(2, "a"), 2)
    two = member(tmp_path / "b", byte_tensors(2, "b"), 2)
    layout = lay_out({"a": one, "b": two}, (*refs(0, model="a"), *refs(1, model="b")), LARGE)
    origins = {tensor.name: tensor.model for tensor in layout.files[0].tensors}
    assert origins["model.embed_tokens.weight"] == "a"
    assert origins["model.norm.weight"] == origins["lm_head.weight"] == "b"
    assert [(left.model, left.what.partition(" (")[0], left.reason) for left in layout.left_out] == [
        ("a", "layer 1", GONE),
        ("a", "model.norm.weight", ENDS),
        ("a", "lm_head.weight", ENDS),
        ("b", "layer 0", GONE),
        ("b", "model.embed_tokens.weight", ENDS),
    ]


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    source = member(tmp_path / "m", zeros({"h.0.w": ("U8", (1,)), "h.00.w": ("U8", (1,)), "h.1.w": ("U8", (1,))}), 2)
    with pytest.raises(RefusedError) as caught:
        lay_out({"m": source}, refs(0, 1), LARGE)
    assert str(caught.value) == "h.0.w: the output would hold this tensor twice"


class Site:
    """Takes the start that was drawn."""

    def __init__(self, start: int) -> None:
        self.start = start

    def error(self, message: str, *path: str | int, hint: str | None = None) -> LayercutError:
        return LayercutError(message, hint=hint)

    def choose(self, wish: Wish) -> tuple[Block, ...]:
        count, depth = wish.budget["layers"], len(wish.stack)
        if count >= depth:
            raise self.error("too many")
        return (Block(self.start % (depth - count), self.start % (depth - count) + count),)

    def tensors(self, layer: LayerRef) -> tuple[str, ...]:
        return (f"model.layers.{layer.index}.self_attn.o_proj.weight",)

    outputs = tensors


steps = st.lists(
    st.tuples(
        st.sampled_from(sorted(set(OPERATIONS) & {"prune", "keep", "duplicate"})),
        st.one_of(st.integers(1, 4), st.lists(st.integers(-12, 11), min_size=1, max_size=4, unique_by=lambda n: n % 12)),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(1, 2000))
def test_every_tensor_of_the_source_is_in_the_output_or_listed(twelve: Member, steps: Sequence[tuple[str, Any, int]], limit: int) -> None:
    stack = refs(*range(12))
    for name, wanted, start in steps:
        fields = {"at": wanted} if name == "keep" or isinstance(wanted, list) else {"layers": wanted}
        try:
            stack = apply_all(stack, [(OPERATIONS[name].model_validate(fields), Site(start))])
        except LayercutError:
            continue
    layout = lay_out({"m": twelve}, stack, limit)
    taken = {(tensor.file, tensor.begin, tensor.end) for file in layout.files for tensor in file.tensors}
    listed: set[int] = set()
    for left in layout.left_out:
        first, _, last = left.what.partition(" (")[0].removeprefix("layers ").removeprefix("layer ").partition(" to ")
        listed |= set(range(int(first), int(last or first) + 1))
    for tensor in twelve.checkpoint.tensors.values():
        place = twelve.stack.place(tensor.name)
        in_output = (tensor.file, tensor.begin, tensor.end) in taken
        in_list = place is not None and place.layer in listed
        assert in_output != in_list, tensor.name
    written = names(layout)
    assert len(written) == len(set(written)) == 3 + 2 * len(stack)
    for file in layout.files:
        for tensor in file.tensors:
            place = twelve.stack.place(tensor.name)
            if place is not None:
                assert content(twelve, tensor).startswith(f"m:{stack[place.layer].index}:{place.rest};".encode())


# Arithmetic


def numbers(layers: int = 2, dtype: str = "BF16") -> Any:
    """Floating-point layers with an integer buffer, and ends."""
    shapes: Shapes = {"model.embed_tokens.weight": (dtype, (4, 2))}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (dtype, (2, 2))
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (dtype, (2, 3))
        shapes[f"model.layers.{layer}.position_ids"] = ("I64", (2,))
    return zeros({**shapes, "model.norm.weight": (dtype, (2,)), "lm_head.weight": (dtype, (4, 2))})


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Member:
    return member(tmp_path_factory.mktemp("numbers") / "m", numbers(), 2)


def entry(layout: Layout, name: str) -> TensorCopy | TensorMade:
    return next(tensor for file in layout.files for tensor in file.tensors if tensor.name == name)


def made(layout: Layout) -> list[str]:
    return [tensor.name for file in layout.files for tensor in file.tensors if isinstance(tensor, TensorMade)]


def scaled(index: int, *groups: tuple[tuple[str, float], ...]) -> LayerRef:
    return LayerRef(model="m", index=index, scalings=tuple(tuple(Scaling(tensors=t, by=by) for t, by in group) for group in groups))


UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
INTS = ["model.layers.0.position_ids", "model.layers.1.position_ids"]


@pytest.mark.parametrize(
    ("cast", "dtype", "compute"),
    [
        (Cast("F32"), "F32", "F32"),
        (Cast("F16"), "F16", "F16"),
        (Cast("F32", "BF16"), "BF16", "F32"),
        (Cast(None, "F16"), "F16", None),
        (Cast("F64", "F32"), "F32", "F64"),
        (Cast("BF16", "F16"), "F16", None),
    ],
)
def test_a_cast_makes_every_floating_point_tensor_and_no_other(cast: Cast, dtype: str, compute: str | None, bf16: Member) -> None:
    layout = lay_out({"m": bf16}, refs(1, 0), cast=cast)
    assert [name for name in names(layout) if name not in made(layout)] == INTS
    for name in made(layout):
        tensor = entry(layout, name)
        assert isinstance(tensor, TensorMade)
        assert (tensor.dtype, tensor.compute, tensor.factors, len(tensor.parts)) == (dtype, compute, (), 1)
    source = bf16.checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    part = Part(model="m", file=source.file, begin=source.begin, end=source.end, dtype="BF16", weight=1)
    assert entry(layout, UP) == TensorMade(name=UP, dtype=dtype, shape=(2, 2), parts=(part,), compute=compute)


@pytest.mark.parametrize("cast", [Cast(), Cast("BF16"), Cast(None, "BF16"), Cast("BF16", "BF16")])
def test_a_cast_to_what_it_is_already_copies(cast: Cast, bf16: Member) -> None:
    assert made(lay_out({"m": bf16}, refs(1, 0), cast=cast)) == []


def test_tensors_of_other_dtypes_are_cast_each_by_itself(tmp_path: Path) -> None:
    shapes: Shapes = {
        "h.0.a": ("F32", (2,)),
        "h.0.b": ("BF16", (2,)),
        "h.0.c": ("F8_E4M3", (4,)),
        "h.0.d": ("U8", (4,)),
        "h.0.e": ("F64", (1,)),
    }
    layout = lay_out({"m": member(tmp_path / "m", zeros(shapes), 1)}, refs(0), cast=Cast("BF16"))
    assert sorted(made(layout)) == ["h.0.a", "h.0.e"]
    assert {tensor.name: tensor.dtype for file in layout.files for tensor in file.tensors} == {
        "h.0.a": "BF16", "h.0.b": "BF16", "h.0.c": "F8_E4M3", "h.0.d": "U8", "h.0.e": "BF16",
    }  # fmt: skip


def test_factors_make_the_tensors_that_they_name(bf16: Member) -> None:
    order = (scaled(1, (("*.up_proj.weight", 0.5),), (("*.mlp.*", 3), ("*", 9)), (("*.position_ids", 1),)), LayerRef(model="m", index=0))
    with pytest.raises(RefusedError) as caught:
        lay_out({"m": bf16}, order)
    assert str(caught.value) == "model.layers.1.position_ids: arithmetic on I64 is refused: quantised weights are not what they say"
    layout = lay_out({"m": bf16}, (scaled(1, (("*.up_proj.weight", 0.5),), (("*.mlp.*", 3),)), LayerRef(model="m", index=0)))
    assert made(layout) == [UP, DOWN]
    up, down = entry(layout, UP), entry(layout, DOWN)
    assert isinstance(up, TensorMade) and isinstance(down, TensorMade)
    assert (up.factors, up.dtype, up.compute) == ((0.5, 3.0), "BF16", None)
    assert down.factors == (3.0,)
    assert [part.begin for part in up.parts] == [bf16.checkpoint.tensors["model.layers.1.mlp.up_proj.weight"].begin]


def test_factors_of_one_copy_and_zeros_read_nothing(bf16: Member) -> None:
    assert made(lay_out({"m": bf16}, (scaled(0, (("*", 1),)), LayerRef(model="m", index=1)))) == []
    layout = lay_out({"m": bf16}, (scaled(0, (("*.up_proj.*", 7),), (("*.up_proj.*", 0),)), LayerRef(model="m", index=1)), cast=Cast("F32"))
    assert entry(layout, UP) == TensorMade(name=UP, dtype="F32", shape=(2, 2), parts=(), factors=())


def test_factors_go_by_the_name_in_the_source(bf16: Member) -> None:
    layout = lay_out({"m": bf16}, (LayerRef(model="m", index=1), scaled(0, (("model.layers.0.mlp.up*", 2),))))
    assert made(layout) == ["model.layers.1.mlp.up_proj.weight"]


def test_factors_of_the_ends(bf16: Member) -> None:
    by = (((Scaling(tensors="*embed*", by=2),),), ((Scaling(tensors="*norm*", by=0.5), Scaling(tensors="*", by=3)),))
    layout = lay_out({"m": bf16}, refs(0, 1), scalings=by)
    found = {name: tensor.factors for name in made(layout) if isinstance(tensor := entry(layout, name), TensorMade)}
    assert found == {"model.embed_tokens.weight": (2.0,), "model.norm.weight": (0.5,), "lm_head.weight": (3.0,)}


def test_averages_list_their_parts_in_the_order_of_the_recipe(bf16: Member) -> None:
    shares = (Share(model="m", index=1, weight=0.75), Share(model="m", index=0, weight=0.25))
    merged = LayerRef(model="m", index=0, span=2, shares=shares)
    with pytest.raises(RefusedError, match=r"^model\.layers\.1\.position_ids: arithmetic on I64 is refused"):
        lay_out({"m": bf16}, (merged,))


def test_averages(tmp_path: Path) -> None:
    shapes: Shapes = {f"model.layers.{layer}.{name}": ("F32", (2,)) for layer in range(3) for name in ("a", "b")}
    source = member(tmp_path / "m", zeros(shapes), 3)
    shares = (Share(model="m", index=2, weight=0.75), Share(model="m", index=0, weight=0.25))
    merged = LayerRef(model="m", index=0, shares=shares, scalings=((Scaling(tensors="model.layers.0.a", by=2),),))
    layout = lay_out({"m": source}, (merged, LayerRef(model="m", index=1)))
    assert names(layout) == ["model.layers.0.a", "model.layers.0.b", "model.layers.1.a", "model.layers.1.b"]
    made_a, made_b = (entry(layout, f"model.layers.0.{name}") for name in "ab")
    assert isinstance(made_a, TensorMade) and isinstance(made_b, TensorMade)
    tensors = source.checkpoint.tensors
    assert [(part.begin, part.weight) for part in made_b.parts] == [
        (tensors["model.layers.2.b"].begin, 0.75),
        (tensors["model.layers.0.b"].begin, 0.25),
    ]
    assert made_b.factors == ()
    assert made_a.factors == (2.0,)  # named as in the layer that it stands for, whichever was written first
    assert layout.left_out == ()  # all three layers reach the output


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"h.1.a": ("F32", (3,)), "h.1.b": ("F32", (2,))}, "h.0.a: tensors of different kinds cannot be averaged: F32 [2] and F32 [3]"),
        ({"h.1.a": ("BF16", (2,)), "h.1.b": ("F32", (2,))}, "h.0.a: tensors of different kinds cannot be averaged: BF16 [2] and F32 [2]"),
        ({"h.1.a": ("F32", (2,))}, "b: layers cannot be averaged when only some of them have a tensor"),
        (
            {"h.1.a": ("F32", (2,)), "h.1.b": ("F32", (2,)), "h.1.c": ("F32", (2,))},
            "c: layers cannot be averaged when only some of them have a tensor",
        ),
    ],
)
def test_unlike_layers_are_not_averaged(second: Shapes, message: str, tmp_path: Path) -> None:
    source = member(tmp_path / "m", zeros({"h.0.a": ("F32", (2,)), "h.0.b": ("F32", (2,)), **second}), 2)
    shares = (Share(model="m", index=0, weight=0.5), Share(model="m", index=1, weight=0.5))
    with pytest.raises(RefusedError) as caught:
        lay_out({"m": source}, (LayerRef(model="m", index=0, span=2, shares=shares),))
    assert str(caught.value) == message


def test_a_head_that_is_written_out_takes_the_factors_of_its_source_name(tmp_path: Path) -> None:
    tied = {name: data for name, data in numbers().items() if name != "lm_head.weight" and "position" not in name}
    members = {"a": member(tmp_path / "a", numbers(), 2), "b": member(tmp_path / "b", tied, 2, tie_word_embeddings=True)}
    order = (*refs(0, model="a"), *refs(1, model="b"))
    layout = lay_out(members, order, scalings=((), ((Scaling(tensors="*embed_tokens*", by=2),),)))
    head = entry(layout, "lm_head.weight")
    assert isinstance(head, TensorMade) and head.factors == (2.0,)
    assert head.parts[0].model == "b" and head.parts[0].begin == members["b"].checkpoint.tensors["model.embed_tokens.weight"].begin


def test_runs_that_have_to_be_in_step_move_the_bounds_of_files(tmp_path: Path) -> None:
    shapes: Shapes = {"h.0.w": ("BF16", (5004,)), "h.1.w": ("BF16", (5004,)), "norm.weight": ("BF16", (8,))}
    source = member(tmp_path / "m", zeros(shapes), 2)
    ends = find_ends({"m": source}, "m", "m", "m")
    plain = Layouter({"m": source}, refs(0, 0, 1)).lay_out(ends, LARGE)
    laid = Layouter({"m": source}, refs(0, 0, 1), grids={"m": Grid(512, 4 * 512)}).lay_out(ends, LARGE)
    assert [tensor for file in laid.files for tensor in file.tensors] == list(plain.files[0].tensors)
    assert [len(file.tensors) for file in laid.files] == [1, 3]
    assert (plain.files[0].header_size, plain.index_text) == (None, None)
    for file in laid.files:
        assert isinstance(file.tensors[0], TensorCopy) and file.header_size is not None
        assert (file.header_size - file.tensors[0].begin) % 512 == 0
    assert laid.index_text is not None
    assert json.loads(laid.index_text)["weight_map"]["h.1.w"] == "model-00002-of-00002.safetensors"
    assert laid.left_out == plain.left_out


SHA = "a" * 64
PARTS = {"down.weight": (4, 6), "down.bias": (4,), "up": (6, 4)}
MLP: Shapes = {
    **{f"h.{index}.{name}": ("F32", shape) for index in range(2) for name, shape in PARTS.items()},
    "norm.weight": ("F32", (4,)),
}


def folded(index: int, module: str = "down", size: int = 4, columns: bool = False, **more: Any) -> LayerRef:
    fold = Fold(sha256=SHA, size=size, module=module, columns=columns, tokens=1, ridge=1, explained=1)
    return LayerRef(model="m", index=index, folds=(fold,), **more)


def test_maps_go_into_the_weight_and_bias_of_one_module(tmp_path: Path) -> None:
    source = member(tmp_path / "m", zeros(MLP), 2)
    layout = lay_out({"m": source}, (folded(0), *refs(1)))
    maps = {tensor.name: tensor.maps for file in layout.files for tensor in file.tensors if isinstance(tensor, TensorMade)}
    assert maps == {
        "h.0.down.weight": (Map(sha256=SHA, size=4, columns=False),),
        "h.0.down.bias": (Map(sha256=SHA, size=4, columns=True),),
    }
    assert layout.left_out == (), "all layers are there"


def test_maps_come_after_factors_and_casts_and_zeros_stay_zeros(tmp_path: Path) -> None:
    source = member(tmp_path / "m", zeros(MLP), 2)
    halved = folded(1, scalings=((Scaling(tensors="*.down.weight", by=0.5), Scaling(tensors="*.bias", by=0)),))
    layout = lay_out({"m": source}, (*refs(0), halved), cast=Cast(write="BF16"))
    weight, bias = entry(layout, "h.1.down.weight"), entry(layout, "h.1.down.bias")
    assert isinstance(weight, TensorMade) and isinstance(bias, TensorMade)
    assert (weight.dtype, weight.factors, len(weight.maps)) == ("BF16", (0.5,), 1)
    assert (bias.parts, bias.maps) == ((), ())


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (folded(0, "gone"), "layer 0 of m has no gone of its own: no map can be folded into it"),
        (folded(0, size=6), "h.0.down.weight: no map of size 6 can be folded into shape [4, 6]"),
        (folded(0, columns=True), "h.0.down.weight: no map of size 4 can be folded into shape [4, 6]"),
    ],
)
def test_maps_that_fit_nowhere(layer: LayerRef, message: str, tmp_path: Path) -> None:
    source = member(tmp_path / "m", zeros(MLP), 2)
    with pytest.raises(RefusedError) as caught:
        lay_out({"m": source}, (layer, *refs(1)))
    assert str(caught.value) == message


def test_maps_go_into_no_quantised_weight(tmp_path: Path) -> None:
    source = member(tmp_path / "m", zeros({"h.0.down.weight": ("I8", (4, 6)), "h.1.down.weight": ("I8", (4, 6))}), 2)
    with pytest.raises(RefusedError, match="arithmetic on I8 is refused"):
        lay_out({"m": source}, (folded(0), *refs(1)))
