from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint

from layercut.anatomy import in_pairs
from layercut.architecture import find_stack
from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import CheckpointError


def checkpoint(folder: Path, config: dict[str, Any], *names: str) -> Checkpoint:
    """A checkpoint with one small tensor for each name; `{4}` in a name stands for 0, 1, 2 and 3."""
    tensors = {name: ("U8", (4,), b"....") for name in expand(names)}
    return open_checkpoint(write_checkpoint(folder, tensors, config))


def expand(names: tuple[str, ...] | list[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        head, brace, rest = name.partition("{")
        count, _, tail = rest.partition("}")
        found += expand([f"{head}{number}{tail}" for number in range(int(count))]) if brace else [name]
    return found


LLAMA = (
    "model.embed_tokens.weight",
    "model.layers.{4}.self_attn.o_proj.weight",
    "model.layers.{4}.mlp.down_proj.weight",
    "model.norm.weight",
)


@pytest.mark.parametrize(
    ("config", "names", "prefix", "key", "depth", "extra"),
    [
        ({"num_hidden_layers": 4}, LLAMA, "model.layers.", "num_hidden_layers", 4, 0),
        ({"n_layer": 3}, ("wte.weight", "h.{3}.attn.c_attn.weight", "ln_f.weight"), "h.", "n_layer", 3, 0),  # saved by the base model
        ({"n_layer": 3}, ("transformer.wte.weight", "transformer.h.{3}.attn.c_attn.weight"), "transformer.h.", "n_layer", 3, 0),
        # as many experts as layers: only the outermost number counts
        (
            {"num_hidden_layers": 4, "num_local_experts": 4},
            ("model.layers.{4}.block_sparse_moe.experts.{4}.w1.weight", "model.layers.{4}.block_sparse_moe.gate.weight"),
            "model.layers.", "num_hidden_layers", 4, 0,
        ),
        # two more numbered lists inside a layer (longcat)
        (
            {"num_layers": 2},
            ("model.layers.{2}.self_attn.{2}.q.weight", "model.layers.{2}.mlps.{2}.up.weight", "model.norm.weight"),
            "model.layers.", "num_layers", 2, 0,
        ),
        # one key counts the layers, another how often they run (perceiver)
        (
            {"num_blocks": 3, "num_self_attends_per_block": 3}, ("perceiver.encoder.self_attends.{3}.mlp.w", "perceiver.embeddings.w"),
            "perceiver.encoder.self_attends.", "num_self_attends_per_block", 3, 0,
        ),
        # attention and MLP of a layer, counted apart but stored as one (dory)
        (
            {"num_hidden_layers": 4, "layer_types": ["full_attention", "mlp"] * 2}, ("backbone.layers.{2}.mlp.up_proj.weight",),
            "backbone.layers.", "num_hidden_layers", 2, 0,
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["full_attention"], "num_nextn_predict_layers": 1}, ("model.layers.{2}.mlp.w",),
            "model.layers.", "num_hidden_layers", 1, 1,
        ),
        # layers that take their weights from one group (albert)
        (
            {"num_hidden_layers": 4}, ("albert.encoder.albert_layer_groups.{1}.albert_layers.{1}.ffn.weight",),
            "albert.encoder.albert_layer_groups.", "num_hidden_layers", 4, 0,
        ),
        # the language model between the local models of bytes, and none of them (blt)
        (
            {f"{name}_config": {"num_hidden_layers": 3} for name in ("encoder", "decoder", "global", "patcher")},
            ("model.patcher.layers.{3}.w", "model.local_encoder.layers.{3}.w", "model.global_transformer.layers.{3}.w",
             "model.local_decoder.layers.{3}.w"),
            "model.global_transformer.layers.", "global_config.num_hidden_layers", 3, 0,
        ),
        # a vision tower of the same depth
        (
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}},
            ("language_model.model.layers.{4}.mlp.down_proj.weight", "vision_tower.vision_model.encoder.layers.{4}.mlp.fc1.weight"),
            "language_model.model.layers.", "text_config.num_hidden_layers", 4, 0,
        ),
        (
            {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 4, "num_hidden_layers": 4}},
            ("model.visual.blocks.{4}.attn.qkv.weight", "model.language_model.layers.{4}.mlp.down_proj.weight"),
            "model.language_model.layers.", "text_config.num_hidden_layers", 4, 0,
        ),
        # a flat config beside a vision tower of another depth
        (
            {"num_hidden_layers": 4, "vision_config": {"depth": 2}},
            ("visual.blocks.{2}.attn.qkv.weight", *LLAMA),
            "model.layers.", "num_hidden_layers", 4, 0,
        ),
        # one and two multi-token-prediction layers behind the stack
        ({"num_hidden_layers": 3, "num_nextn_predict_layers": 1}, LLAMA, "model.layers.", "num_hidden_layers", 3, 1),
        ({"num_hidden_layers": 2, "num_mtp_layers": 2}, LLAMA, "model.layers.", "num_hidden_layers", 2, 2),
        # declared, but not in the file
        ({"num_hidden_layers": 4, "num_nextn_predict_layers": 1}, LLAMA, "model.layers.", "num_hidden_layers", 4, 0),
        # stored under a name of their own
        (
            {"num_hidden_layers": 4, "num_nextn_predict_layers": 1},
            (*LLAMA, "mtp.layers.{1}.eh_proj.weight"),
            "model.layers.", "num_hidden_layers", 4, 0,
        ),
        ({"num_hidden_layers": 2}, ("encoder.layer.{2}.query.weight", "pooler.dense.weight"), "encoder.layer.", "num_hidden_layers", 2, 0),
        ({"num_hidden_layers": 2}, ("{2}.mlp.weight", "norm.weight"), "", "num_hidden_layers", 2, 0),
        (
            {"thinker_config": {"text_config": {"num_hidden_layers": 3}}, "talker_config": {"text_config": {"num_hidden_layers": 3}}},
            ("thinker.model.layers.{3}.mlp.weight", "talker.model.layers.{3}.mlp.weight"),
            "thinker.model.layers.", "thinker_config.text_config.num_hidden_layers", 3, 0,
        ),
        # eleven layers: the order of the numbers, not of the letters
        ({"num_hidden_layers": 11}, ("model.layers.{11}.w",), "model.layers.", "num_hidden_layers", 11, 0),
        # other lists with other lengths, outside and before
        ({"num_hidden_layers": 4}, ("projection.{2}.weight", *LLAMA), "model.layers.", "num_hidden_layers", 4, 0),
    ],
)  # fmt: skip
def test_the_stack_is_found(
    tmp_path: Path, config: dict[str, Any], names: tuple[str, ...], prefix: str, key: str, depth: int, extra: int
) -> None:
    stack = find_stack(checkpoint(tmp_path / "m", config, *names))
    assert (stack.prefix, str(stack.depth_key), stack.depth, stack.extra) == (prefix, key, depth, extra)
    assert stack.node == tuple(key.split(".")[:-1])


def test_stale_aliases_are_found(tmp_path: Path) -> None:
    config = {"n_layer": 3, "num_hidden_layers": 3, "num_layers": 5, "vision_config": {"n_layers": 3}}
    stack = find_stack(checkpoint(tmp_path / "m", config, "transformer.h.{3}.w"))
    assert sorted(map(str, (stack.depth_key, *stack.aliases))) == ["n_layer", "num_hidden_layers"]


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        (
            {"num_hidden_layers": 5},
            LLAMA,
            "no layers found: numbered tensors are model.layers.* (4); depth keys are num_hidden_layers = 5",
        ),
        (
            {"num_hidden_layers": 4},
            ("a.weight", "b.weight"),
            "no layers found: numbered tensors are none; depth keys are num_hidden_layers = 4",
        ),
        ({"model_type": "nemotron_h"}, LLAMA, "no layers found: numbered tensors are model.layers.* (4); depth keys are none"),
        ({"num_hidden_layers": True}, ("h.{1}.w",), "no layers found: numbered tensors are h.* (1); depth keys are none"),
        (
            {"num_hidden_layers": 3},
            ("h.0.w", "h.1.w", "h.3.w"),
            "no layers found: numbered tensors are none; depth keys are num_hidden_layers = 3",
        ),
        (
            {"vision_config": {"num_hidden_layers": 2}},
            ("vision_tower.layers.{2}.w",),
            "no layers found: numbered tensors are vision_tower.layers.* (2); depth keys are vision_config.num_hidden_layers = 2",
        ),
        (
            {"num_hidden_layers": 3},
            ("left.layers.{3}.w", "right.layers.{3}.w"),
            "several stacks of layers fit: left.layers.* (3), right.layers.* (3); say which one is meant, for example 'stack: left.layers'",
        ),
        (
            {"n_floors": 3},
            ("model.layers.{3}.w",),
            "no layers found: numbered tensors are model.layers.* (3); depth keys are none; "
            "if n_floors is the number of layers, declare it: architecture: {depth_keys: [n_floors]}",
        ),
    ],
)
def test_checkpoints_without_one_stack(tmp_path: Path, config: dict[str, Any], names: tuple[str, ...], message: str) -> None:
    source = checkpoint(tmp_path / "m", config, *names)
    with pytest.raises(CheckpointError) as caught:
        find_stack(source)
    assert str(caught.value) == f"{source.folder / 'config.json'}: {message}"


@pytest.mark.parametrize("name", ["model.layers.²", "model.layers.٣", "model.layers." + "9" * 5000, "model.layers.-1", "model.layers.1e1"])
def test_strange_numbers_are_no_layers(tmp_path: Path, name: str) -> None:
    stack = find_stack(checkpoint(tmp_path / "m", {"num_hidden_layers": 4}, *LLAMA, f"{name}.weight"))
    assert (stack.prefix, stack.depth) == ("model.layers.", 4)
    assert stack.place(f"{name}.weight") is None


@pytest.mark.parametrize(("kind", "prefix", "key"), [
    ("llama", "model.layers.", "num_hidden_layers"),
    ("gpt2", "transformer.h.", "n_layer"),
    ("gemma3_text", "model.layers.", "num_hidden_layers"),
])  # fmt: skip
def test_models_of_transformers(tiny: Any, kind: str, prefix: str, key: str) -> None:
    stack = find_stack(open_checkpoint(tiny(kind, layers=6)))
    assert (stack.prefix, str(stack.depth_key), stack.depth) == (prefix, key, 6)


@pytest.mark.parametrize(
    ("kinds", "length", "paired"),
    [
        (["a", "mlp", "b", "mlp"], 4, True),
        (["a", "mlp", "b", "mlp"], 6, False),
        (["a", "mlp", "b"], 3, False),
        (["a"], 1, False),
        ([], 0, False),
        (["mlp", "mlp"], 2, False),
        (["mlp", "a"], 2, False),
        ("amlp", 4, False),
        (None, 2, False),
    ],
)
def test_kinds_of_attention_and_mlp_in_turns(kinds: Any, length: int, paired: bool) -> None:
    assert in_pairs(kinds, length) is paired
