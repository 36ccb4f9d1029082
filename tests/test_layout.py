from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut.architecture import Member, find_stack
from layercut.checkpoint import open_checkpoint
from layercut.errors import LayercutError, RefusedError
from layercut.header import ITEM_BITS
from layercut.layout import Layout, lay_out, split
from layercut.operations import OPERATIONS, apply_all
from layercut.plan import LeftOut, OutputFile, TensorCopy
from layercut.stack import LayerRef, Stack

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


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("model.norm.weight", True),
        ("lm_head.weight", True),
        ("transformer.ln_f.weight", True),
        ("ln_f.bias", True),
        ("model.final_layernorm.weight", True),
        ("gpt_neox.final_layer_norm.weight", True),
        ("model.decoder.final_layer_norm.weight", True),
        ("backbone.norm_f.weight", True),
        ("embed_out.weight", True),
        ("output.weight", True),
        ("score.weight", True),
        ("classifier.dense.weight", True),
        ("model.decoder.project_out.weight", True),
        ("language_model.lm_head.weight", True),
        ("model.embed_tokens.weight", False),
        ("transformer.wte.weight", False),
        ("transformer.wpe.weight", False),
        ("embeddings.word_embeddings.weight", False),
        ("embeddings.LayerNorm.weight", False),
        ("transformer.word_embeddings_layernorm.weight", False),
        ("model.rotary_emb.inv_freq", False),
        ("multi_modal_projector.linear_1.weight", False),
    ],
)
def test_what_stands_before_the_layers_and_what_behind(tmp_path: Path, name: str, behind: bool) -> None:
    source = member(tmp_path / "m", zeros({"model.layers.0.w": ("U8", (1,)), name: ("U8", (1,))}), 1)
    parts = split(source.checkpoint, source.stack)
    assert [tensor.name for tensor in parts.behind] == ([name] if behind else [])
    assert [tensor.name for tensor in parts.before] == ([] if behind else [name])
    assert names(lay_out({"m": source}, refs(0, 0), LARGE)) == (
        ["model.layers.0.w", "model.layers.1.w", name] if behind else [name, "model.layers.0.w", "model.layers.1.w"]
    )


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


def test_layers_that_are_left_out_are_named_with_their_reason(tmp_path: Path) -> None:
    shapes: Shapes = {f"model.layers.{n}.{part}": ("U8", (1,)) for n in range(4) for part in "ab"}
    source = member(tmp_path / "m", zeros({**shapes, "model.layers.4.eh_proj": ("U8", (1,))}), 4, num_nextn_predict_layers=1)
    assert source.stack.extra == 1
    layout = lay_out({"m": source}, refs(0, 2, 2), LARGE)
    assert layout.left_out == (
        LeftOut(model="m", what="layer 1 (2 tensors, model.layers.1.*)", reason=GONE),
        LeftOut(model="m", what="layer 3 (2 tensors, model.layers.3.*)", reason=GONE),
        LeftOut(model="m", what="layer 4 (1 tensor, model.layers.4.*)", reason=MTP),
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
        ("a", "model.norm.weight", "taken from 'b'"),
        ("a", "lm_head.weight", "taken from 'b'"),
        ("b", "layer 0", GONE),
        ("b", "model.embed_tokens.weight", "taken from 'a'"),
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

    def block(self, length: int, count: int, build: Any, metric: Any, verb: str) -> int:
        return self.start % count


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
    listed = {left.what.partition("(")[0].strip() for left in layout.left_out}
    for tensor in twelve.checkpoint.tensors.values():
        place = twelve.stack.place(tensor.name)
        in_output = (tensor.file, tensor.begin, tensor.end) in taken
        in_list = place is not None and f"layer {place.layer}" in listed
        assert in_output != in_list, tensor.name
    written = names(layout)
    assert len(written) == len(set(written)) == 3 + 2 * len(stack)
    for file in layout.files:
        for tensor in file.tensors:
            place = twelve.stack.place(tensor.name)
            if place is not None:
                assert content(twelve, tensor).startswith(f"m:{stack[place.layer].index}:{place.rest};".encode())
