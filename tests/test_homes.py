"""Homes: weights that one layer keeps for others stand, in a new stack, where its class looks for them, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from layercut.anatomy import Member
from layercut.api import run_recipe
from layercut.architecture import find_stack
from layercut.checkpoint import open_checkpoint
from layercut.errors import RefusedError
from layercut.homes import HYBRID, LAST, Added, Home, homes, is_shared
from layercut.recipe import Recipe
from layercut.stack import LayerRef
from layercut.verify import verify

BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
DENSE = "attention.dense_bias"


def write(folder: Path, config: dict[str, Any], prefix: str, layers: int, extra: dict[int, Sequence[str]]) -> Path:
    """A model whose bytes say which layer they come from; some layers have more tensors than the others."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {"embed_tokens.weight": ("F32", (1,), b"embd")}
    for layer in range(layers):
        for rest in ("w", *extra.get(layer, ())):
            tensors[f"{prefix}{layer}.{rest}"] = ("F32", (1,), bytes([layer, *rest.encode()[-3:]]).ljust(4, b"."))
    return write_checkpoint(folder, tensors, config)


def member(folder: Path, *model: Any) -> Member:
    checkpoint = open_checkpoint(write(folder, *model))
    return Member(checkpoint, find_stack(checkpoint))


def order(*indices: int, model: str = "m") -> list[LayerRef]:
    return [LayerRef(model=model, index=index) for index in indices]


def told(found: dict[int, Home]) -> dict[int, tuple[list[str], list[str]]]:
    """For every position what stays behind, and what comes from where; a zero with a 0 before it."""
    return {
        at: (sorted(home.gone), [f"{'0 ' * one.zero}{one.rest} < {one.tensor.name}" for one in home.added]) for at, home in found.items()
    }


T5 = ({"model_type": "umt5_x", "num_layers": 4}, "decoder.block.", 4, {0: [BIAS]})
RWKV = ({"model_type": "rwkv", "num_hidden_layers": 3}, "rwkv.blocks.", 3, {0: ["pre_ln.weight", "pre_ln.bias"]})
L = "linear_attention"
ZAMBA = (
    {"model_type": "zamba", "num_hidden_layers": 8, "layers_block_type": [L, L, "hybrid", L, L, "hybrid", L, "hybrid"]},
    "model.layers.", 8, {2: ["shared_transf.q", "shared_transf.k"]},
)  # fmt: skip
ADAPTERS = [f"shared_transformer.mlp.up_adapter_list.{rank}.0.weight" for rank in range(4)]
TWO_BLOCKS = (
    {"model_type": "zamba2", "num_hidden_layers": 6, "layers_block_type": [L, "hybrid", "hybrid", "hybrid", "hybrid", L]},
    "model.layers.", 6,
    {1: ["shared_transformer.q", ADAPTERS[0], ADAPTERS[2]], 2: ["shared_transformer.q", ADAPTERS[1], ADAPTERS[3]]},
)  # fmt: skip
JAPANESE = ({"model_type": "gpt_neox_japanese", "num_hidden_layers": 4}, "gpt_neox_japanese.layers.", 4, {3: [DENSE]})


@pytest.mark.parametrize(
    ("model", "indices", "expected"),
    [
        # the first layer has the bias, whichever it is
        (T5, [1, 2, 3], {0: ([], [f"{BIAS} < decoder.block.0.{BIAS}"])}),
        (T5, [3, 0, 1], {0: ([], [f"{BIAS} < decoder.block.0.{BIAS}"]), 1: ([BIAS], [])}),
        (T5, [0, 0], {0: ([BIAS], [f"{BIAS} < decoder.block.0.{BIAS}"]), 1: ([BIAS], [])}),
        (RWKV, [2, 1], {0: ([], [f"pre_ln.{part} < rwkv.blocks.0.pre_ln.{part}" for part in ("weight", "bias")])}),
        # the first hybrid layer keeps the block, and only hybrid layers do
        (ZAMBA, [0, 1, 3, 4, 5, 6, 7], {4: ([], [f"shared_transf.{part} < model.layers.2.shared_transf.{part}" for part in "qk"])}),
        (ZAMBA, [0, 1, 3], {}),
        # two blocks take turns; every hybrid layer has an adapter of its own, by its new rank
        (
            TWO_BLOCKS, [0, 3, 4, 5],
            {
                1: ([], ["shared_transformer.q < model.layers.1.shared_transformer.q", f"{ADAPTERS[0]} < model.layers.1.{ADAPTERS[2]}"]),
                2: ([], ["shared_transformer.q < model.layers.2.shared_transformer.q", f"{ADAPTERS[1]} < model.layers.2.{ADAPTERS[3]}"]),
            },
        ),
        # only the last layer has the bias: a new one gets zeros
        (JAPANESE, [0, 1, 2], {2: ([], [f"0 {DENSE} < gpt_neox_japanese.layers.3.{DENSE}"])}),
        (JAPANESE, [0, 1, 3], {}),
        (JAPANESE, [0, 3, 1], {1: ([DENSE], []), 2: ([], [f"0 {DENSE} < gpt_neox_japanese.layers.3.{DENSE}"])}),
        (JAPANESE, [0, 3, 3], {1: ([DENSE], [])}),
    ],
)  # fmt: skip
def test_where_the_weights_go(model: Any, indices: list[int], expected: dict[int, Any], tmp_path: Path) -> None:
    assert told(homes({"m": member(tmp_path / "m", *model)}, order(*indices))) == expected


def test_a_repeated_block_has_new_ranks(tmp_path: Path) -> None:
    found = told(homes({"m": member(tmp_path / "m", *TWO_BLOCKS)}, order(0, 1, 2, 1, 2, 3, 4, 5)))
    assert list(found) == [1, 2, 3, 4]
    assert [name.partition(" < ")[0].split(".")[3] for name in found[1][1][1:]] == ["0", "2", "4"]
    assert [name.partition(" < ")[2].split(".")[6] for name in found[1][1][1:]] == ["0", "0", "2"], "copies of layer 1 have its adapter"
    assert [name.partition(" < ")[0].split(".")[3] for name in found[2][1][1:]] == ["1", "3", "5"]
    assert found[3] == ([ADAPTERS[0], ADAPTERS[2], "shared_transformer.q"], []), "what moved does not stay as well"


@pytest.mark.parametrize("model", [T5, RWKV, ZAMBA, TWO_BLOCKS, JAPANESE])
def test_an_unchanged_stack_keeps_its_weights(model: Any, tmp_path: Path) -> None:
    """Each is added where it was taken away, so that nothing changes."""
    found = homes({"m": member(tmp_path / "m", *model)}, order(*range(model[2])))
    for at, home in found.items():
        assert sorted(one.rest for one in home.added) == sorted(home.gone)
        assert [one.tensor.name for one in home.added] == [f"{model[1]}{at}.{one.rest}" for one in home.added]


def test_every_layer_that_has_its_own_shares_nothing(tmp_path: Path) -> None:
    own = member(tmp_path / "m", *T5[:3], {layer: [BIAS] for layer in range(4)})
    assert homes({"m": own}, order(1, 3)) == {}
    assert homes({"m": member(tmp_path / "none", *T5[:3], {})}, order(1, 3)) == {}


def test_layers_that_are_not_hybrid_do_not_share(tmp_path: Path) -> None:
    assert HYBRID == ("hybrid", "g")
    letters = {"model_type": "zamba2", "num_hidden_layers": 3, "layers_block_type": ["m", "g", "g"]}
    found = homes({"m": member(tmp_path / "m", letters, "model.layers.", 3, {1: ["shared_transformer.q"]})}, order(0, 2))
    assert told(found) == {1: ([], ["shared_transformer.q < model.layers.1.shared_transformer.q"])}


@pytest.mark.parametrize(
    ("model", "indices", "message"),
    [
        (TWO_BLOCKS, [0, 2, 3, 4, 5], "layer 2 would use another of the 2 shared blocks: remove such layers in groups of 2"),
        (TWO_BLOCKS, [0, 1, 3, 5], "layer 3 would use another of the 2 shared blocks: remove such layers in groups of 2"),
        ((*T5[:3], {1: [BIAS]}), [0, 1], "layers [1] of 'm' keep weights for others, and are not the first that use them"),
        ((*T5[:3], {0: [BIAS], 2: [BIAS]}), [0, 1], "layers [0, 2] of 'm' keep weights for others, and are not the first that use them"),
    ],
)
def test_what_would_serve_other_layers(model: Any, indices: list[int], message: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        homes({"m": member(tmp_path / "m", *model)}, order(*indices))
    assert str(caught.value) == message


# Two models


def test_weights_of_one_model_do_not_serve_another(tmp_path: Path) -> None:
    pair = {"a": member(tmp_path / "a", *T5), "b": member(tmp_path / "b", *T5)}
    with pytest.raises(RefusedError) as caught:
        homes(pair, [*order(0, 1, model="b"), *order(2, model="a")])
    assert str(caught.value) == "layers of 'b' share weights that one of them keeps: they cannot be mixed with those of other models"


def test_a_model_of_which_nothing_is_left_gives_nothing(tmp_path: Path) -> None:
    pair = {"a": member(tmp_path / "a", *T5), "b": member(tmp_path / "b", *T5)}
    (home,) = homes(pair, order(2, 3, model="b")).values()
    assert len(home.added) == 1 and home.added[0].tensor is pair["b"].checkpoint.tensors[f"decoder.block.0.{BIAS}"]


def test_the_last_layer_is_that_of_its_own_model(tmp_path: Path) -> None:
    """Models of four and of six layers: each bias stays at the last layer of its own model only."""
    long = ({"model_type": "gpt_neox_japanese", "num_hidden_layers": 6}, "gpt_neox_japanese.layers.", 6, {5: [DENSE]})
    pair = {"a": member(tmp_path / "a", *JAPANESE), "b": member(tmp_path / "b", *long)}
    assert told(homes(pair, [*order(0, 1, model="a"), *order(3, 5, model="b")])) == {}
    assert told(homes(pair, [*order(0, 3, model="a"), *order(4, 5, model="b")])) == {1: ([DENSE], [])}
    name = f"gpt_neox_japanese.layers.5.{DENSE}"
    assert told(homes(pair, [*order(0, model="a"), *order(5, 3, model="b")])) == {1: ([DENSE], []), 2: ([], [f"0 {DENSE} < {name}"])}


# Any order


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_in_any_order_the_first_layer_keeps_the_bias(tmp_path_factory: pytest.TempPathFactory, indices: list[int]) -> None:
    source = member(tmp_path_factory.getbasetemp() / "t5", *T5)
    found = homes({"m": source}, order(*indices))
    kept = [at for at, index in enumerate(indices) if (at in found and found[at].added) or (index == 0 and at not in found)]
    assert kept == [0]
    assert all((BIAS in found[at].gone) == (index == 0) for at, index in enumerate(indices) if at in found)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_in_any_order_the_last_layer_has_the_last_bias(tmp_path_factory: pytest.TempPathFactory, indices: list[int]) -> None:
    found = homes({"m": member(tmp_path_factory.getbasetemp() / "japanese", *JAPANESE)}, order(*indices))
    has = [
        (index == 3 and DENSE not in found.get(at, Home()).gone) or bool(found.get(at, Home()).added) for at, index in enumerate(indices)
    ]
    assert has == [False] * (len(indices) - 1) + [True]
    assert all(one.zero for home in found.values() for one in home.added)


# Names


@pytest.mark.parametrize(
    ("rest", "shared"),
    [
        (BIAS, True),
        ("layer.0.TransientGlobalSelfAttention.global_relative_attention_bias.weight", True),
        ("relative_attention_bias.weight", True),
        ("relative_attention_bias.bias", False),
        ("x_relative_attention_bias.weight", False),
        ("shared_transf.q", True),
        ("shared_transformer.mlp.w", True),
        ("shared_transfer.w", False),
        ("pre_ln.weight", True),
        ("pre_ln.bias", True),
        ("xpre_ln.weight", False),
        ("pre_ln.scale", False),
        (DENSE, True),
        ("attention.dense.bias", False),
        ("mlp.w", False),
    ],
)
def test_names_of_shared_weights(rest: str, shared: bool) -> None:
    assert is_shared(rest) is shared
    assert LAST == {"gpt_neox_japanese": DENSE} and Added(rest, None).zero is False  # type: ignore[arg-type]


# End to end


def cut(source: Path, out: Path, *gone: int, **recipe: Any) -> dict[str, bytes]:
    """The bytes of every tensor of an output that passes its check."""
    asked = {"model": str(source), "steps": [{"prune": {"at": list(gone)}}], "output": str(out), **recipe}
    run_recipe(Recipe.model_validate(asked), progress=False)
    assert verify(out, load=False).ok
    with safe_open(out / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - it is no mapping


def test_bytes_of_a_moved_bias(tmp_path: Path) -> None:
    found = cut(write(tmp_path / "m", *T5), tmp_path / "out", 0, 2)
    bias = {f"decoder.block.0.{BIAS}": b"\x00ght"}
    assert found == {"embed_tokens.weight": b"embd", "decoder.block.0.w": b"\x01w..", "decoder.block.1.w": b"\x03w..", **bias}


def test_bytes_of_a_moved_block(tmp_path: Path) -> None:
    found = cut(write(tmp_path / "m", *ZAMBA), tmp_path / "out", 2)
    assert {name: data for name, data in found.items() if "shared" in name} == {
        "model.layers.4.shared_transf.q": b"\x02f.q", "model.layers.4.shared_transf.k": b"\x02f.k",
    }  # fmt: skip


def test_zeros_of_a_new_last_layer(tmp_path: Path) -> None:
    found = cut(write(tmp_path / "m", *JAPANESE), tmp_path / "out", 3)
    assert found[f"gpt_neox_japanese.layers.2.{DENSE}"] == bytes(4)
    assert sum(DENSE in name for name in found) == 1
