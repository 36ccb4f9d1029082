"""An architecture that nobody knows: what may follow the layers stops the run, is explained, and passes once it is declared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint

from layercut.api import run_recipe
from layercut.errors import RefusedError
from layercut.recipe import Recipe

DEPTH = 6
NOVEL = {"model_type": "novel", "num_hidden_layers": DEPTH, "num_attention_heads": DEPTH, "hidden_size": 4, "eos_token_id": [1, 2]}


def source(folder: Path, config: dict[str, Any], **more: tuple[str, tuple[int, ...], bytes]) -> Path:
    tensors = {f"model.layers.{layer}.w": ("U8", (2,), bytes([layer] * 2)) for layer in range(DEPTH)}
    return write_checkpoint(folder, {"model.embed_tokens.weight": ("U8", (8,), b"e" * 8), **tensors, **more}, {**NOVEL, **config})


def cut(folder: Path, out: Path, at: list[int], **recipe: Any) -> dict[str, Any]:
    run_recipe(
        Recipe.model_validate({"model": str(folder), "steps": [{"prune": {"at": at}}], "output": str(out), **recipe}), progress=False
    )
    config: dict[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if value != NOVEL.get(key)}


@pytest.mark.parametrize(
    ("config", "what", "word", "after"),
    [
        ({"flavours": list("abcdef")}, "flavours (a list of 6 entries)", "lists", {"flavours": list("acdef")}),
        ({"flavours": "ababab"}, "flavours (a text of 6 letters)", "lists", {"flavours": "aabab"}),
        ({"special": [0, 4]}, "special (a list of numbers below the number of layers)", "indices", {"special": [0, 3]}),
        ({"loops": 6}, "loops (6, the number of layers)", "depth_keys", {"loops": 5}),
        ({"odd": {"flavours": [1] * 6}}, "odd.flavours (a list of 6 entries)", "lists", {"odd": {"flavours": [1] * 5}}),
    ],
)
def test_stopped_explained_and_passed_once_declared(
    tmp_path: Path, config: dict[str, Any], what: str, word: str, after: dict[str, Any]
) -> None:
    folder = source(tmp_path / "m", config)
    with pytest.raises(RefusedError) as caught:
        cut(folder, tmp_path / "out", [1])
    name = what.partition(" ")[0]
    assert str(caught.value) == (
        f"layercut does not know whether this follows the layers: {what}; declare it in the recipe under 'architecture' "
        f"(perhaps {word}: [{name}]), or as ignore: [...] what does not"
    )
    assert cut(folder, tmp_path / "out", [1], architecture={word: [name]}) == {"num_hidden_layers": 5, **after}
    assert cut(folder, tmp_path / "same", [1], architecture={"ignore": [name]}) == {"num_hidden_layers": 5, **config}


def test_everything_that_is_strange_is_said_at_once(tmp_path: Path) -> None:
    folder = source(tmp_path / "m", {"flavours": list("abcdef"), "loops": 6}, gates=("U8", (6, 2), bytes(range(12))))
    with pytest.raises(RefusedError) as caught:
        cut(folder, tmp_path / "out", [1])
    assert str(caught.value) == (
        "layercut does not know whether these follow the layers: flavours (a list of 6 entries), loops (6, the number of layers), "
        "gates (a tensor of shape [6, 2]); declare it in the recipe under 'architecture' (perhaps lists: [flavours]; "
        "depth_keys: [loops]; tables: [gates]), or as ignore: [...] what does not"
    )


def test_a_table_that_is_declared_follows_its_layers(tmp_path: Path) -> None:
    folder = source(tmp_path / "m", {}, gates=("U8", (6, 2), bytes(range(12))))
    cut(folder, tmp_path / "out", [1, 4], architecture={"tables": ["gates"]})
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert bytes([0, 1, 4, 5, 6, 7, 10, 11]) in data
    assert bytes(range(12)) not in data


def test_lists_of_tensors_beside_the_layers(tmp_path: Path) -> None:
    gains = {f"model.gains.{layer}.w": ("U8", (2,), bytes([200 + layer] * 2)) for layer in range(DEPTH)}
    folder = source(tmp_path / "m", {}, **gains)
    with pytest.raises(RefusedError, match=r"model\.gains \(tensors numbered from 0 to 5\).*prefixes: \[model\.gains\]"):
        cut(folder, tmp_path / "out", [1])
    cut(folder, tmp_path / "out", [1], architecture={"prefixes": ["model.gains"]})
    header = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b"model.gains.4.w" in header and b"model.gains.5.w" not in header
    assert bytes([200, 200]) in header and bytes([201, 201]) not in header


def test_what_is_explained_by_its_name_is_not_strange(tmp_path: Path) -> None:
    folder = source(tmp_path / "m", {"num_experts": 6, "mrope_section": [1, 2, 3], "rope_scaling": {"factor": 6}})
    assert cut(folder, tmp_path / "out", [0]) == {
        "num_hidden_layers": 5,
        "num_experts": 6,
        "mrope_section": [1, 2, 3],
        "rope_scaling": {"factor": 6},
    }


def test_another_key_of_the_depth(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.w": ("U8", (2,), bytes([layer] * 2)) for layer in range(DEPTH)}
    folder = write_checkpoint(tmp_path / "m", tensors, {"model_type": "novel", "n_floors": DEPTH})
    cut(folder, tmp_path / "out", [0], architecture={"depth_keys": ["n_floors"]})
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == {"model_type": "novel", "n_floors": 5}
