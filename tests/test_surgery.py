"""Config surgery, on configs written by hand. Case numbers are those of models that other tools get wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from layercut.architecture import Member, find_stack
from layercut.checkpoint import open_checkpoint
from layercut.errors import RefusedError
from layercut.plan import Edit
from layercut.stack import LayerRef, Share
from layercut.surgery import INEXACT, Dependent, Surgery, dependents, operate


def member(folder: Path, config: dict[str, Any] | str, layers: int, prefix: str = "model.layers.") -> Member:
    """A checkpoint of `layers` layers with this config, as data or as text."""
    tensors = {f"{prefix}{layer}.w": ("U8", (4,), b"....") for layer in range(layers)}
    write_checkpoint(folder, tensors, config if isinstance(config, dict) else {})
    if isinstance(config, str):
        (folder / "config.json").write_bytes(config.encode())
    checkpoint = open_checkpoint(folder)
    return Member(checkpoint, find_stack(checkpoint))


def cut(folder: Path, config: dict[str, Any] | str, layers: int, order: Sequence[int], prefix: str = "model.layers.") -> Surgery:
    source = member(folder, config, layers, prefix)
    return operate(source.checkpoint.config_text, "m", {"m": source}, [LayerRef(model="m", index=index) for index in order])


def without(depth: int, *gone: int) -> list[int]:
    return [index for index in range(depth) if index not in gone]


S, F, L = "sliding_attention", "full_attention", "linear_attention"
QWEN3 = {"model_type": "qwen3", "num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3,
         "layer_types": [S, F, S, F, S, F]}  # fmt: skip
LLAMA4 = {"model_type": "llama4_text", "num_hidden_layers": 8, "interleave_moe_layer_step": 2, "moe_layers": [1, 3, 5, 7],
          "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0], "no_rope_layer_interval": 4, "layer_types": [S, S, S, F, S, S, S, F]}  # fmt: skip
JAMBA = {"model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2,
         "expert_layer_offset": 1, "num_experts": 4}  # fmt: skip
KIMI = {"model_type": "kimi_linear", "num_hidden_layers": 6, "first_k_dense_replace": 1,
        "linear_attn_config": {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5], "num_heads": 6}}  # fmt: skip
NEMOTRON = {"model_type": "nemotron_h", "num_hidden_layers": 6, "hybrid_override_pattern": "ME*-M*",
            "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "attention"]}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "order", "edits"),
    [
        pytest.param(QWEN3, without(6, 0), {"num_hidden_layers": 5, "max_window_layers": 2, "layer_types": [F, S, F, S, F]}, id="1 qwen3"),
        pytest.param(
            QWEN3, [0, 1, 4, 5, 0], {"num_hidden_layers": 5, "layer_types": [S, F, S, F, S]}, id="1 qwen3, no prefix but a list",
        ),
        pytest.param(
            {"model_type": "hunyuan_v1_moe", "num_hidden_layers": 6, "num_experts": 4, "moe_topk": [2, 1, 2, 1, 2, 1]},
            without(6, 2), {"num_hidden_layers": 5, "moe_topk": [2, 1, 1, 2, 1]}, id="2 hunyuan",
        ),
        pytest.param(JAMBA, without(8, 0, 1, 2, 3), {"num_hidden_layers": 4}, id="4 jamba, one period"),
        pytest.param(JAMBA, without(8, 0, 1), {"num_hidden_layers": 6, "attn_layer_offset": 0}, id="4 jamba, another offset"),
        pytest.param(
            NEMOTRON, without(6, 3),
            {"num_hidden_layers": 5, "hybrid_override_pattern": "ME*M*",
             "layers_block_type": ["mamba", "moe", "attention", "mamba", "attention"]},
            id="7 nemotron_h",
        ),
        pytest.param(
            LLAMA4, without(8, 2),
            {"num_hidden_layers": 7, "moe_layers": [1, 2, 4, 6], "no_rope_layers": [1, 1, 0, 1, 1, 1, 0],
             "layer_types": [S, S, F, S, S, S, F]},
            id="8 llama4",
        ),
        pytest.param(
            KIMI, without(6, 2), {"num_hidden_layers": 5, "linear_attn_config.full_attn_layers": [5],
                                  "linear_attn_config.kda_layers": [1, 2, 3, 4]}, id="14 kimi, numbers from 1",
        ),
        pytest.param(
            KIMI, without(6, 0), {"num_hidden_layers": 5, "linear_attn_config.full_attn_layers": [2, 5],
                                  "linear_attn_config.kda_layers": [1, 3, 4], "first_k_dense_replace": 0}, id="14 kimi, the dense layer",
        ),
        pytest.param(
            {"model_type": "qwen3_moe", "num_hidden_layers": 6, "mlp_only_layers": [1, 4], "num_experts": 4, "decoder_sparse_step": 1},
            without(6, 0), {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]}, id="16 qwen3_moe",
        ),
        pytest.param(
            {"model_type": "qwen3_moe", "num_hidden_layers": 6, "mlp_only_layers": [], "decoder_sparse_step": 1},
            without(6, 0), {"num_hidden_layers": 5}, id="16 qwen3_moe, none",
        ),
        pytest.param(
            {"model_type": "llama", "num_hidden_layers": 3}, [0, 1, 2, 0, 1, 2], {"num_hidden_layers": 6}, id="doubled"
        ),
        pytest.param(
            {"model_type": "llama", "num_hidden_layers": 3}, [2, 1, 0], {}, id="reordered: the depth stays"
        ),
    ],
)  # fmt: skip
def test_values_follow_the_layers(tmp_path: Path, config: dict[str, Any], order: list[int], edits: dict[str, Any]) -> None:
    done = cut(tmp_path / "m", config, config["num_hidden_layers"], order)
    assert {edit.key: edit.after for edit in done.edits} == edits
    expected = json.loads(json.dumps(config))
    for key, value in edits.items():
        *node, last = key.split(".")
        inner = expected
        for part in node:
            inner = inner[part]
        inner[last] = value
    assert json.loads(done.text) == expected
    assert list(json.loads(done.text)) == list(config)
    for edit in done.edits:
        inner = config
        for part in edit.key.split("."):
            inner = inner[part]
        assert edit.before == inner


def test_case_3_deepseek_with_a_prediction_layer(tmp_path: Path) -> None:
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 5,
        "first_k_dense_replace": 2,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 1,
    }
    done = cut(tmp_path / "m", config, 6, without(5, 1))
    assert [(edit.key, edit.before, edit.after, edit.reason) for edit in done.edits] == [
        ("num_hidden_layers", 5, 4, "depth"),
        ("first_k_dense_replace", 2, 1, "number of first layers"),
        ("num_nextn_predict_layers", 1, 0, "multi-token-prediction layers are left out"),
    ]


@pytest.mark.parametrize(
    ("order", "count"),
    [([0, *range(3, 6)], 1), (range(2, 6), 0), ([0, 1, 0, 1, 2, 3, 4, 5], 4), (range(2), 2)],
)
def test_first_dense_layers(tmp_path: Path, order: Sequence[int], count: int) -> None:
    done = cut(tmp_path / "m", {"num_hidden_layers": 6, "first_k_dense_replace": 2}, 6, list(order))
    assert json.loads(done.text) == {"num_hidden_layers": len(order), "first_k_dense_replace": count}


PATTERN = "cannot describe the new order of layers; choose layers that keep the pattern"


@pytest.mark.parametrize(
    ("config", "order", "message"),
    [
        (
            {"num_hidden_layers": 6, "first_k_dense_replace": 2},
            [*range(6), *range(6)],
            f"config.json: first_k_dense_replace = 2 (number of first layers) {PATTERN}",
        ),
        (
            JAMBA,
            without(8, 1),
            "config.json: expert_layer_period = 2, expert_layer_offset = 1 "
            f"(period and offset of layers, for which the class reads no list) {PATTERN}",
        ),
        (
            JAMBA,
            without(8, 2),
            "config.json: expert_layer_period = 2, expert_layer_offset = 1 "
            f"(period and offset of layers, for which the class reads no list) {PATTERN}",
        ),
        (
            {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
            [0, 3, 1],
            f"config.json: num_kv_shared_layers = 2 (number of last layers) {PATTERN}",
        ),
        (
            {"num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 3},
            [0, 4, 1],
            f"config.json: max_window_layers = 3 (number of first layers) {PATTERN}",
        ),
        (
            {"num_hidden_layers": 4, "foo_per_layer": [1, 2, 3, 4]},
            [0, 1],
            "layercut does not know whether this follows the layers: foo_per_layer (a list of 4 entries); "
            "declare it in the recipe under 'architecture' (perhaps lists: [foo_per_layer]), or as ignore: [...] what does not",
        ),
        (
            {"num_hidden_layers": 4, "loop_layers": 4},
            [0, 1],
            "layercut does not know whether this follows the layers: loop_layers (4, the number of layers); "
            "declare it in the recipe under 'architecture' (perhaps depth_keys: [loop_layers]), or as ignore: [...] what does not",
        ),
        (
            {"num_hidden_layers": 4, "model_type": "modernbert-decoder"},
            [1, 2],
            "model type modernbert-decoder: the first layer has no attention norm, so this stack would load but compute something else"
            f"; {INEXACT}",
        ),
        (
            {"num_hidden_layers": 4, "model_type": "diffllama"},
            [1, 2, 3],
            "model type diffllama: lambda_init depends on the layer index, and layer 0 has no self_attn.o_proj.weight in floating point "
            f"that could make up for it, so this stack would load but compute something else; {INEXACT}",
        ),
        (
            {"num_hidden_layers": 4, "model_type": "funnel"},
            [0, 1, 2],
            "model type funnel: the layers stand in blocks between which the text is pooled, so this stack would not run as it is",
        ),
    ],
)
def test_refusals(tmp_path: Path, config: dict[str, Any], order: list[int], message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        cut(tmp_path / "m", config, config["num_hidden_layers"], order)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("groups", "order", "fits"),
    [
        (1, [0], True),
        (1, [0, 3, 3, 1, 5, 5, 5], True),
        (2, [0, 1, 3, 4], True),
        (2, [0, 1, 3, 4, 5], False),
        (2, [3, 4, 0, 1], False),
        (3, [0, 2, 4], True),
        (3, [0, 1, 2, 3], False),
    ],
)
def test_layers_that_take_the_weights_of_groups_in_turns(tmp_path: Path, groups: int, order: list[int], fits: bool) -> None:
    """ALBERT: the layers are a number; only it changes, and only where each layer keeps its group."""
    config = {"model_type": "albert", "num_hidden_layers": 6, "num_hidden_groups": groups, "inner_group_num": 2}
    tensors = {
        f"albert.encoder.albert_layer_groups.{at}.albert_layers.{part}.w": ("U8", (4,), b"....") for at in range(groups) for part in (0, 1)
    }
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config))
    source = Member(checkpoint, find_stack(checkpoint))
    assert (source.stack.shared, source.stack.depth, source.stack.place(next(iter(tensors)))) == (True, 6, None)
    if fits:
        assert json.loads(asked(source, order).text) == {**config, "num_hidden_layers": len(order)}
        return
    with pytest.raises(RefusedError, match="layers take the weights of groups in turns, and some would take those of another"):
        asked(source, order)


INKLING2 = {"model_type": "inkling2_text", "num_hidden_layers": 9, "n_layers_per_attn_res_block": 3, "layer_types": [S, S, F] * 3}


@pytest.mark.parametrize(
    ("gone", "size"),
    [((8,), 3), ((7, 8), 3), ((3, 4, 5), 3), ((6, 7, 8), 3), ((6,), None), ((3, 6), 7), ((1, 4, 7), 2), ((1,), None), ((3,), 5)],
)
def test_blocks_to_which_later_layers_attend(tmp_path: Path, gone: tuple[int, ...], size: int | None) -> None:
    """Inkling 2: queries of the layers stand beside them, those of attention from layer 1 on."""
    queries = [*(f"attn_queries.{at}" for at in range(8)), *(f"mlp_queries.{at}" for at in range(9))]
    names = [*(f"model.llm.layers.{at}.w" for at in range(9)), *(f"model.llm.attn_res.{query}" for query in queries)]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, {name: ("U8", (4,), b"....") for name in names}, INKLING2))
    source = Member(checkpoint, find_stack(checkpoint))
    places = {name: source.stack.place(name) for name in names}
    assert all(place is not None for place in places.values())
    if size is None:
        with pytest.raises(
            RefusedError, match=r"n_layers_per_attn_res_block = 3 \(first layers of the blocks to which later layers attend\) cannot"
        ):
            asked(source, without(9, *gone))
        return
    after = json.loads(asked(source, without(9, *gone)).text)
    assert after == {
        **INKLING2, "num_hidden_layers": 9 - len(gone), "n_layers_per_attn_res_block": size,
        "layer_types": [kind for at, kind in enumerate([S, S, F] * 3) if at not in gone],
    }  # fmt: skip


def test_as_many_groups_as_layers_are_layers(tmp_path: Path) -> None:
    config = {"model_type": "albert", "num_hidden_layers": 3, "num_hidden_groups": 3}
    done = cut(tmp_path / "m", config, 3, [0, 2, 2, 1], "albert.encoder.albert_layer_groups.")
    assert json.loads(done.text) == {**config, "num_hidden_layers": 4, "num_hidden_groups": 4}


HRM = {"model_type": "hrm_text", "num_hidden_layers": 24, "num_layers_per_stack": 3, "H_cycles": 2, "L_cycles": 3}


def test_two_stacks_that_run_in_cycles_are_cut_as_one(tmp_path: Path) -> None:
    """HRM: layer i is layer i of both modules, and one number counts how often all of them run."""
    tensors = {f"model.{module}.layers.{at}.w": ("U8", (4,), b"....") for module in ("H_module", "L_module") for at in range(3)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, HRM))
    source = Member(checkpoint, find_stack(checkpoint))
    assert source.stack.prefixes == ("model.H_module.layers.", "model.L_module.layers.")
    assert json.loads(asked(source, [0, 2]).text) == {**HRM, "num_hidden_layers": 16, "num_layers_per_stack": 2}
    assert json.loads(asked(source, [0, 1, 1, 2]).text) == {**HRM, "num_hidden_layers": 32, "num_layers_per_stack": 4}
    assert [(found.key, found.reason) for found in dependents(source)] == [
        ("num_layers_per_stack", "depth"),
        ("num_hidden_layers", "layers of both stacks in all cycles"),
    ]


def dory(*kinds: str, first: int = 1, looped: int | None = 2, last: int = 1, width: int = 2) -> dict[str, Any]:
    """A config of Dory: two entries a layer, or one."""
    listed = [part for kind in kinds for part in ((kind, "mlp") if width == 2 else (kind,))]
    counts = {"n_input_layers": first, "n_recurrent_layers": looped, "n_output_layers": last}
    sections = {key: None if count is None else width * count for key, count in counts.items()}
    return {"model_type": "dory", "num_hidden_layers": width * len(kinds), "layer_types": listed, **sections}


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(
    ("order", "sections"),
    [([1, 2, 3], (0, 2, 1)), ([0, 2, 3], (1, 1, 1)), ([0, 3], (1, 0, 1)), ([0, 1, 2], (1, 2, 0)), ([0, 1, 2, 1, 2, 3], (1, 4, 1))],
)
def test_a_loop_keeps_its_layers(tmp_path: Path, width: int, order: list[int], sections: tuple[int, int, int]) -> None:
    kinds = [S, S, S, F]
    done = cut(tmp_path / "m", dory(*kinds, width=width), 4, order)
    first, looped, last = sections
    assert json.loads(done.text) == dory(*(kinds[index] for index in order), first=first, looped=looped, last=last, width=width)


def test_layers_do_not_leave_the_loop(tmp_path: Path) -> None:
    with pytest.raises(
        RefusedError, match=r"n_output_layers = 2 \(layers before the loop, in it and behind it\) cannot describe the new order"
    ):
        cut(tmp_path / "m", dory(S, S, S, F), 4, [1, 0, 2, 3])


def test_an_absent_length_of_the_loop_stays_absent(tmp_path: Path) -> None:
    done = cut(tmp_path / "m", dory(S, S, S, F, looped=None), 4, [0, 2, 3])
    assert json.loads(done.text) == dory(S, S, F, looped=None)


def test_attention_and_mlp_that_are_stored_as_two_stay_together(tmp_path: Path) -> None:
    """The first files of Dory: a layer is two, and so is everything that the config says of it."""
    config = dory(S, S, S, F)
    done = cut(tmp_path / "m", config, 8, without(8, 2, 3), "backbone.layers.")
    assert json.loads(done.text) == dory(S, S, F, looped=1)
    source = member(tmp_path / "n", config, 8)
    assert (source.stack.depth, source.stack.depth_key.form) == (8, "number")
    with pytest.raises(RefusedError, match="the attention and the MLP of a layer stand in the file as two, the first of an even number"):
        asked(source, without(8, 2))
    for order in ([0, 1, 3, 2, 4, 5], [1, 2, 3, 4], [0, 3]):
        with pytest.raises(RefusedError, match="must stay together"):
            asked(source, order)


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        ([0, 2, 3, 4, 5], {"moe_layer_start_index": [1, 1], "moe_layer_end_index": [29, 3]}),
        ([1, 2, 3, 4, 5], {"moe_layer_start_index": [0, 1], "moe_layer_end_index": [29, 3]}),
        ([0, 1, 2, 3, 4], {}),
        ([0, 1, 2, 3, 5], {"moe_layer_end_index": [29, 3]}),
        ([1, 2, 3], {"moe_layer_start_index": [0, 1]}),
    ],
)
def test_experts_of_text_and_of_images_start_at_layers_of_their_own(tmp_path: Path, order: list[int], changes: dict[str, Any]) -> None:
    """ERNIE-VL: layer 5 has no experts of images."""
    config = {
        "num_hidden_layers": 6, "moe_layer_start_index": [1, 2], "moe_layer_end_index": [29, 4], "moe_layer_interval": 1,
    }  # fmt: skip
    done = cut(tmp_path / "m", config, 6, order)
    assert json.loads(done.text) == {**config, "num_hidden_layers": len(order), **changes}


def test_experts_of_text_and_of_images_cannot_say_every_order(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 6, "moe_layer_start_index": [1, 2], "moe_layer_end_index": [-1, -1]}
    with pytest.raises(
        RefusedError, match=r"moe_layer_start_index = \[1, 2\], moe_layer_end_index = \[-1, -1\] \(first, last and interval"
    ):
        cut(tmp_path / "m", config, 6, [2, 0, 3])


@pytest.mark.parametrize("name", ["eos_token_id", "architectures", "mrope_section", "keys_to_ignore_at_inference"])
def test_lists_that_have_the_length_by_chance(tmp_path: Path, name: str) -> None:
    config = {name: ["a", "b", "c", "d"], "num_hidden_layers": 4, "head_dim": 4, "num_experts": 4, "vocab_size": 4}
    done = cut(tmp_path / "m", config, 4, [0, 1])
    assert [edit.key for edit in done.edits] == ["num_hidden_layers"]


def test_a_window_that_is_off_does_not_stand_in_the_way(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 6, "use_sliding_window": False, "max_window_layers": 3}
    assert [edit.key for edit in cut(tmp_path / "m", config, 6, [0, 4, 1]).edits] == ["num_hidden_layers"]


def test_a_period_gives_way_to_its_list(tmp_path: Path) -> None:
    """gemma3: transformers reads the list, the period beside it is a fallback."""
    config = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3, "layer_types": [S, S, F, S, S, F]}
    done = cut(tmp_path / "m", config, 6, [0, 1, 5])
    assert {edit.key: edit.after for edit in done.edits} == {"num_hidden_layers": 3, "layer_types": [S, S, F]}
    del config["layer_types"]
    assert [edit.key for edit in cut(tmp_path / "n", config, 6, [0, 1, 2]).edits] == ["num_hidden_layers"]
    done = cut(tmp_path / "o", config, 6, [0, 1, 5, 2])  # the class reads a list where there is one: it is written out
    assert {edit.key: edit.after for edit in done.edits} == {"num_hidden_layers": 4, "layer_types": [S, S, F, F]}
    with pytest.raises(RefusedError, match=r"sliding_window_pattern = 3 \(period of layers\) cannot describe"):
        cut(tmp_path / "p", {**config, "model_type": "other"}, 6, [0, 1, 5, 2])


def test_case_20_only_the_node_of_the_stack_is_touched(tmp_path: Path) -> None:
    config = {
        "model_type": "mllama",
        "num_hidden_layers": 40,
        "layer_types": [1, 2, 3, 4, 5, 6, 7, 8],
        "text_config": {"num_hidden_layers": 8, "cross_attention_layers": [3]},
        "vision_config": {"num_hidden_layers": 8, "supported_aspect_ratios": [[1, n] for n in range(8)], "layer_types": list("abcdefgh")},
    }
    done = cut(tmp_path / "m", config, 8, without(8, 1), prefix="language_model.model.layers.")
    assert {edit.key: edit.after for edit in done.edits} == {"text_config.num_hidden_layers": 7, "text_config.cross_attention_layers": [2]}
    after = json.loads(done.text)
    assert after["vision_config"] == config["vision_config"]
    assert after["layer_types"] == config["layer_types"]


def test_case_23_the_text_tower_of_a_vision_model(tmp_path: Path) -> None:
    config = {
        "model_type": "gemma3",
        "vision_config": {"num_hidden_layers": 4, "layer_types": [S, S, S, S]},
        "text_config": {"num_hidden_layers": 4, "layer_types": [S, S, S, F], "sliding_window_pattern": 4},
    }
    done = cut(tmp_path / "m", config, 4, [0, 2, 3], prefix="language_model.model.layers.")
    assert {edit.key: edit.after for edit in done.edits} == {"text_config.num_hidden_layers": 3, "text_config.layer_types": [S, S, F]}
    assert json.loads(done.text)["vision_config"] == config["vision_config"]


def test_stale_aliases_are_edited_too(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 4, "num_hidden_layers": 4, "n_head": 4}
    done = cut(tmp_path / "m", config, 4, [0, 3], prefix="h.")
    assert json.loads(done.text) == {"model_type": "gpt2", "n_layer": 2, "num_hidden_layers": 2, "n_head": 4}


def test_the_whole_stack_leaves_the_text_alone(tmp_path: Path) -> None:
    text = '{"num_hidden_layers":2,  "unknown_list": [1,2], "model_type": "gemma4",\t"num_nextn_predict_layers": 0}'
    assert cut(tmp_path / "m", text, 2, [0, 1]) == Surgery(text, ())


SPELLINGS = {
    "two spaces": json.dumps(
        {"rope_theta": 1e6, "a": "é", "layer_types": list("abcd"), "num_hidden_layers": 4, "z": {"y": [9, 9]}}, indent=2
    ),
    "four spaces": json.dumps({"a": "é", "num_hidden_layers": 4, "layer_types": list("abcd"), "z": None}, indent=4, ensure_ascii=False),
    "tabs": json.dumps({"layer_types": list("abcd"), "num_hidden_layers": 4, "z": []}, indent="\t"),
    "carriage returns": json.dumps({"layer_types": list("abcd"), "num_hidden_layers": 4, "z": []}, indent=2).replace("\n", "\r\n"),
    "odd numbers": '{\n  "eps": 1e-05,\n  "big": 1E5,\n  "minus": -0.0,\n  "num_hidden_layers": 4,\n  "long": 1.0000000000000000001\n}\n',
    "escapes": '{\n  "s": "\\u00e9\\/\\ud83d\\ude00",\n  "k\\u0065y": 1,\n  "num_hidden_layers": 4\n}',
    "blanks": '\n {\n\n  "num_hidden_layers"   :   4 ,\n\n  "a":1   \n}\n\n',
    "a line a list": '{\n  "layer_types": ["a", "b",\n     "c", "d"],\n  "num_hidden_layers": 4,\n  "b": 1e-05}',
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_only_the_lines_of_edited_values_change(tmp_path: Path, name: str) -> None:
    text = SPELLINGS[name]
    done = cut(tmp_path / "m", text, 4, [0, 3])
    gone = [line[2:] for line in difflib.ndiff(text.split("\n"), done.text.split("\n")) if line.startswith("- ")]
    come = [line[2:] for line in difflib.ndiff(text.split("\n"), done.text.split("\n")) if line.startswith("+ ")]
    assert any('"num_hidden_layers"' in line and "4" in line for line in gone)
    for line in gone + come:
        assert (
            "num_hidden_layers" in line or '"layer_types"' in line or line.strip().strip("],") in ('"a"', '"b"', '"c"', '"d"', '"c", "d"')
        ), line
    assert json.loads(done.text) == {
        key: {"num_hidden_layers": 2, "layer_types": ["a", "d"]}.get(key, value) for key, value in json.loads(text).items()
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("two spaces", '  "layer_types": [\n    "a",\n    "d"\n  ],\n  "num_hidden_layers": 2,'),
        ("four spaces", '    "num_hidden_layers": 2,\n    "layer_types": [\n        "a",\n        "d"\n    ],'),
        ("tabs", '\t"layer_types": [\n\t\t"a",\n\t\t"d"\n\t],\n\t"num_hidden_layers": 2,'),
        ("carriage returns", '  "layer_types": [\r\n    "a",\r\n    "d"\r\n  ],\r\n  "num_hidden_layers": 2,'),
        ("odd numbers", '  "eps": 1e-05,\n  "big": 1E5,\n  "minus": -0.0,\n  "num_hidden_layers": 2,\n  "long": 1.0000000000000000001\n'),
        ("escapes", '  "s": "\\u00e9\\/\\ud83d\\ude00",\n  "k\\u0065y": 1,\n  "num_hidden_layers": 2\n'),
        ("blanks", '\n {\n\n  "num_hidden_layers"   :   2 ,\n\n  "a":1   \n}\n\n'),
        ("a line a list", '{\n  "layer_types": ["a", "d"],\n  "num_hidden_layers": 2,\n  "b": 1e-05}'),
    ],
)
def test_spelling_is_kept(tmp_path: Path, name: str, expected: str) -> None:
    assert expected in cut(tmp_path / "m", SPELLINGS[name], 4, [0, 3]).text


def test_a_config_on_one_line(tmp_path: Path) -> None:
    text = '{"a":1e-05,"layer_types":["a","b","c","d"],"num_hidden_layers":4,"b":[9,9]}'
    assert cut(tmp_path / "m", text, 4, [1, 1]).text == '{"a":1e-05,"layer_types":["b", "b"],"num_hidden_layers":2,"b":[9,9]}'


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_qwen3_lists_are_gathered_for_any_order(tmp_path_factory: pytest.TempPathFactory, order: list[int]) -> None:
    done = cut(tmp_path_factory.getbasetemp() / "any", {"num_hidden_layers": 6, "layer_types": list("abcdef")}, 6, order)
    after = json.loads(done.text)
    assert after == {"num_hidden_layers": len(order), "layer_types": ["abcdef"[index] for index in order]}


def test_what_a_config_says_of_layers_can_be_listed(tmp_path: Path) -> None:
    source = member(tmp_path / "m", KIMI, 6)
    assert dependents(source) == [
        Dependent("num_hidden_layers", 6, "depth"),
        Dependent("first_k_dense_replace", 1, "number of first layers"),
        Dependent("linear_attn_config.full_attn_layers", [3, 6], "list of layer numbers from 1"),
        Dependent("linear_attn_config.kda_layers", [1, 2, 4, 5], "list of layer numbers from 1"),
        Dependent("mlp_layer_types", ["dense", *["sparse"] * 5], "one entry a layer, made by the class"),
        Dependent("layer_types", [L, L, F, L, L, F], "one entry a layer, made by the class"),
    ]


TIE = Edit(key="tie_word_embeddings", before=None, after=False, reason="a head")
DTYPE = Edit(key="text_config.dtype", before="float32", after="bfloat16", reason="dtype")


def asked(source: Member, order: Sequence[int], *more: Edit) -> Surgery:
    refs = [LayerRef(model="m", index=index) for index in order]
    return operate(source.checkpoint.config_text, "m", {"m": source}, refs, more)


def test_edits_that_are_asked_for_are_made_on_an_unchanged_stack(tmp_path: Path) -> None:
    text = '{"num_hidden_layers": 2,  "unknown_list": [1,2],\t"model_type": "gemma4"}'
    done = asked(member(tmp_path / "m", text, 2), [0, 1], TIE)
    assert done.text == '{"num_hidden_layers": 2,  "unknown_list": [1,2],\t"model_type": "gemma4", "tie_word_embeddings": false}'
    assert done.edits == (TIE,)


def test_edits_that_are_asked_for_come_after_those_of_the_layers(tmp_path: Path) -> None:
    config = {"text_config": {"num_hidden_layers": 3, "dtype": "float32"}, "model_type": "x"}
    done = asked(member(tmp_path / "m", config, 3), [0, 2], DTYPE, TIE)
    assert [edit.key for edit in done.edits] == ["text_config.num_hidden_layers", "text_config.dtype", "tie_word_embeddings"]
    after = {"text_config": {"num_hidden_layers": 2, "dtype": "bfloat16"}, "model_type": "x", "tie_word_embeddings": False}
    assert json.loads(done.text) == after
    assert list(json.loads(done.text)) == list(after)


def test_a_stack_of_two_models_gathers_what_each_says_of_its_layers(tmp_path: Path) -> None:
    one = member(tmp_path / "a", {"num_hidden_layers": 3, "layer_types": ["a0", "a1", "a2"], "first_k_dense_replace": 1}, 3)
    two = member(tmp_path / "b", {"num_hidden_layers": 2, "layer_types": ["b0", "b1"], "first_k_dense_replace": 0}, 2)
    order = [LayerRef(model="a", index=0), LayerRef(model="b", index=1), LayerRef(model="a", index=2)]
    done = operate(one.checkpoint.config_text, "a", {"a": one, "b": two}, order)
    assert json.loads(done.text) == {"num_hidden_layers": 3, "layer_types": ["a0", "b1", "a2"], "first_k_dense_replace": 1}
    assert [edit.key for edit in done.edits] == ["layer_types"]


def test_layers_with_arithmetic_follow_their_source(tmp_path: Path) -> None:
    """A copy that adds nothing, and an average are layers of the config as any other."""
    source = member(tmp_path / "m", {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}, 3)
    order = [
        LayerRef(model="m", index=0),
        LayerRef(model="m", index=0, identity=True),
        LayerRef(model="m", index=1, span=2, shares=(Share(model="m", index=1, weight=0.5), Share(model="m", index=2, weight=0.5))),
    ]
    done = operate(source.checkpoint.config_text, "m", {"m": source}, order)
    assert json.loads(done.text) == {"num_hidden_layers": 3, "layer_types": ["a", "a", "b"]}


def test_what_only_one_of_two_models_says_cannot_be_described(tmp_path: Path) -> None:
    one = member(tmp_path / "a", {"num_hidden_layers": 2, "layer_types": ["x", "y"]}, 2)
    two = member(tmp_path / "b", {"num_hidden_layers": 2}, 2)
    order = [LayerRef(model="a", index=0), LayerRef(model="b", index=1)]
    with pytest.raises(RefusedError) as caught:
        operate(one.checkpoint.config_text, "a", {"a": one, "b": two}, order)
    assert str(caught.value) == "config.json: layer_types is set in 'a' but not in 'b': one config cannot describe both"
