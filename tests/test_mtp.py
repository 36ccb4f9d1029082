"""Multi-token prediction: layers behind the last one, and modules in a namespace of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Spec, origin, write_checkpoint

from layercut.architecture import Member, find_stack, mtp_layers
from layercut.checkpoint import open_checkpoint
from layercut.cli import main
from layercut.errors import CheckpointError, RefusedError
from layercut.header import read_header
from layercut.plan import Edit
from layercut.report import read_report
from layercut.stack import LayerRef
from layercut.surgery import dependents, operate

REASON = "multi-token-prediction layer: the library reads it at one fixed index only"
MODULE = ("eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.head.weight", "self_attn.o_proj.weight")


def checkpoint(folder: Path, config: dict[str, Any], layers: int = 4, extra: int = 0, own: Sequence[str] = ()) -> Path:
    """A model of `layers` layers with `extra` predicting layers behind them, and tensors in other namespaces."""
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.{rest}" for layer in range(layers) for rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")]
    names += [f"model.layers.{layer}.{rest}" for layer in range(layers, layers + extra) for rest in MODULE]
    names += [*own, "model.norm.weight", "lm_head.weight"]
    tensors: Spec = {name: ("U8", (64,), origin(f"{name};")) for name in names}
    return write_checkpoint(folder, tensors, {"model_type": "glm4v_moe_x", "num_hidden_layers": layers, **config}, 2)


def member(folder: Path) -> Member:
    found = open_checkpoint(folder)
    return Member(found, find_stack(found))


def edits(folder: Path, order: Sequence[int]) -> dict[str, Any]:
    source = member(folder)
    stack = [LayerRef(model="m", index=index) for index in order]
    return {edit.key: edit.after for edit in operate(source.checkpoint.config_text, "m", {"m": source}, stack).edits}


def contents(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        found |= {tensor.name: data[tensor.begin : tensor.end] for tensor in read_header(file).tensors}
    return found


def run(source: Path, steps: str, out: Path) -> Path:
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(f"model: {source}\n{steps}\n", encoding="utf-8")
    assert main(["run", str(recipe), "--out", str(out), "--quiet"]) == 0
    return out


# Behind the last layer


@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
@pytest.mark.parametrize("extra", [1, 2])
def test_a_changed_stack_leaves_them_out(tmp_path: Path, key: str, extra: int) -> None:
    source = checkpoint(tmp_path / "source", {key: extra}, 4, extra)
    assert (member(source).stack.depth, member(source).stack.extra) == (4, extra)
    out = run(source, "steps: [{prune: {at: 1}}]", tmp_path / "out")
    before = contents(source)
    gone = {name for name in before if name.startswith(("model.layers.1.", "model.layers.4.", "model.layers.5."))}
    renamed = {
        name.replace("layers.2.", "layers.1.").replace("layers.3.", "layers.2."): data for name, data in before.items() if name not in gone
    }
    assert contents(out) == renamed
    report = read_report(out)
    where = "layer 4" if extra == 1 else "layers 4 to 5"
    assert [(item.what, item.reason) for item in report.left_out] == [
        ("layer 1 (2 tensors, model.layers.*)", "not in the stack that the recipe asks for"),
        (f"{where} ({5 * extra} tensors, model.layers.*)", REASON),
    ]
    why = "multi-token-prediction layers are left out"
    assert Edit(key=key, before=extra, after=0, reason=why) in report.edits
    assert (member(out).stack.depth, member(out).stack.extra) == (3, 0)


def test_a_stack_that_grows_over_their_index(tmp_path: Path) -> None:
    """Layer 4 of the output is a copy of layer 3, not the predicting layer that had this index."""
    source = checkpoint(tmp_path / "source", {"num_nextn_predict_layers": 1}, 4, 1)
    out = run(source, "steps: [{duplicate: {at: 3}}]", tmp_path / "out")
    after = contents(out)
    assert after["model.layers.4.self_attn.o_proj.weight"] == origin("model.layers.3.self_attn.o_proj.weight;")
    assert not any("eh_proj" in name for name in after)


def test_an_unchanged_stack_keeps_them(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", {"num_nextn_predict_layers": 1}, 4, 1)
    out = run(source, "slices: [{layer_range: [0, 4]}]", tmp_path / "out")
    assert contents(out) == contents(source)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_fewer_are_stored_than_declared(tmp_path: Path) -> None:
    stack = member(checkpoint(tmp_path, {"num_nextn_predict_layers": 3}, 4, 1)).stack
    assert (stack.depth, stack.extra) == (4, 1)


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        (
            {},
            1,
            "model.layers.* holds 5 layers, but num_hidden_layers is 4 and num_nextn_predict_layers is not set: "
            "layer 4 holds model.layers.4.eh_proj.weight and 4 more",
        ),
        (
            {"num_nextn_predict_layers": 1},
            2,
            "model.layers.* holds 6 layers, but num_hidden_layers is 4 and num_nextn_predict_layers 1: "
            "layer 4 holds model.layers.4.eh_proj.weight and 4 more",
        ),
        (
            {"num_nextn_predict_layers": 0},
            1,
            "model.layers.* holds 5 layers, but num_hidden_layers is 4 and num_nextn_predict_layers is not set: "
            "layer 4 holds model.layers.4.eh_proj.weight and 4 more",
        ),
    ],
)
def test_layers_that_nobody_declares(tmp_path: Path, config: dict[str, Any], extra: int, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        member(checkpoint(tmp_path, config, 4, extra))
    hint = "a layer that predicts further tokens is declared by num_nextn_predict_layers"
    assert str(caught.value) == f"{tmp_path}/config.json: {message}; {hint}"


@pytest.mark.parametrize(("value", "count"), [(1, 1), (0, 0), (-2, 0), ("2", 0), (None, 0), (2.0, 0)])
def test_how_many_a_config_declares(value: Any, count: int) -> None:
    assert mtp_layers({"num_nextn_predict_layers": value}) == count
    assert mtp_layers({}) == 0


# Values that speak of them too


STEP = {
    "num_nextn_predict_layers": 2,
    "layer_types": ["full", "sliding", "full", "sliding", "full", "full"],
    "rope_theta": [1, 2, 3, 4, 5, 6],
    "moe_layers": [2, 3, 4, 5],
    "per_layer_config": {"1": {"a": 1}, "4": {"a": 4}},
    "hybrid_override_pattern": "MEMEXX",
}


def test_padded_values_lose_their_tail_with_the_layers(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, STEP, 4, 2)
    assert edits(source, [0, 2, 3]) == {
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 0,
        "layer_types": ["full", "full", "sliding"],
        "rope_theta": [1, 3, 4],
        "moe_layers": [1, 2],
        "per_layer_config": {},
        "hybrid_override_pattern": "MME",
    }
    assert edits(source, [0, 1, 1, 2, 3])["per_layer_config"] == {"1": {"a": 1}, "2": {"a": 1}}
    found = member(source)
    told = [dependent.key for dependent in dependents(found)]
    assert told == ["num_hidden_layers", "layer_types", "rope_theta", "moe_layers", "per_layer_config", "hybrid_override_pattern"]


def test_padded_values_keep_their_tail_with_modules_of_their_own(tmp_path: Path) -> None:
    """The modules are kept (`mtp.*`), so what is said of them moves up behind the new last layer."""
    source = checkpoint(tmp_path, STEP, 4, 0, ["mtp.0.e_proj.weight"])
    assert edits(source, [0, 2, 3]) == {
        "num_hidden_layers": 3,
        "layer_types": ["full", "full", "sliding", "full", "full"],
        "rope_theta": [1, 3, 4, 5, 6],
        "moe_layers": [1, 2, 3, 4],
        "per_layer_config": {"3": {"a": 4}},
        "hybrid_override_pattern": "MMEXX",
    }


def test_values_of_the_depth_alone_are_not_padded(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {"num_nextn_predict_layers": 2, "layer_types": ["a", "b", "c", "d"], "moe_layers": [3]}, 4, 2)
    expected = {"num_hidden_layers": 2, "num_nextn_predict_layers": 0, "layer_types": ["b", "d"], "moe_layers": [1]}
    assert edits(source, [1, 3]) == expected


def test_an_unknown_padded_list_stops_the_run(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {"num_nextn_predict_layers": 2, "novelty": [1] * 6}, 4, 2)
    with pytest.raises(RefusedError) as caught:
        edits(source, [0])
    expected = (
        "layercut does not know whether this follows the layers: novelty (a list of 6 entries); declare it in the recipe under "
        "'architecture' (perhaps lists: [novelty]), or as ignore: [...] what does not"
    )
    assert str(caught.value) == expected


def test_two_models_of_which_one_predicts(tmp_path: Path) -> None:
    """Each layer's entry comes from its own model, padded or not."""
    one = member(checkpoint(tmp_path / "a", {"num_nextn_predict_layers": 1, "layer_types": ["a", "b", "c", "d", "x"]}, 4, 1))
    other = member(checkpoint(tmp_path / "b", {"num_nextn_predict_layers": 0, "layer_types": ["e", "f"]}, 2))
    order = [LayerRef(model="a", index=0), LayerRef(model="b", index=1), LayerRef(model="a", index=3)]
    done = operate(one.checkpoint.config_text, "a", {"a": one, "b": other}, order)
    assert json.loads(done.text)["layer_types"] == ["a", "f", "d"]


# In a namespace of their own


OWN = ("mtp.fc.weight", "mtp.layers.0.self_attn.o_proj.weight", "mtp.layers.0.input_layernorm.weight", "mtp.norm.weight")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_own_modules_are_kept_untouched(tmp_path: Path, prefix: str) -> None:
    own = [prefix + name for name in OWN]
    source = checkpoint(tmp_path / "source", {"num_nextn_predict_layers": 1}, 4, 0, own)
    assert member(source).stack == find_stack(open_checkpoint(source))
    assert (member(source).stack.prefix, member(source).stack.depth, member(source).stack.extra) == ("model.layers.", 4, 0)
    out = run(source, "steps: [{prune: {at: [0, 2]}}]", tmp_path / "out")
    after = contents(out)
    assert {name: after[name] for name in own} == {name: origin(f"{name};") for name in own}
    assert [item.what for item in read_report(out).left_out] == [
        "layer 0 (2 tensors, model.layers.*)",
        "layer 2 (2 tensors, model.layers.*)",
    ]
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["num_nextn_predict_layers"] == 1


def test_a_model_as_deep_as_its_own_module(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {"num_nextn_predict_layers": 1}, 1, 0, OWN)
    assert (member(source).stack.prefix, member(source).stack.depth) == ("model.layers.", 1)


def test_own_modules_stay_together_behind_the_last_layer(tmp_path: Path) -> None:
    """They read the last boundary state: in a stack of two models all of them come from the model that ends it."""
    one = checkpoint(tmp_path / "a", {}, 2, 0, OWN)
    other = checkpoint(tmp_path / "b", {}, 2, 0, OWN)
    data = (other / "model-00002-of-00002.safetensors").read_bytes().replace(b"mtp.", b"MTP:")
    at = next(tensor.begin for tensor in read_header(other / "model-00002-of-00002.safetensors").tensors)
    whole = (other / "model-00002-of-00002.safetensors").read_bytes()
    (other / "model-00002-of-00002.safetensors").write_bytes(whole[:at] + data[at:])
    recipe = f"slices: [{{model: {one}, layer_range: [0, 1]}}, {{model: {other}, layer_range: [1, 2]}}]\nallow: inexact"
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe + "\n", encoding="utf-8")
    assert main(["run", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    after = contents(tmp_path / "out")
    assert all(after[name].startswith(b"MTP:") for name in OWN)


# Against transformers


def test_a_real_class_loads_the_cut(tmp_path: Path) -> None:
    """GLM-4 MoE with a predicting layer behind the last one: the cut loads without it, and computes what its layers did."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=4, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    source = tmp_path / "source"
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors |= {f"model.layers.4.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm")}
    tensors["model.layers.4.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    said = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**said, "num_nextn_predict_layers": 1}), encoding="utf-8")
    out = run(source, "steps: [{prune: {at: 2}}]", tmp_path / "out")
    model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in (0, 1, 3)])
    cut, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(3, 27)[None]
    with torch.inference_mode():
        assert torch.equal(cut.eval()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
