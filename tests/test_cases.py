"""Models that tools get wrong, each cut where that shows, with the values that config.json must have afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import write_checkpoint

from layercut import run_recipe
from layercut.errors import LayercutError
from layercut.recipe import Recipe


def model(folder: Path, config: dict[str, Any], *prefixes: str, **extra: tuple[str, tuple[int, ...], bytes]) -> Path:
    """A checkpoint of bytes: every prefix has as many layers as it says behind a colon."""
    tensors = {}
    for prefix in prefixes:
        name, _, depth = prefix.partition(":")
        tensors |= {f"{name}{at}.w": ("U8", (4,), bytes([at] * 4)) for at in range(int(depth))}
    return write_checkpoint(folder, {**tensors, **extra}, config)


def cut(source: Path, out: Path, *gone: int, **recipe: Any) -> dict[str, Any]:
    """config.json without these layers."""
    asked = {"model": str(source), "steps": [{"prune": {"at": list(gone)}}], "output": str(out), **recipe}
    run_recipe(Recipe.model_validate(asked), progress=False)
    config: dict[str, Any] = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return config


def written(out: Path) -> dict[str, int]:
    """The first byte of every tensor, which says what layer it was."""
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "np") as file:
        return {name: int(file.get_tensor(name).ravel()[0]) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def values(out: Path, name: str) -> list[float]:
    """The values of a tensor."""
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", "np") as file:
        found: list[float] = file.get_tensor(name).ravel().tolist()
        return found


def test_minicpm3_keeps_its_residual_scale(tmp_path: Path) -> None:
    source = model(tmp_path / "m", {"model_type": "minicpm3", "num_hidden_layers": 6, "scale_depth": 1.4}, "model.layers.:6")
    config = cut(source, tmp_path / "out", 2)
    assert config["num_hidden_layers"] == 5
    assert config["scale_depth"] == pytest.approx(1.4 * math.sqrt(5 / 6), rel=1e-15)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_bart_has_a_second_name_for_the_depth_of_its_encoder(stack: str, tmp_path: Path) -> None:
    given = {"model_type": "bart", "encoder_layers": 4, "decoder_layers": 3, "num_hidden_layers": 4}
    source = model(tmp_path / "m", given, "model.encoder.layers.:4", "model.decoder.layers.:3")
    config = cut(source, tmp_path / "out", 1, stack=stack)
    after = {"encoder_layers": 3, "num_hidden_layers": 3} if stack == "encoder" else {"decoder_layers": 2}
    assert config == {**given, **after}
    assert written(tmp_path / "out")[f"model.{stack}.layers.1.w"] == 2


def test_t5_gets_the_depth_of_its_decoder_written_and_its_bias_moved(tmp_path: Path) -> None:
    bias = {
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("U8", (2,), b"\x63\x63") for side in ("encoder", "decoder")
    }
    given = {"model_type": "t5", "num_layers": 4}
    source = model(tmp_path / "m", given, "encoder.block.:4", "decoder.block.:4", **bias)
    config = cut(source, tmp_path / "out", 0, stack="encoder")
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 4)
    found = written(tmp_path / "out")
    assert found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == 0x63
    assert found["encoder.block.0.w"] == 1 and found["decoder.block.3.w"] == 3
    config = cut(source, tmp_path / "decoder", 0)
    assert (config["num_layers"], config["num_decoder_layers"]) == (4, 3)


def test_led_keeps_the_windows_of_its_encoder_when_the_decoder_is_cut(tmp_path: Path) -> None:
    given = {"model_type": "led", "encoder_layers": 4, "decoder_layers": 4, "attention_window": [4, 4, 8, 8]}
    source = model(tmp_path / "m", given, "led.encoder.layers.:4", "led.decoder.layers.:4")
    assert cut(source, tmp_path / "decoder", 1) == {**given, "decoder_layers": 3}
    assert cut(source, tmp_path / "encoder", 1, stack="encoder") == {**given, "encoder_layers": 3, "attention_window": [4, 8, 8]}


def test_mixtral_has_experts_inside_its_layers(tmp_path: Path) -> None:
    experts = {
        f"model.layers.{at}.mlp.experts.{number}.w": ("U8", (4,), bytes([at * 10 + number] * 4)) for at in range(4) for number in range(4)
    }
    source = model(tmp_path / "m", {"model_type": "mixtral", "num_hidden_layers": 4, "num_local_experts": 4}, "model.layers.:4", **experts)
    assert cut(source, tmp_path / "out", 1)["num_local_experts"] == 4
    found = written(tmp_path / "out")
    assert [found[f"model.layers.1.mlp.experts.{number}.w"] for number in range(4)] == [20, 21, 22, 23]


def test_xlm_keeps_its_layers_in_four_lists(tmp_path: Path) -> None:
    lists = [f"transformer.{name}.:4" for name in ("attentions", "layer_norm1", "ffns", "layer_norm2")]
    source = model(tmp_path / "m", {"model_type": "xlm", "n_layers": 4}, *lists)
    assert cut(source, tmp_path / "out", 1)["n_layers"] == 3
    found = written(tmp_path / "out")
    assert all([found[f"{name[:-1].rstrip(':')}{at}.w"] for at in range(3)] == [0, 2, 3] for name in lists)


def test_zaya_has_no_router_state_before_its_first_layer(tmp_path: Path) -> None:
    scales = {f"model.layers.{at}.mlp.gate.router_states_scale": ("F32", (1,), bytes([0, 0, 0, 60 + at])) for at in range(1, 4)}
    source = model(tmp_path / "m", {"model_type": "zaya", "num_hidden_layers": 4}, "model.layers.:4", **scales)
    cut(source, tmp_path / "out", 0)
    names = {name for name in written(tmp_path / "out") if "scale" in name}
    assert names == {f"model.layers.{at}.mlp.gate.router_states_scale" for at in (1, 2)}
    turned = {
        "slices": [{"model": str(source), "layer_range": [start, start + 1]} for start in (2, 0, 3)],
        "output": str(tmp_path / "turned"),
    }
    run_recipe(Recipe.model_validate(turned), progress=False)
    data = (tmp_path / "turned" / "model.safetensors").read_bytes()
    assert written(tmp_path / "turned")["model.layers.1.w"] == 0
    assert bytes([0, 0, 0, 63]) in data and bytes([0, 0, 0, 62]) not in data  # layer 0 takes nothing of the state: a scale of zero
    assert values(tmp_path / "turned", "model.layers.1.mlp.gate.router_states_scale") == [0.0]


def albert(folder: Path) -> Path:
    given = {"model_type": "albert", "num_hidden_layers": 6, "num_hidden_groups": 1}
    return model(
        folder, given, "albert.encoder.albert_layer_groups.:1", **{"albert.embeddings.word_embeddings.weight": ("U8", (2,), b"ww")}
    )


def test_albert_has_a_number_of_layers_only(tmp_path: Path) -> None:
    source = albert(tmp_path / "m")
    for gone in ((0,), (1, 4), (2, 3, 5)):
        assert cut(source, tmp_path / f"{len(gone)}", *gone)["num_hidden_layers"] == 6 - len(gone)
    names = ["albert.embeddings.word_embeddings.weight", "albert.encoder.albert_layer_groups.0.w"]
    assert list(written(tmp_path / "3")) == sorted(names)
    asked = {"model": str(source), "steps": [{"duplicate": {"at": [2, 3]}}], "output": str(tmp_path / "more")}
    run_recipe(Recipe.model_validate(asked), progress=False)
    assert json.loads((tmp_path / "more" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 8


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"slices": [{"model": "m", "layer_range": [0, 3]}, {"model": "n", "layer_range": [3, 6]}]},
            "one set of weights serves several layers: they cannot be mixed with those of other models",
        ),
        (
            {"model": "m", "steps": [{"merge": {"at": [1, 2]}}]},
            "layer 1: one set of weights serves several layers: none of them can be changed by itself",
        ),
    ],
)
def test_layers_of_albert_are_not_changed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Any, message: str) -> None:
    for name in ("m", "n"):
        albert(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LayercutError) as caught:
        run_recipe(Recipe.model_validate({**recipe, "output": "out"}), progress=False)
    assert message in str(caught.value)


def test_rwkv_norms_its_embeddings_before_the_first_layer_whichever_it_is(tmp_path: Path) -> None:
    norm = {"rwkv.blocks.0.pre_ln.weight": ("U8", (4,), b"norm")}
    source = model(tmp_path / "m", {"model_type": "rwkv", "num_hidden_layers": 4}, "rwkv.blocks.:4", **norm)
    for gone in (0, 2):
        cut(source, tmp_path / f"{gone}", gone)
        found = written(tmp_path / f"{gone}")
        assert [name for name in found if "pre_ln" in name] == ["rwkv.blocks.0.pre_ln.weight"]
        assert found["rwkv.blocks.0.pre_ln.weight"] == ord("n") and found["rwkv.blocks.0.w"] == (gone == 0)


def test_inkling2_keeps_the_queries_of_its_layers_beside_them(tmp_path: Path) -> None:
    queries = {f"model.llm.attn_res.attn_queries.{at}": ("U8", (1,), bytes([10 + at])) for at in range(3)}
    queries |= {f"model.llm.attn_res.mlp_queries.{at}": ("U8", (1,), bytes([20 + at])) for at in range(4)}
    queries["model.llm.attn_res.output_query"] = ("U8", (1,), b"q")
    given = {"model_type": "inkling2_text", "num_hidden_layers": 4, "n_layers_per_attn_res_block": 2, "layer_types": ["hybrid"] * 4}
    source = model(tmp_path / "m", given, "model.llm.layers.:4", **queries)
    config = cut(source, tmp_path / "out", 2)
    assert (config["num_hidden_layers"], config["n_layers_per_attn_res_block"]) == (3, 3)
    assert {name.removeprefix("model.llm."): value for name, value in written(tmp_path / "out").items()} == {
        "layers.0.w": 0, "layers.1.w": 1, "layers.2.w": 3,
        "attn_res.attn_queries.0": 10, "attn_res.attn_queries.1": 12,
        "attn_res.mlp_queries.0": 20, "attn_res.mlp_queries.1": 21, "attn_res.mlp_queries.2": 23,
        "attn_res.output_query": ord("q"),
    }  # fmt: skip


def test_blt_is_cut_in_its_middle_unless_another_stack_is_asked_for(tmp_path: Path) -> None:
    given = {"model_type": "blt", **{f"{name}_config": {"num_hidden_layers": 3} for name in ("encoder", "decoder", "global", "patcher")}}
    stacks = (
        "local_encoder.layers",
        "local_decoder.cross_attn_layers",
        "local_decoder.layers",
        "global_transformer.layers",
        "patcher.layers",
    )
    source = model(tmp_path / "m", given, *(f"model.{name}.:3" for name in stacks))
    assert cut(source, tmp_path / "out", 1) == {**given, "global_config": {"num_hidden_layers": 2}}
    found = written(tmp_path / "out")
    assert found["model.global_transformer.layers.1.w"] == 2 and found["model.local_decoder.layers.1.w"] == 1
    assert cut(source, tmp_path / "decoder", 1, stack="decoder")["decoder_config"] == {"num_hidden_layers": 2}
    found = written(tmp_path / "decoder")
    assert all(found[f"model.local_decoder.{name}.1.w"] == 2 for name in ("layers", "cross_attn_layers"))
    assert found["model.global_transformer.layers.1.w"] == 1
    assert cut(source, tmp_path / "patcher", 1, stack="patcher")["patcher_config"] == {"num_hidden_layers": 2}


def test_norms_of_that_name_that_every_layer_has_are_of_the_layers(tmp_path: Path) -> None:
    norms = {f"model.layers.{at}.pre_ln.weight": ("U8", (1,), bytes([10 + at])) for at in range(4)}
    source = model(tmp_path / "m", {"model_type": "novel", "num_hidden_layers": 4}, "model.layers.:4", **norms)
    cut(source, tmp_path / "out", 0)
    found = written(tmp_path / "out")
    assert [found[f"model.layers.{at}.pre_ln.weight"] for at in range(3)] == [11, 12, 13]


def test_a_stack_of_two_rwkv_norms_the_embeddings_that_it_has(tmp_path: Path) -> None:
    names = {"a": b"a", "b": b"b"}
    for name, label in names.items():
        norm = {"rwkv.blocks.0.pre_ln.weight": ("U8", (1,), label)}
        model(tmp_path / name, {"model_type": "rwkv", "num_hidden_layers": 3}, "rwkv.blocks.:3", **norm)
    slices = [{"model": str(tmp_path / name), "layer_range": span} for name, span in (("a", [1, 3]), ("b", [0, 2]))]
    run_recipe(Recipe.model_validate({"slices": slices, "output": str(tmp_path / "out")}), progress=False)
    found = written(tmp_path / "out")
    assert {name: value for name, value in found.items() if "pre_ln" in name} == {"rwkv.blocks.0.pre_ln.weight": ord("a")}
    assert [found[f"rwkv.blocks.{at}.w"] for at in range(4)] == [1, 2, 0, 1]


@pytest.mark.parametrize(("gone", "message"), [(0, "the first layer has no attention norm"), (3, None)])
def test_modernbert_needs_its_first_layer(gone: int, message: str | None, tmp_path: Path) -> None:
    source = model(tmp_path / "m", {"model_type": "modernbert-decoder", "num_hidden_layers": 8}, "model.layers.:8")
    if message is None:
        assert cut(source, tmp_path / "out", gone)["num_hidden_layers"] == 7
        return
    with pytest.raises(LayercutError, match=message):
        cut(source, tmp_path / "out", gone)


def test_gpt_neo_spells_kinds_as_runs(tmp_path: Path) -> None:
    kinds = ["global", "local"] * 4
    given = {"model_type": "gpt_neo", "num_layers": 8, "attention_types": [[["global", "local"], 4]], "attention_layers": kinds}
    source = model(tmp_path / "m", given, "transformer.h.:8")
    config = cut(source, tmp_path / "out", 1)
    assert config["attention_layers"] == [kinds[at] for at in range(8) if at != 1]
    assert [kind for run, times in config["attention_types"] for _ in range(times) for kind in run] == config["attention_layers"]
    assert cut(source, tmp_path / "pair", 2, 3)["attention_types"] == [[["global", "local"], 3]]


def test_longcat_counts_halves_of_layers(tmp_path: Path) -> None:
    source = model(tmp_path / "m", {"model_type": "longcat_flash", "num_layers": 4, "num_hidden_layers": 8}, "model.layers.:4")
    assert cut(source, tmp_path / "out", 1) == {"model_type": "longcat_flash", "num_layers": 3, "num_hidden_layers": 6}


SOURCES = [0, 1, 1, 3, 3, 5, 5, 7]


@pytest.mark.parametrize(("gone", "after"), [(0, [0, 0, 2, 2, 4, 4, 6]), (2, [0, 1, 2, 2, 4, 4, 6]), (1, None), (3, None), (5, None)])
def test_layers_that_read_keys_of_others_name_them(gone: int, after: list[int] | None, tmp_path: Path) -> None:
    source = model(
        tmp_path / "m", {"model_type": "mistral_large4_text", "num_hidden_layers": 8, "kv_source_layers": SOURCES}, "model.layers.:8"
    )
    if after is not None:
        assert cut(source, tmp_path / "out", gone)["kv_source_layers"] == after
        return
    with pytest.raises(LayercutError, match=rf"reads the keys and values of layer {gone}, which does not stand before it any more"):
        cut(source, tmp_path / "out", gone)


def test_whisper_heads_follow_in_the_other_file(tmp_path: Path) -> None:
    given = {"model_type": "whisper", "encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3}
    source = model(tmp_path / "m", given, "model.encoder.layers.:3", "model.decoder.layers.:3")
    (source / "generation_config.json").write_text('{"alignment_heads": [[0, 5], [1, 2], [2, 4]], "max_length": 448}', encoding="utf-8")
    cut(source, tmp_path / "out", 1)
    after = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert after == {"alignment_heads": [[0, 5], [1, 4]], "max_length": 448}


@pytest.mark.parametrize(
    ("config", "prefixes", "gone", "after"),
    [
        pytest.param(
            {
                "model_type": "mllama",
                "text_config": {"model_type": "mllama_text_model", "num_hidden_layers": 8, "cross_attention_layers": [3]},
                "vision_config": {
                    "model_type": "mllama_vision_model",
                    "num_hidden_layers": 3,
                    "supported_aspect_ratios": [[1, n] for n in range(8)],
                },
            },
            ["language_model.model.layers.:8"],
            [1],
            {"text_config.num_hidden_layers": 7, "text_config.cross_attention_layers": [2]},
            id="20 mllama",
        ),
        pytest.param({"model_type": "gpt2", "n_layer": 2}, ["h.:2"], [0], {"n_layer": 1}, id="22 gpt2, saved by its base class"),
        pytest.param(
            {
                "model_type": "gemma3",
                "vision_config": {"num_hidden_layers": 4, "layer_types": ["x"] * 4},
                "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 4, "layer_types": list("abcd")},
            },
            ["language_model.model.layers.:4", "vision_tower.vision_model.encoder.layers.:4"],
            [1],
            {"text_config.num_hidden_layers": 3, "text_config.layer_types": list("acd")},
            id="23 gemma3: both towers are as deep",
        ),
        pytest.param(
            {
                "model_type": "kimi_linear",
                "num_hidden_layers": 6,
                "first_k_dense_replace": 1,
                "mlp_layer_types": ["dense"] + ["sparse"] * 5,
                "linear_attn_config": {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5]},
            },
            ["model.layers.:6"],
            [2],
            {
                "num_hidden_layers": 5,
                "linear_attn_config.full_attn_layers": [5],
                "linear_attn_config.kda_layers": [1, 2, 3, 4],
                "mlp_layer_types": ["dense"] + ["sparse"] * 4,
            },
            id="14 kimi_linear: numbers from 1",
        ),
        pytest.param(
            {"model_type": "nemotron_h", "hybrid_override_pattern": "ME*-M*"},
            ["backbone.layers.:6"],
            [3],
            {"hybrid_override_pattern": "ME*M*"},
            id="7 nemotron_h: letters are the depth",
        ),
        pytest.param(
            {"model_type": "modernbert-decoder", "num_hidden_layers": 8},
            ["model.layers.:8"],
            [1, 2, 3],
            {"num_hidden_layers": 5},
            id="18 modernbert-decoder: a block behind the first layer",
        ),
    ],
)
def test_only_these_values_change(
    config: dict[str, Any], prefixes: list[str], gone: list[int], after: dict[str, Any], tmp_path: Path
) -> None:
    found = cut(model(tmp_path / "m", config, *prefixes), tmp_path / "out", *gone)
    expected = json.loads(json.dumps(config))
    for key, value in after.items():
        *node, last = key.split(".")
        holder = expected
        for part in node:
            holder = holder[part]
        holder[last] = value
    assert found == expected
    name, _, depth = prefixes[0].partition(":")
    kept = [at for at in range(int(depth)) if at not in gone]
    layers = {f"{name}{at}.w": index for at, index in enumerate(kept)}
    others = {f"{name}{at}.w": at for name, _, count in (p.partition(":") for p in prefixes[1:]) for at in range(int(count))}
    assert written(tmp_path / "out") == {**layers, **others}


# Saved by transformers, cut on the disk, loaded again: the same logits as with the layers skipped in memory


S, F, L = "sliding_attention", "full_attention", "linear_attention"
BASE = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
MLA = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16,
}  # fmt: skip
QWEN3 = {"num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3, "layer_types": [S, F] * 3}
GEMMA = {
    "num_hidden_layers": 12, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160,
    "sliding_window": 4,
}  # fmt: skip
GEMMA3N = {
    **GEMMA, "intermediate_size": 48, "activation_sparsity_pattern": [0.9, 0.0, 0.9] + [0.0] * 9, "laurel_rank": 4, "altup_num_inputs": 2,
    "layer_types": [S, S, S, S, F] * 2 + [S, S],
}  # fmt: skip
GEMMA4 = {**GEMMA, "global_head_dim": 16, "layer_types": [S, S, S, S, S, F] * 2}
JAMBA = {
    "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
ZAMBA = {
    "num_hidden_layers": 8, "layers_block_type": [L, L, "hybrid", L, L, "hybrid", L, "hybrid"], "attention_hidden_size": 64,
    "attention_head_dim": 16, "mamba_dt_rank": 4, "mamba_d_state": 8, "num_key_value_heads": 4, "use_mamba_kernels": False,
}  # fmt: skip
NEMOTRON = {
    "layers_block_type": [L, "moe", F, "mlp", L, F], "n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "chunk_size": 8,
}  # fmt: skip
PRODUCERS = "layers read keys and values of layers that would be gone, or others (num_kv_shared_layers)"
ELSE = "so this stack would load but compute something else; to write it all the same, say 'allow: inexact' in the recipe"


def saved(folder: Path, kind: str, config: dict[str, Any]) -> Any:
    """A tiny random model, saved, and as transformers loads it again."""
    import oracle
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.no_grad():
        made = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**{**BASE, **config})).float()
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.save_pretrained(folder)
    loaded = oracle.load(folder)
    assert not loaded.problems
    return loaded.model


@pytest.mark.usefixtures("quietly")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "config", "gone", "after"),
    [
        ("qwen3", QWEN3, [0], {"num_hidden_layers": 5, "max_window_layers": 2, "layer_types": [F, S, F, S, F]}),
        (
            "hunyuan_v1_moe",
            {"num_hidden_layers": 6, "num_experts": 4, "moe_topk": [2, 1, 2, 1, 2, 1]},
            [2],
            {"num_hidden_layers": 5, "moe_topk": [2, 1, 1, 2, 1]},
        ),
        (
            "deepseek_v3",
            {
                **MLA,
                "num_hidden_layers": 5,
                "first_k_dense_replace": 2,
                "n_routed_experts": 8,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 4,
                "head_dim": 8,
            },
            [1],
            {"num_hidden_layers": 4, "first_k_dense_replace": 1},
        ),
        ("jamba", JAMBA, [0, 1, 2, 3], {"num_hidden_layers": 4}),
        ("jamba", JAMBA, [0, 1], {"num_hidden_layers": 6, "attn_layer_offset": 0}),
        # gemma 4: 8 to 10 read the keys and values of layer 7, and 11 those of layer 5; the last layer must be one of full attention
        ("gemma4_text", GEMMA4, [1], {"num_hidden_layers": 11, "layer_types": [S] * 4 + [F] + [S] * 5 + [F]}),
        ("gemma4_text", GEMMA4, [9], {"num_hidden_layers": 11, "num_kv_shared_layers": 3, "layer_types": [S] * 5 + [F] + [S] * 4 + [F]}),
        (
            "gemma4_text",
            GEMMA4,
            [8, 10],
            {"num_hidden_layers": 10, "num_kv_shared_layers": 2, "layer_types": [S] * 5 + [F] + [S] * 3 + [F]},
        ),
        (  # a producer may go with all that read it
            "gemma4_text",
            GEMMA4,
            [7, 8, 9, 10],
            {"num_hidden_layers": 8, "num_kv_shared_layers": 1, "layer_types": [S] * 5 + [F, S, F]},
        ),
        # gemma 3n: 8, 10 and 11 read layer 7, and 9 reads layer 4
        ("gemma3n_text", GEMMA3N, [1], {"num_hidden_layers": 11, "layer_types": [S, S, S, F, S, S, S, S, F, S, S]}),
        ("gemma3n_text", GEMMA3N, [10], {"num_hidden_layers": 11, "num_kv_shared_layers": 3, "layer_types": [S, S, S, S, F] * 2 + [S]}),
        (
            "gemma3n_text",
            GEMMA3N,
            [8, 9, 10, 11],
            {"num_hidden_layers": 8, "num_kv_shared_layers": 0, "layer_types": [S] * 4 + [F] + [S] * 3},
        ),
        ("gemma3n_text", GEMMA3N, [4, 9], {"num_hidden_layers": 10, "num_kv_shared_layers": 3, "layer_types": [S] * 10}),
        ("zamba", ZAMBA, [2], {"num_hidden_layers": 7, "layers_block_type": [L, L, L, L, "hybrid", L, "hybrid"]}),
        ("nemotron_h", NEMOTRON, [3], {"layers_block_type": [L, "moe", F, L, F]}),
        (
            "llama4_text",
            {
                "num_hidden_layers": 8,
                "interleave_moe_layer_step": 2,
                "num_local_experts": 4,
                "attention_chunk_size": 4,
                "intermediate_size_mlp": 64,
            },
            [2],
            {"num_hidden_layers": 7, "moe_layers": [1, 2, 4, 6], "no_rope_layers": [1, 1, 0, 1, 1, 1, 0]},
        ),
        (
            "qwen3_moe",
            {"num_hidden_layers": 6, "mlp_only_layers": [1, 4], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            [0],
            {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]},
        ),
        ("diffllama", {"num_hidden_layers": 4}, [0], {"num_hidden_layers": 3}),
        ("modernbert-decoder", {"num_hidden_layers": 8, "local_attention": 4}, [2, 3, 4], {"num_hidden_layers": 5}),
    ],
)
def test_the_cut_computes_what_its_layers_did(
    kind: str, config: dict[str, Any], gone: list[int], after: dict[str, Any], tmp_path: Path
) -> None:
    import oracle

    source = saved(tmp_path / "m", kind, config)
    before = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    found = cut(tmp_path / "m", tmp_path / "out", *gone)
    assert {key: found.get(key) for key in after} == after
    kept = [index for index in range(before.get("num_hidden_layers", len(NEMOTRON["layers_block_type"]))) if index not in gone]
    if "per_layer_config" in before:
        old, width = before["per_layer_config"], len(next(iter(before["per_layer_config"])))
        new = {str(at).zfill(width): old[key] for at, index in enumerate(kept) if (key := str(index).zfill(width)) in old}
        assert found["per_layer_config"] == new
    assert set(found) == set(before) | set(after) - {"num_hidden_layers"}, "no key comes or goes but those that are written out"
    loaded = oracle.load(tmp_path / "out")
    assert loaded.problems == ()
    for name in (n for n, p in loaded.model.named_parameters() if n.endswith("embed_tokens_per_layer.weight")):
        assert loaded.model.get_parameter(name).shape[1] == 8 * len(kept)
    (lists,) = oracle.stacks(source, len(source.config.layer_types) if kind == "nemotron_h" else source.config.num_hidden_layers).values()
    with oracle.skipped(source, lists, gone):
        wanted = oracle.logits(source)
    assert oracle.difference(oracle.logits(source), wanted) > 1e-3, "layers that do nothing prove nothing"
    assert oracle.difference(oracle.logits(loaded.model), wanted) < 2e-4
    if kind.startswith("gemma"):
        assert oracle.generated(loaded.model, True).ids == oracle.generated(loaded.model, False).ids


@pytest.mark.usefixtures("quietly")
@pytest.mark.filterwarnings("ignore")
def test_deepseek_without_its_prediction_layer(tmp_path: Path) -> None:
    """Six layers in the file and five in the config: the sixth predicts further tokens, and does not move up."""
    import oracle
    import torch
    from safetensors.torch import load_file, save_file

    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4}
    source = saved(tmp_path / "m", "deepseek_v3", {**MLA, **experts, "num_hidden_layers": 5, "first_k_dense_replace": 2})
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    names = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    save_file(
        tensors | {f"model.layers.5.{name}": torch.ones(32) for name in names}, tmp_path / "m" / "model.safetensors", {"format": "pt"}
    )
    said = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "m" / "config.json").write_text(json.dumps({**said, "num_nextn_predict_layers": 1}), encoding="utf-8")
    after = cut(tmp_path / "m", tmp_path / "out", 1)
    assert {key: value for key, value in after.items() if said.get(key) != value} == {
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    }
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if ".layers.4." in name or ".layers.5." in name]
    loaded = oracle.load(tmp_path / "out")
    assert loaded.problems == ()
    (lists,) = oracle.stacks(source, 5).values()
    with oracle.skipped(source, lists, [1]):
        assert oracle.difference(oracle.logits(loaded.model), oracle.logits(source)) < 2e-4


@pytest.mark.parametrize(
    ("kind", "config", "gone", "message"),
    [
        ("gemma4_text", GEMMA4, [5], f"model type gemma4_text: {PRODUCERS}, {ELSE}"),
        ("gemma4_text", GEMMA4, [7], f"model type gemma4_text: {PRODUCERS}, {ELSE}"),
        ("gemma4_text", GEMMA4, [7, 8, 9], f"model type gemma4_text: {PRODUCERS}, {ELSE}"),
        (
            "gemma4_text",
            GEMMA4,
            [11],
            "model type gemma4_text: the class makes the last layer one of full attention, whatever layer_types says, "
            "so this stack would not run as it is",
        ),
        ("gemma3n_text", GEMMA3N, [4], f"model type gemma3n_text: {PRODUCERS}, {ELSE}"),
        ("gemma3n_text", GEMMA3N, [7], f"model type gemma3n_text: {PRODUCERS}, {ELSE}"),
        (
            "jamba",
            JAMBA,
            [1],
            "config.json: expert_layer_period = 2, expert_layer_offset = 1 (period and offset of layers, "
            "for which the class reads no list) cannot describe the new order of layers; choose layers that keep the pattern",
        ),
    ],
)
def test_the_cut_is_refused_with_its_reason(kind: str, config: dict[str, Any], gone: list[int], message: str, tmp_path: Path) -> None:
    import transformers

    depth = config["num_hidden_layers"]
    made = transformers.CONFIG_MAPPING[kind](**{**BASE, **config})
    made.save_pretrained(tmp_path / "config")
    said = json.loads((tmp_path / "config" / "config.json").read_text(encoding="utf-8"))
    source = model(tmp_path / "m", said, f"model.layers.:{depth}")
    with pytest.raises(LayercutError) as caught:
        cut(source, tmp_path / "out", *gone)
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quietly")
@pytest.mark.filterwarnings("ignore")
def test_a_producer_that_goes_all_the_same_is_said_to(tmp_path: Path) -> None:
    """Whoever allows it gets a model that loads, computes something else, and says so in its report."""
    import oracle

    from layercut.report import read_report

    source = saved(tmp_path / "m", "gemma3n_text", GEMMA3N)
    config = cut(tmp_path / "m", tmp_path / "out", 7, allow="inexact")
    assert (config["num_hidden_layers"], config["num_kv_shared_layers"]) == (11, 4)
    assert (
        f"inexact: model type gemma3n_text: {PRODUCERS}, so this stack would load but compute something else"
        in read_report(tmp_path / "out").notes
    )
    loaded = oracle.load(tmp_path / "out")
    assert loaded.problems == ()
    (lists,) = oracle.stacks(source, 12).values()
    with oracle.skipped(source, lists, [7]):
        assert oracle.difference(oracle.logits(loaded.model), oracle.logits(source)) > 1e-3
