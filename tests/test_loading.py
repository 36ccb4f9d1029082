"""Loading: which device, dtype, tokens and layers are meant, and what is said of a model that cannot be loaded whole."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, write_checkpoint
from torch import nn
from transformers.utils import logging as chatter

from layercut.checkpoint import open_checkpoint
from layercut.errors import CalibrationError, CheckpointError, LayercutError
from layercut.loading import (
    bos_prefix,
    check_complete,
    encode,
    layers_of,
    load_backbone,
    load_causal_lm,
    load_tokenizer,
    own_code,
    pick_device,
    pick_dtype,
    quiet,
    settled_dtype,
)

CPU = torch.device("cpu")


class Nested(nn.Module):
    """Lists of modules under dotted names."""

    def __init__(self, **lists: int) -> None:
        super().__init__()
        for dotted, count in lists.items():
            *parents, last = dotted.split("__")
            holder: nn.Module = self
            for name in parents:
                if not hasattr(holder, name):
                    holder.add_module(name, nn.Module())
                holder = getattr(holder, name)
            holder.add_module(last, nn.ModuleList(nn.Identity() for _ in range(count)))


@pytest.mark.parametrize(
    ("lists", "prefix", "name"),
    [
        ({"layers": 4}, None, "layers"),
        ({"layers": 4}, "model.layers.", "layers"),
        ({"layers": 4, "experts": 3}, None, "layers"),
        ({"language_model__layers": 4, "vision_tower__layers": 4}, "model.language_model.layers.", "language_model.layers"),
        ({"language_model__layers": 4, "vision_tower__layers": 4}, "model.vision_tower.layers.", "vision_tower.layers"),
        ({"encoder__layers": 4, "decoder__layers": 4}, "decoder.layers.", "decoder.layers"),
        ({"deep__inner__layers": 4, "layers": 4}, None, "layers"),
        ({"right__other__layers": 4, "wrong__core__layers": 4}, "right.core.layers.", "wrong.core.layers"),  # the common end decides
    ],
)
def test_the_layers_of_a_model(lists: dict[str, int], prefix: str | None, name: str) -> None:
    model = Nested(**lists)
    assert layers_of(model, 4, prefix) is model.get_submodule(name)


def test_a_list_inside_a_layer_is_no_stack() -> None:
    model = Nested(layers=2)
    model.layers[0].experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert layers_of(model, 2) is model.layers


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({}, "Nested has no list of 4 layers (lists: none)"),
        ({"layers": 3, "blocks": 5}, "Nested has no list of 4 layers (lists: layers (3), blocks (5))"),
        ({"left": 4, "right": 4}, "Nested has several lists of 4 layers: left, right"),
    ],
)
def test_no_layers_or_too_many(lists: dict[str, int], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        layers_of(Nested(**lists), 4)
    assert str(caught.value) == message


# Devices and dtypes


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(LayercutError, match=r"^device 'tpu9' cannot be used: "):
        pick_device("tpu9")
    if not torch.cuda.is_available():
        assert pick_device() == CPU
        with pytest.raises(LayercutError, match=r"^device 'cuda' cannot be used: "):
            pick_device("cuda")


def test_dtypes() -> None:
    assert pick_dtype(CPU) == torch.float32 and pick_dtype(torch.device("meta")) == "auto"
    assert pick_dtype(CPU, "bfloat16") == torch.bfloat16 and pick_dtype(torch.device("meta"), "float64") == torch.float64
    with pytest.raises(LayercutError) as caught:
        pick_dtype(CPU, "int8")
    assert str(caught.value) == "unknown dtype 'int8'; known are float32, bfloat16, float16, float64"


@pytest.mark.parametrize(
    ("config", "stored", "dtype"),
    [
        ({"dtype": "bfloat16"}, "F32", torch.bfloat16),
        ({"torch_dtype": "float16"}, "F32", torch.float16),
        ({"dtype": None, "torch_dtype": "float64"}, "F32", torch.float64),
        ({}, "BF16", torch.bfloat16),
        ({"dtype": "int8"}, "F16", torch.float16),
        ({"dtype": ["x"]}, "F64", torch.float64),
        ({}, "U8", torch.float32),
    ],
)
def test_the_dtype_of_a_checkpoint(tmp_path: Path, config: dict[str, Any], stored: str, dtype: torch.dtype) -> None:
    size = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "U8": 1}[stored]
    tensors = {"a.scale": ("U8", (1,), b"."), "a.weight": (stored, (1,), bytes(size))}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config))
    assert settled_dtype(checkpoint, torch.device("meta")) == dtype
    assert settled_dtype(checkpoint, CPU) == torch.float32
    assert settled_dtype(checkpoint, torch.device("meta"), "float32") == torch.float32


# Tokens


@pytest.mark.parametrize(("bos", "prefix"), [(False, []), (True, [1]), ("auto", [1])])
def test_a_tokenizer_that_puts_bos_first(bos: Any, prefix: list[int]) -> None:
    assert bos_prefix(byte_tokenizer(bos=True), bos) == prefix


@pytest.mark.parametrize(("bos", "prefix"), [(False, []), (True, [1]), ("auto", [])])
def test_a_tokenizer_that_does_not(bos: Any, prefix: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert bos_prefix(tokenizer, bos) == prefix
    assert encode(byte_tokenizer(bos=True), "ab") == encode(tokenizer, "ab") == [67, 68]


def test_a_tokenizer_without_bos() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert bos_prefix(tokenizer, "auto") == []
    with pytest.raises(CalibrationError) as caught:
        bos_prefix(tokenizer, True)
    assert str(caught.value) == "bos is true, but the tokenizer has no BOS token; set bos: auto or bos: false"


def test_no_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", {"a": ("U8", (1,), b".")}, {"model_type": "llama"})
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path / "m")
    told = str(caught.value)
    assert told.startswith(f"{tmp_path}/m: ") and "\n" not in told
    hint = "copy tokenizer.json and tokenizer_config.json of the original model into the folder"
    assert told.endswith(hint) or told.endswith("the tokenizer has an empty vocabulary")


# Models


def test_models_are_loaded_whole(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("llama", layers=2)
    backbone, whole = load_backbone(folder, CPU), load_causal_lm(folder, CPU, "bfloat16")
    assert not backbone.training and not whole.training
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.bfloat16}
    assert len(layers_of(backbone, 2, "model.layers.")) == 2
    shutil.copytree(folder, tmp_path / "deeper")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "deeper" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        load_causal_lm(tmp_path / "deeper", CPU)
    assert str(caught.value) == f"{tmp_path}/deeper: weights are missing: model.layers.2.input_layernorm.weight and 8 more"


@pytest.mark.parametrize(
    ("missing", "mismatched", "message"),
    [
        (["b", "a"], [], "weights are missing: a and 1 more"),
        (["a"], [("x", (1,), (2,))], "weights are missing: a"),
        ([], [("x", (1, 2), (2, 2)), ("w", (1,), (3,))], "w has shape [1], but config.json asks for [3]"),
    ],
)
def test_weights_that_do_not_fit(missing: list[str], mismatched: list[Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_complete({"missing_keys": missing, "mismatched_keys": mismatched}, Path("/m"))
    assert str(caught.value) == f"/m: {message}"


def test_what_fits_is_not_remarked_on() -> None:
    check_complete({"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"more"}}, Path("/m"))


def test_code_of_a_checkpoint() -> None:
    assert own_code(ValueError("no such file"), Path("/m")) is None
    told = str(own_code(ValueError("please pass the argument `trust_remote_code=True`"), Path("/m")))
    assert told == (
        "/m: transformers could read this only with Python code that comes with it, and layercut runs no code of a checkpoint; "
        "what loads no model works: recipes without 'auto', verify --no-load"
    )


def test_silence_ends(recwarn: pytest.WarningsRecorder) -> None:
    before = chatter.get_verbosity()
    with pytest.raises(RuntimeError), quiet():
        assert chatter.get_verbosity() == logging.CRITICAL and not chatter.is_progress_bar_enabled()
        warnings.warn("unheard", stacklevel=1)
        raise RuntimeError
    assert chatter.get_verbosity() == before
    assert not [one for one in recwarn if "unheard" in str(one.message)]
