"""Tables with one part a layer: their parts stand as the layers do, byte by byte, and the output can be verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from layercut import run_recipe
from layercut.errors import RefusedError
from layercut.header import ITEM_BITS, read_header
from layercut.recipe import Recipe
from layercut.verify import verify

DEPTH, PART, ROWS = 4, 2, 3
EMBED, PROJECT, NORM = (
    f"model.{name}.weight" for name in ("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")
)
CONFIG = {
    "model_type": "gemma3n_text",
    "num_hidden_layers": DEPTH,
    "hidden_size_per_layer_input": PART,
    "layer_types": ["full_attention"] * DEPTH,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0] * DEPTH,
    "intermediate_size": 8,
}


def source(folder: Path, config: dict[str, Any] | None = None, **tensors: tuple[str, tuple[int, ...], bytes]) -> Path:
    """Four layers; the bytes of the tables say row, layer and number."""
    table = bytes(100 * row + 10 * layer + number for row in range(ROWS) for layer in range(DEPTH) for number in range(PART))
    project = bytes(10 * layer + 2 * number + column for layer in range(DEPTH) for number in range(PART) for column in range(2))
    held = {
        "model.embed_tokens.weight": ("U8", (2, 2), b"embd"),
        EMBED: ("U8", (ROWS, DEPTH * PART), table),
        PROJECT: ("U8", (DEPTH * PART, 2), project),
        NORM: ("U8", (PART,), b"no"),
        **{f"model.layers.{layer}.w": ("U8", (4,), bytes([layer] * 4)) for layer in range(DEPTH)},
        "model.norm.weight": ("U8", (2,), b"nm"),
        **tensors,
    }
    return write_checkpoint(folder, {name: held[name] for name in sorted(held)}, CONFIG if config is None else config)


def cut(model: Path, out: Path, steps: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Run the steps, verify, and read every tensor with the library."""
    run_recipe(Recipe.model_validate({"model": str(model), "steps": steps, "output": str(out)}), progress=False)
    result = verify(out, load=False)
    assert result.ok, [check for check in result.checks if not check.ok]
    with safe_open(out / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118 - it is no mapping


def expected(order: list[int]) -> dict[str, Any]:
    return {
        EMBED: [[100 * row + 10 * layer + number for layer in order for number in range(PART)] for row in range(ROWS)],
        PROJECT: [[10 * layer + 2 * number + column for column in range(2)] for layer in order for number in range(PART)],
        NORM: list(b"no"),
    }


@pytest.mark.parametrize(
    ("steps", "order"),
    [
        ([{"prune": {"at": [1]}}], [0, 2, 3]),
        ([{"prune": {"at": [0, 3]}}], [1, 2]),
        ([{"duplicate": {"at": "1-2"}}], [0, 1, 2, 1, 2, 3]),
        ([{"reorder": {"to": [3, 1, 0, 2]}}], [3, 1, 0, 2]),
        ([{"keep": {"at": [2]}}], [2]),
    ],
)
def test_parts_follow_their_layers(tmp_path: Path, steps: list[dict[str, Any]], order: list[int]) -> None:
    found = cut(source(tmp_path / "m"), tmp_path / "out", steps)
    assert {name: found[name] for name in (EMBED, PROJECT, NORM)} == expected(order)
    assert [found[f"model.layers.{at}.w"][0] for at in range(len(order))] == order
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == len(order) and config["hidden_size_per_layer_input"] == PART


@settings(max_examples=15)
@given(order=st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=6))
def test_any_order(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    folder = tmp_path_factory.mktemp("any")
    model = source(folder / "m")
    slices = [{"model": str(model), "layer_range": [index, index + 1]} for index in order]
    run_recipe(Recipe.model_validate({"slices": slices, "output": str(folder / "out")}), progress=False)
    assert verify(folder / "out", load=False).ok
    with safe_open(folder / "out" / "model.safetensors", "np") as file:
        assert {name: file.get_tensor(name).tolist() for name in (EMBED, PROJECT, NORM)} == expected(order)


def test_a_packed_table_is_refused(tmp_path: Path) -> None:
    model = source(tmp_path / "m", **{EMBED: ("U8", (ROWS, 5), bytes(15))})
    with pytest.raises(RefusedError, match=r"a table with one part a layer is quantised or of another shape: its parts cannot be told"):
        cut(model, tmp_path / "out", [{"prune": {"at": [1]}}])
    assert not (tmp_path / "out").exists()


def test_elements_smaller_than_a_byte(tmp_path: Path) -> None:
    """Two rows of four layers, whose parts are two elements of four bits or eight of six."""
    for dtype, width in (("F4", 1), ("F6_E2M3", 6)):
        part = 8 * width // ITEM_BITS[dtype]
        config = {**CONFIG, "hidden_size_per_layer_input": part}
        rows = bytes(range(2 * DEPTH * width))
        packed = {EMBED: (dtype, (2, DEPTH * part), rows), PROJECT: (dtype, (DEPTH * part,), rows[: DEPTH * width])}
        model = source(tmp_path / dtype, config, **packed)
        run_recipe(
            Recipe.model_validate({"model": str(model), "steps": [{"prune": {"at": [1]}}], "output": str(tmp_path / f"{dtype}-out")})
        )
        assert verify(tmp_path / f"{dtype}-out", load=False).ok
        file = tmp_path / f"{dtype}-out" / "model.safetensors"
        found = {entry.name: file.read_bytes()[entry.begin : entry.end] for entry in read_header(file).tensors}
        kept = [row * DEPTH * width + layer * width + byte for row in range(2) for layer in (0, 2, 3) for byte in range(width)]
        assert found[EMBED] == bytes(kept) and found[PROJECT] == bytes(kept[: 3 * width])


def test_parts_that_are_no_whole_bytes_are_refused(tmp_path: Path) -> None:
    model = source(tmp_path / "m", {**CONFIG, "hidden_size_per_layer_input": 1}, **{EMBED: ("F4", (ROWS * 2, DEPTH), bytes(ROWS * DEPTH))})
    with pytest.raises(RefusedError) as caught:
        cut(model, tmp_path / "out", [{"prune": {"at": [1]}}])
    assert str(caught.value) == f"{EMBED}: parts of 4 bits, which are no whole bytes, cannot be moved"


def test_a_declared_table_follows_too(tmp_path: Path) -> None:
    config = {"model_type": "novel", "num_hidden_layers": DEPTH}
    held = {f"model.layers.{layer}.w": ("U8", (4,), bytes([layer] * 4)) for layer in range(DEPTH)}
    held["model.gates"] = ("U8", (DEPTH, 2), bytes(range(8)))
    model = write_checkpoint(tmp_path / "m", held, config)
    recipe = {"model": str(model), "steps": [{"prune": {"at": [1]}}], "output": str(tmp_path / "out")}
    with pytest.raises(RefusedError, match=r"model\.gates \(a tensor of shape \[4, 2\]\)"):
        run_recipe(Recipe.model_validate(recipe), progress=False)
    run_recipe(Recipe.model_validate({**recipe, "architecture": {"tables": ["model.gates"]}}), progress=False)
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.get_tensor("model.gates").tolist() == [[0, 1], [4, 5], [6, 7]]
