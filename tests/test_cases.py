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
