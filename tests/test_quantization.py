"""Quantised checkpoints: bytes move as they are, in the layout of every scheme, and the names of layers in their configs follow."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Spec, origin, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from layercut.architecture import Member, find_stack
from layercut.checkpoint import open_checkpoint
from layercut.cli import main
from layercut.errors import LayercutError, RefusedError
from layercut.header import ITEM_BITS, read_header
from layercut.naming import Naming
from layercut.plan import Edit
from layercut.quantization import Followed, configs, follow, is_quantized, mentions
from layercut.report import read_report
from layercut.stack import LayerRef
from layercut.surgery import dependents, operate

# Tensors of one quantised linear map, as the writers of each scheme name and shape them.
Module = dict[str, tuple[str, tuple[int, ...]]]
GPTQ: Module = {
    "qweight": ("I32", (4, 8)),
    "qzeros": ("I32", (1, 1)),
    "scales": ("F16", (1, 8)),
    "g_idx": ("I32", (32,)),
    "bias": ("F16", (8,)),
}
AWQ: Module = {"qweight": ("I32", (8, 4)), "qzeros": ("I32", (1, 4)), "scales": ("F16", (1, 8))}
BNB4: Module = {
    "weight": ("U8", (32, 1)), "weight.absmax": ("U8", (4,)), "weight.quant_map": ("F32", (16,)), "weight.nested_absmax": ("F32", (1,)),
    "weight.nested_quant_map": ("F32", (16,)), "weight.quant_state.bitsandbytes__nf4": ("U8", (24,)),
}  # fmt: skip
BNB8: Module = {"weight": ("I8", (8, 8)), "SCB": ("F32", (8,)), "weight_format": ("U8", ())}
FP8_BLOCK: Module = {"weight": ("F8_E4M3", (8, 8)), "weight_scale_inv": ("F32", (1, 1))}
FP8_TENSOR: Module = {"weight": ("F8_E4M3", (8, 8)), "weight_scale": ("BF16", (8, 1)), "input_scale": ("F32", (1,))}
PACKED: Module = {
    "weight_packed": ("I32", (8, 1)), "weight_scale": ("BF16", (8, 1)), "weight_zero_point": ("I32", (1, 1)), "weight_shape": ("I64", (2,)),
    "weight_g_idx": ("I32", (8,)), "weight_global_scale": ("F32", (1,)),
}  # fmt: skip
MODELOPT: Module = {
    "weight": ("U8", (8, 4)), "weight_scale": ("F8_E4M3", (8, 1)), "weight_scale_2": ("F32", ()), "input_scale": ("F32", ()),
    "k_scale": ("F32", ()),
}  # fmt: skip
EXPERTS: Module = {
    "gate_up_proj_blocks": ("U8", (2, 4, 1, 16)), "gate_up_proj_scales": ("U8", (2, 4, 1)), "gate_up_proj_bias": ("BF16", (2, 4)),
    "down_proj_blocks": ("U8", (2, 4, 1, 16)), "down_proj_scales": ("U8", (2, 4, 1)), "down_proj_bias": ("BF16", (2, 4)),
}  # fmt: skip
LINEARS = ("self_attn.q_proj", "mlp.down_proj")
SCHEMES: dict[str, tuple[tuple[str, ...], Module, dict[str, Any]]] = {
    "gptq": (LINEARS, GPTQ, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}),
    "awq": (LINEARS, AWQ, {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["model.layers.2.mlp.gate", "lm_head"]}),
    "bitsandbytes 4 bit": (LINEARS, BNB4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}),
    "bitsandbytes 8 bit": (LINEARS, BNB8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}),
    "fp8 block": (
        LINEARS,
        FP8_BLOCK,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["model.layers.3.mlp.gate"]},
    ),
    "fp8 tensor": (LINEARS, FP8_TENSOR, {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["model.layers.0", "model.layers.5"]}),
    "compressed-tensors": (LINEARS, PACKED, {"quant_method": "compressed-tensors", "ignore": ["lm_head", "model.layers.3.mlp.gate"]}),
    "mxfp4": (("mlp.experts",), EXPERTS, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}),
    "modelopt": (LINEARS, MODELOPT, {"quant_method": "modelopt", "ignore": ["model.layers.5.self_attn*"]}),
}


def labelled(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor whose bytes say its name."""
    return dtype, shape, origin(f"{name};", math.prod(shape) * ITEM_BITS[dtype] // 8)


def quantized(folder: Path, scheme: str, layers: int = 6, **more: Any) -> Path:
    """A checkpoint in the layout of a scheme, over two files."""
    modules, tensors, quantization = SCHEMES[scheme]
    found: Spec = {"model.embed_tokens.weight": labelled("model.embed_tokens.weight", "BF16", (8, 4))}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        kinds = {f"{prefix}{module}.{name}": kind for module in modules for name, kind in tensors.items()}
        kinds |= {f"{prefix}input_layernorm.weight": ("BF16", (8,)), f"{prefix}mlp.gate.weight": ("BF16", (4, 8))}
        found |= {name: labelled(name, *kind) for name, kind in kinds.items()}
    for name, kind in {"model.norm.weight": ("BF16", (8,)), "lm_head.weight": ("BF16", (8, 4))}.items():
        found[name] = labelled(name, *kind)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "vocab_size": 8}
    return write_checkpoint(folder, found, {**config, "quantization_config": {**quantization, **more}}, 2)


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        for name, dtype, shape, begin, end in read_header(file).tensors:
            found[name] = dtype, shape, data[begin:end]
    return found


def run(model: Path, text: str, out: Path) -> Path:
    recipe = out.parent / "recipe.yaml"
    recipe.write_text(f"model: {model}\n{text}\n", encoding="utf-8")
    assert main(["run", str(recipe), "--out", str(out), "--quiet"]) == 0
    return out


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("steps", "order"),
    [
        ("steps: [{prune: {at: [1, 2]}}]", [0, 3, 4, 5]),
        ("steps: [{duplicate: {at: '2-3'}}]", [0, 1, 2, 3, 2, 3, 4, 5]),
        ("slices: [{layer_range: [4, 6]}, {layer_range: [0, 2]}]", [4, 5, 0, 1]),
    ],
)
def test_every_tensor_moves_as_it_is_or_is_listed(tmp_path: Path, scheme: str, steps: str, order: list[int]) -> None:
    source = quantized(tmp_path / "source", scheme)
    out = run(source, steps, tmp_path / "out")
    before, after = contents(source), contents(out)
    expected: dict[str, str] = {}
    for position, layer in enumerate(order):
        old, new = f"model.layers.{layer}.", f"model.layers.{position}."
        expected |= {name.replace(old, new): name for name in before if name.startswith(old)}
    expected |= {name: name for name in before if ".layers." not in name}
    assert after == {new: before[old] for new, old in expected.items()}
    per_layer = sum(name.startswith("model.layers.0.") for name in before)
    gone = [layer for layer in range(6) if layer not in order]
    listed = sum(int(item.what.split("(")[1].split()[0]) for item in read_report(out).left_out)
    assert listed == per_layer * len(gone)
    assert len(before) == len(set(expected.values())) + listed
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    kept = [f"model.layers.{position}" for position, layer in enumerate(order) if layer in (0, 5)]
    if scheme == "fp8 tensor":
        assert sorted(config["quantization_config"]["modules_to_not_convert"]) == kept
    reopened = open_checkpoint(out)
    assert find_stack(reopened).depth == len(order)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "text",
    [
        "dtype: bfloat16\nsteps: [{prune: {at: 1}}]",
        "out_dtype: float16\nsteps: [{prune: {at: 1}}]",
        "merge_method: passthrough\nslices: [{layer_range: [0, 6], parameters: {scale: [{filter: MODULE, value: 0.5}, {value: 1.0}]}}]",
        "steps: [{merge: {at: '1-2'}}]",
    ],
)
def test_arithmetic_on_quantised_weights_is_refused(tmp_path: Path, scheme: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(tmp_path / "source", scheme)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {source}\n{text.replace('MODULE', SCHEMES[scheme][0][0].split('.')[-1])}\n", encoding="utf-8")
    assert main(["plan", str(recipe)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    if "dtype" in text:
        assert error == f"error: {source}: a quantised checkpoint cannot be cast; leave out dtype\n"
    else:
        assert "is refused: quantised weights are not what they say" in error


def test_a_cast_is_refused_wherever_it_says_that_it_is_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(tmp_path / "source", "modelopt")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}', encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {source}\ndtype: bfloat16\nsteps: [{{prune: {{at: 1}}}}]\n", encoding="utf-8")
    assert main(["plan", str(recipe)]) == 1
    assert "a quantised checkpoint cannot be cast" in capsys.readouterr().err


def test_a_loader_reads_the_cut_as_it_read_the_whole(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """FP8 in blocks, two modules left out by name: unpacked by transformers, before and after."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny("llama", layers=6), tmp_path / "source")
    plain = ["lm_head", "model.layers.1.mlp.gate_proj", "model.layers.4.mlp.gate_proj"]
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        tensors[name] = value
        if "proj" in name and name.removesuffix(".weight") not in plain:
            rows, columns = (length // 16 for length in value.shape)
            blocks = value.reshape(rows, 16, columns, 16)
            scales = blocks.abs().amax((1, 3), keepdim=True) / 448
            tensors[name] = (blocks / scales).reshape(value.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales.reshape(rows, columns)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "dequantize": True, "weight_block_size": [16, 16]}
    config["quantization_config"] = {**fp8, "modules_to_not_convert": plain}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    out = run(source, "slices: [{layer_range: [1, 3]}, {layer_range: [1, 6]}]", tmp_path / "out")
    order = [1, 2, 1, 2, 3, 4, 5]
    after = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]["modules_to_not_convert"]
    assert after == ["lm_head", *(f"model.layers.{at}.mlp.gate_proj" for at in (0, 2, 5))]
    whole = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    whole.model.layers = torch.nn.ModuleList([whole.model.layers[index] for index in order])
    whole.config.num_hidden_layers = len(order)
    cut, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.arange(3, 27)[None]
    with torch.inference_mode():
        assert torch.equal(cut.eval()(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


# Names


def member(
    folder: Path, quantization: Any, layers: int = 12, prefix: str = "model.layers.", node: str | None = None, more: Sequence[str] = ()
) -> Member:
    """A checkpoint of layers with a gate, an up and a down projection each."""
    names = [f"{prefix}{layer}.{rest}.weight" for layer in range(layers) for rest in ("mlp.gate", "mlp.up_proj", "self_attn.o_proj")]
    tensors: Spec = {name: ("U8", (4,), b"....") for name in [*names, "lm_head.weight", *more]}
    inner = {"num_hidden_layers": layers}
    config: dict[str, Any] = {"model_type": "llama", **inner} if node is None else {"model_type": "llava", node: inner}
    config["quantization_config"] = quantization
    write_checkpoint(folder, tensors, config)
    checkpoint = open_checkpoint(folder)
    return Member(checkpoint, find_stack(checkpoint))


def order_of(*parts: int | range, model: str = "m") -> list[LayerRef]:
    indices = [index for part in parts for index in (part if isinstance(part, range) else [part])]
    return [LayerRef(model=model, index=index) for index in indices]


def rewritten(source: Member, order: Sequence[LayerRef]) -> Any:
    done = operate(source.checkpoint.config_text, "m", {"m": source}, order)
    return json.loads(done.text)["quantization_config"]


WITHOUT_1 = order_of(0, range(2, 12))  # 11 layers
TWICE_1 = order_of(0, 1, 1, range(2, 12))  # 13 layers


@pytest.mark.parametrize(
    ("before", "order", "after"),
    [
        (["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.layers.11.mlp.gate", "lm_head"], WITHOUT_1,
         ["model.layers.0.mlp.gate", "model.layers.10.mlp.gate", "lm_head"]),
        (["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"], TWICE_1,
         ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate", "model.layers.3.mlp.gate"]),
        (["model.layers.0", "model.layers.1", "model.layers.11"], WITHOUT_1, ["model.layers.0", "model.layers.10"]),
        (["model.layers.2.mlp.gate.weight"], WITHOUT_1, ["model.layers.1.mlp.gate.weight"]),  # AQLM names tensors
        # Names of a loader that puts the model elsewhere, or nowhere.
        (["language_model.model.layers.2.mlp", "layers.3.mlp", "model.language_model.layers.4.mlp"], WITHOUT_1,
         ["language_model.model.layers.1.mlp", "layers.2.mlp", "model.language_model.layers.3.mlp"]),
        # Layers of other stacks, and layers behind the last one.
        (["vision_tower.encoder.layers.2.mlp", "mtp.layers.2.mlp", "visual.blocks.2"], WITHOUT_1,
         ["vision_tower.encoder.layers.2.mlp", "mtp.layers.2.mlp", "visual.blocks.2"]),
        (["model.layers.12.eh_proj", "lm_head"], WITHOUT_1, ["lm_head"]),
        # Index-free patterns.
        (["lm_head", "*.gate", "re:.*mlp.gate$", "model.layers.*.mlp.gate", "fc1", "experts.3"], WITHOUT_1,
         ["lm_head", "*.gate", "re:.*mlp.gate$", "model.layers.*.mlp.gate", "fc1", "experts.3"]),
        (["re:.*layers\\.[0-9]+\\.mlp.gate$", r"re:model\.layers\.\d+\.mlp.*", "*.experts.3.*"], TWICE_1,
         ["re:.*layers\\.[0-9]+\\.mlp.gate$", r"re:model\.layers\.\d+\.mlp.*", "*.experts.3.*"]),
        # Globs and regexes with one literal index.
        (["model.layers.10.self_attn*", "*layers.11.*", "*.layers.1.mlp*"], WITHOUT_1, ["model.layers.9.self_attn*", "*layers.10.*"]),
        (["re:.*layers\\.2\\.mlp.*", "re:^model.layers.1.mlp.gate$", "model.layers.3.*"], TWICE_1,
         ["re:.*layers\\.3\\.mlp.*", "re:^model.layers.1.mlp.gate$", "re:^model.layers.2.mlp.gate$", "model.layers.4.*"]),
        # Patterns that mean several layers: as they are while they mean the same, else what they matched.
        (["re:.*layers\\.(0|1)\\.mlp.gate"], order_of(range(11)), ["re:.*layers\\.(0|1)\\.mlp.gate"]),
        (["re:.*layers\\.(0|2)\\.mlp.gate$", "lm_head"], WITHOUT_1, ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"]),
        (["re:lm_head|.*layers\\.2\\..*gate"], WITHOUT_1, ["lm_head", "model.layers.1.mlp.gate"]),
        (["model.layers.1*.mlp.gate"], order_of(0, 2, 10, 11), ["model.layers.2.mlp.gate", "model.layers.3.mlp.gate"]),
        (["model.layers.?.self_attn*"], order_of(9, 10), ["model.layers.0.self_attn.o_proj"]),
        (["model.layers.[01].mlp*"], order_of(1, 2), ["model.layers.0.mlp.gate", "model.layers.0.mlp.up_proj"]),
        (["re:.*layers\\.(10|11)\\..*"], order_of(range(10)), []),
        (["re:model.layers.1.*"], order_of(0, 2, 10),
         ["model.layers.2.mlp.gate", "model.layers.2.mlp.up_proj", "model.layers.2.self_attn.o_proj"]),
        ([r"re:.*layers\.(?!0\.|11\.).*gate"], order_of(range(11)), [r"re:.*layers\.(?!0\.|11\.).*gate"]),
        # What transformers reads itself ends where a module does, a compressed-tensors regex anywhere.
        ([r"model\.layers\.(0|2)\.(mlp\.up|mlp\.gate)"], WITHOUT_1, ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
        ([r"model\.layers\.(0|2)\.mlp"], WITHOUT_1,
         ["model.layers.0.mlp.gate", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate", "model.layers.1.mlp.up_proj"]),
        ([r"re:model\.layers\.(0|2)\.mlp\.up"], WITHOUT_1, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        ([r"re:.*layers\.(?!0\.).*gate$"], order_of(1, 0), ["model.layers.0.mlp.gate"]),
        ([r"re:.*\.[0-9]\.mlp\.gate"], order_of(*range(9), 0, 10), [r"re:.*\.[0-9]\.mlp\.gate"]),
    ],
)  # fmt: skip
def test_names_in_lists_follow(tmp_path: Path, before: list[str], order: list[LayerRef], after: list[str]) -> None:
    source = member(tmp_path, {"quant_method": "x", "ignore": before})
    assert rewritten(source, order) == {"quant_method": "x", "ignore": after}


@pytest.mark.parametrize(
    ("before", "order", "after"),
    [
        # ModelOpt, SpQR, VPTQ, HIGGS, torchao: one entry a module.
        ({"quantized_layers": {"model.layers.0.mlp.gate": {"quant_algo": "FP8"}, "model.layers.2.mlp.gate": {"quant_algo": "NVFP4"}}},
         WITHOUT_1,
         {"quantized_layers": {"model.layers.0.mlp.gate": {"quant_algo": "FP8"}, "model.layers.1.mlp.gate": {"quant_algo": "NVFP4"}}}),
        ({"shapes": {"model.layers.1.q.dense_weights.shape": 7, "model.layers.11.q.dense_weights.shape": 9}}, TWICE_1,
         {"shapes": {"model.layers.1.q.dense_weights.shape": 7, "model.layers.2.q.dense_weights.shape": 7,
                     "model.layers.12.q.dense_weights.shape": 9}}),
        ({"tune_metadata": {"model.layers.2.mlp": {"name": "model.layers.2.mlp", "like": ["model.layers.3.mlp"]}}}, order_of(2),
         {"tune_metadata": {"model.layers.0.mlp": {"name": "model.layers.0.mlp", "like": ["model.layers.3.mlp"]}}}),
        # Quark: globs as keys.
        ({"layer_quant_config": {"*lm_head": 1, "*layers.11.mlp*": 2}, "exclude": ["*layers.10.*"]}, WITHOUT_1,
         {"layer_quant_config": {"*lm_head": 1, "*layers.10.mlp*": 2}, "exclude": ["*layers.9.*"]}),
        # AutoRound.
        ({"extra_config": {"model.layers.2.mlp.gate": {"bits": 16}, "lm_head": {"bits": 8}}}, WITHOUT_1,
         {"extra_config": {"model.layers.1.mlp.gate": {"bits": 16}, "lm_head": {"bits": 8}}}),
        # GPTQModel: keys are regexes, the first that matches counts.
        ({"dynamic": {"-:.*\\.0\\.mlp\\.gate.*": {}, "+:.*layers\\.([1-9]|1[01])\\..*gate": {"bits": 8}, "lm_head": {"bits": 4}}},
         order_of(0, 1, 11),
         {"dynamic": {"-:.*\\.0\\.mlp\\.gate.*": {}, "+:.*layers\\.([1-9]|1[01])\\..*gate": {"bits": 8}, "lm_head": {"bits": 4}}}),
        ({"dynamic": {"-:.*\\.(0|11)\\.mlp\\.gate.*": {}, "+:^model\\.layers\\.11\\..*": {"bits": 8}}}, order_of(0, 1, 11),
         {"dynamic": {"-:^model\\.layers\\.0\\.mlp\\.gate$": {},
                      "-:^model\\.layers\\.2\\.mlp\\.gate$": {}, "+:^model\\.layers\\.2\\..*": {"bits": 8}}}),
        ({"dynamic": {".*layers\\.(1)\\.mlp\\.up.*": {"bits": 8}}}, order_of(1, 1),
         {"dynamic": {"^model\\.layers\\.0\\.mlp\\.up_proj$": {"bits": 8}, "^model\\.layers\\.1\\.mlp\\.up_proj$": {"bits": 8}}}),
        # compressed-tensors: targets inside groups, and lists of dicts.
        ({"config_groups": {"group_0": {"targets": ["Linear", "re:.*layers\\.11\\..*"], "weights": {"num_bits": 4}}}}, WITHOUT_1,
         {"config_groups": {"group_0": {"targets": ["Linear", "re:.*layers\\.10\\..*"], "weights": {"num_bits": 4}}}}),
        ({"transform_config": {"config_groups": {"R1": {"apply": [{"targets": ["model.layers.2.mlp"], "location": "input"}]}}}}, WITHOUT_1,
         {"transform_config": {"config_groups": {"R1": {"apply": [{"targets": ["model.layers.1.mlp"], "location": "input"}]}}}}),
        # MLX mixes settings and modules.
        ({"group_size": 64, "bits": 4, "model.layers.2.mlp.gate": {"bits": 8}}, WITHOUT_1,
         {"group_size": 64, "bits": 4, "model.layers.1.mlp.gate": {"bits": 8}}),
        ({"block_name_to_quantize": "model.layers", "inside_layer_modules": [["self_attn.q_proj"], ["mlp.up_proj"]]}, WITHOUT_1,
         {"block_name_to_quantize": "model.layers", "inside_layer_modules": [["self_attn.q_proj"], ["mlp.up_proj"]]}),
        ({"first_block": "model.layers.2"}, WITHOUT_1, {"first_block": "model.layers.1"}),
    ],
)  # fmt: skip
def test_names_in_keys_and_deeper_follow(tmp_path: Path, before: dict[str, Any], order: list[LayerRef], after: dict[str, Any]) -> None:
    done = rewritten(member(tmp_path, before), order)
    assert done == after
    assert json.dumps(done) == json.dumps(after), "in this order"


def test_the_first_of_two_entries_for_one_module_stays(tmp_path: Path) -> None:
    before = {"dynamic": {"+:^model\\.layers\\.2\\.mlp\\.gate$": {"bits": 8}, "+:.*layers\\.(2|3)\\.mlp\\.gate": {"bits": 2}}}
    after = rewritten(member(tmp_path, before), order_of(2, 3))
    assert after == {"dynamic": {"+:^model\\.layers\\.0\\.mlp\\.gate$": {"bits": 8}, "+:^model\\.layers\\.1\\.mlp\\.gate$": {"bits": 2}}}


def test_edits_say_what_changed_and_nothing_else_changes(tmp_path: Path) -> None:
    text = (
        '{\n  "model_type": "llama",\n  "num_hidden_layers" :12,\n  "quantization_config": {"quant_method": "fp8",\n'
        '     "fmt": "e4m3", "modules_to_not_convert": [\n      "model.layers.1.mlp.gate",\n      "lm_head"\n    ],\n    "config_groups":'
        ' {"g": {"targets": ["model.layers.11.mlp"], "x": 1.0}}\n  }\n}\n'
    )
    source = member(tmp_path, {})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    checkpoint = open_checkpoint(tmp_path)
    source = Member(checkpoint, find_stack(checkpoint))
    done = operate(checkpoint.config_text, "m", {"m": source}, WITHOUT_1)
    depth, *edits = done.edits
    assert depth.key == "num_hidden_layers"
    reason = "names of layers"
    assert edits == [
        Edit(
            key="quantization_config.modules_to_not_convert",
            before=["model.layers.1.mlp.gate", "lm_head"],
            after=["lm_head"],
            reason=reason,
        ),
        Edit(
            key="quantization_config.config_groups.g.targets", before=["model.layers.11.mlp"], after=["model.layers.10.mlp"], reason=reason
        ),
    ]
    expected = text.replace('[\n      "model.layers.1.mlp.gate",\n      "lm_head"\n    ]', '[\n      "lm_head"\n    ]')
    assert done.text == expected.replace(":12", ":11").replace("layers.11", "layers.10")
    told = {dependent.key: dependent.reason for dependent in dependents(source)}
    assert told == {"num_hidden_layers": "depth", **dict.fromkeys([edit.key for edit in edits], reason)}


def test_an_unchanged_stack_changes_nothing(tmp_path: Path) -> None:
    source = member(tmp_path, {"ignore": ["re:(", "re:.*layers.(0|1).qkv", "model.layers.99"]})
    assert operate(source.checkpoint.config_text, "m", {"m": source}, order_of(range(12))).edits == ()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (
            {"ignore": [r"re:.*layers\.(0|1)\..*qkv_proj"]},
            r"quantization_config.ignore holds 're:.*layers\\.(0|1)\\..*qkv_proj', which speaks of layers by number and matches no module "
            "of the file; replace it by the names that it means",
        ),
        (
            {"dynamic": {"+:.*layers.(0.*": {}}},
            "quantization_config.dynamic holds '+:.*layers.(0.*', which is no regex that can be tried; "
            "replace it by the names that it means",
        ),
        (
            {"ignore": ["re:(([a-z0-9]+)*\\.)*1"]},
            r"quantization_config.ignore holds 're:(([a-z0-9]+)*\\.)*1', which is no regex that can be tried; "
            "replace it by the names that it means",
        ),
        ({"first": "model.layers.1"}, "quantization_config.first is 'model.layers.1', and that layer stands 0 times in the new stack"),
    ],
)
def test_what_cannot_be_said_is_refused(tmp_path: Path, quantization: Any, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        rewritten(member(tmp_path, quantization), WITHOUT_1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "end",
    ["((a+))+!", "(a|a)*!", "(a|aa)+!", "(?:(a)|(a))*!", "(?P<n>a?){40}a{40}!", "([(a)]|[^]a])*!", "(([a])*)*!", "a*" * 9 + "!",
     "(a*a*a*|b)" * 3 + "!", r"(\)a|\(a*)*!"],
)  # fmt: skip
def test_regexes_that_may_take_for_ever_are_not_tried(tmp_path: Path, end: str) -> None:
    pattern = rf"re:model\.layers\.[0-9]\.{end}"
    source = member(tmp_path, {"ignore": [pattern]}, more=[f"model.layers.0.{'a' * 60}.weight"])
    with pytest.raises(RefusedError, match=r"which is no regex that can be tried; replace it by the names that it means$"):
        rewritten(source, WITHOUT_1)


@pytest.mark.parametrize(
    "pattern",
    [r"re:(.*\.)?layers\.[0-9]+\..*", r"re:.*layers\.(?P<at>\d+)\.(mlp|self_attn)\..*(gate|o_proj).*", r"re:(?i:model\.)layers\.\d+\.mlp",
     "re:" + "|".join(rf".*layers\.\d+\.{name}.*" for name in ("mlp", "self_attn", "mlp.gate", "mlp.up_proj")),
     r"re:.*\.[0-9]*\.[(a)*]*mlp"],
)  # fmt: skip
def test_regexes_of_honest_configs_are_tried(tmp_path: Path, pattern: str) -> None:
    assert rewritten(member(tmp_path, {"ignore": [pattern]}), WITHOUT_1)["ignore"] == [pattern]


def test_numbers_alone_are_left_with_a_note(tmp_path: Path) -> None:
    source = member(tmp_path, {"skip": ["27", "3.mlp.gate", "lm_head"], "by": {"0": 1}})
    done = follow("m", {"m": source}, WITHOUT_1)
    assert done.edits == ()
    ending = "which may mean a layer by its number alone: left as it is"
    assert done.notes == (
        f"quantization_config.skip names '27', {ending}",
        f"quantization_config.skip names '3.mlp.gate', {ending}",
        f"quantization_config.by names '0', {ending}",
    )


def test_a_language_model_inside_another(tmp_path: Path) -> None:
    """The file's prefix, the loader's prefix, and a vision stack whose layers are called the same."""
    vision = [f"model.vision_tower.encoder.layers.{layer}.mlp.fc1.weight" for layer in range(5)]
    before = ["model.language_model.layers.2.mlp", "model.layers.2.mlp", "model.vision_tower.encoder.layers.2.mlp", "*layers.2.mlp*"]
    source = member(tmp_path, {"ignore": before}, 12, "model.language_model.layers.", "text_config", vision)
    assert rewritten(source, WITHOUT_1)["ignore"] == [
        "model.language_model.layers.1.mlp",
        "model.layers.1.mlp",
        "model.vision_tower.encoder.layers.2.mlp",
        # A wildcard that meant layers of both stacks: what it matched.
        "model.vision_tower.encoder.layers.2.mlp.fc1",
        "model.language_model.layers.1.mlp.gate",
        "model.language_model.layers.1.mlp.up_proj",
    ]


def test_config_of_an_inner_node(tmp_path: Path) -> None:
    source = member(tmp_path, None, 3, "model.layers.", "text_config")
    config = {"text_config": {"num_hidden_layers": 3, "quantization_config": {"ignore": ["model.layers.2"]}}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    checkpoint = open_checkpoint(tmp_path)
    source = Member(checkpoint, find_stack(checkpoint))
    done = operate(checkpoint.config_text, "m", {"m": source}, order_of(0, 2))
    assert [edit.key for edit in done.edits] == ["text_config.num_hidden_layers", "text_config.quantization_config.ignore"]
    assert json.loads(done.text)["text_config"]["quantization_config"] == {"ignore": ["model.layers.1"]}
    assert list(configs(checkpoint.config, source.stack)) == [("text_config", "quantization_config")]
    assert is_quantized(*source) and mentions(checkpoint.config, source.stack) == [
        ("text_config.quantization_config.ignore", ["model.layers.2"])
    ]


def test_layers_of_gpt2(tmp_path: Path) -> None:
    source = member(tmp_path, {"ignore": ["transformer.h.2.mlp", "h.1.attn", "transformer.h.0"]}, 3, "transformer.h.")
    assert rewritten(source, order_of(2, 0)) == {"ignore": ["transformer.h.0.mlp", "transformer.h.1"]}


def test_names_of_two_models_come_together(tmp_path: Path) -> None:
    """Each layer takes along what its own model says of it."""
    one = member(tmp_path / "a", {"quant_method": "fp8", "ignore": ["model.layers.0.mlp.gate", "lm_head"]}, 12)
    other = member(tmp_path / "b", {"quant_method": "fp8", "ignore": ["lm_head", "model.layers.1.mlp.gate", "model.layers.3.mlp"]}, 4)
    order = [*order_of(0, 1, model="a"), *order_of(1, 2, 3, model="b")]
    done = follow("a", {"a": one, "b": other}, order)
    assert [edit.after for edit in done.edits] == [["model.layers.0.mlp.gate", "lm_head", "model.layers.2.mlp.gate", "model.layers.4.mlp"]]


@pytest.mark.parametrize("theirs", [None, {"quant_method": "awq"}, {"quant_method": "fp8", "ignore": ["lm_head"]}])
def test_models_that_are_quantised_in_different_ways(tmp_path: Path, theirs: Any) -> None:
    one, other = member(tmp_path / "a", {"quant_method": "fp8"}), member(tmp_path / "b", theirs)
    members = {"a": one, "b": other}
    order = [*order_of(0, model="a"), *order_of(1, model="b")]
    for donor in ("a", "b"):
        with pytest.raises(RefusedError, match="are quantised in different ways: one config cannot describe both"):
            follow(donor, members, order)
    assert follow("a", members, order_of(0, model="a")) == Followed()


# Files that say it again


def test_side_files_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(tmp_path / "source", "modelopt")
    text = (
        '{\n    "producer": {"name": "modelopt"},\n    "quantization": {\n        "quant_algo": "MIXED_PRECISION",\n'
        '        "exclude_modules": ["lm_head", "model.layers.5.self_attn*", "model.layers.1.mlp.gate"],\n'
        '        "quantized_layers": {\n            "model.layers.2.mlp.down_proj": {"quant_algo": "FP8"}\n        }\n    }\n}'
    )
    (source / "hf_quant_config.json").write_text(text, encoding="utf-8")
    (source / "quantize_config.json").write_text('{"bits": 4, "sym": true}', encoding="utf-8")
    out = run(source, "steps: [{prune: {at: 1}}]", tmp_path / "out")
    expected = text.replace(', "model.layers.1.mlp.gate"', "").replace("layers.5", "layers.4").replace("layers.2", "layers.1")
    assert (out / "hf_quant_config.json").read_text(encoding="utf-8") == expected
    assert (out / "quantize_config.json").read_bytes() == b'{"bits": 4, "sym": true}'
    report = read_report(out)
    changed = "quantization.exclude_modules, quantization.quantized_layers"
    assert f"hf_quant_config.json: {changed} follow the layers" in report.notes
    assert [item.what for item in report.left_out] == [f"layer 1 ({2 * len(MODELOPT) + 2} tensors, model.layers.*)"]
    capsys.readouterr()
    assert main(["verify", str(out), "--no-load"]) == 0, capsys.readouterr()


def test_a_side_file_that_is_keyed_by_names(tmp_path: Path) -> None:
    source = quantized(tmp_path / "source", "gptq")
    (source / "quant_config.json").write_text('{"bits": 4, "model.layers.2.mlp": {"bits": 8}}', encoding="utf-8")
    out = run(source, "steps: [{prune: {at: 1}}]", tmp_path / "out")
    expected = '{\n  "bits": 4,\n  "model.layers.1.mlp": {\n    "bits": 8\n  }\n}\n'
    assert (out / "quant_config.json").read_text(encoding="utf-8") == expected
    assert "quant_config.json: its keys follow the layers" in read_report(out).notes


def test_side_file_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = quantized(tmp_path / "source", "gptq")
    (source / "quantize_config.json").write_text("[1]", encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"model: {source}\nsteps: [{{prune: {{at: 1}}}}]\n", encoding="utf-8")
    assert main(["plan", str(recipe)]) == 1
    assert capsys.readouterr().err == f"error: {source}/quantize_config.json: not a JSON object\n"


# What holds of all names


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Member:
    return member(tmp_path_factory.mktemp("shared"), {"ignore": []})


@given(
    layer=st.integers(0, 11),
    order=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    form=st.sampled_from(["model.layers.{}.mlp", "model.layers.{}", r"re:.*layers\.{}\..*"]),
)
def test_a_name_stands_once_for_each_copy_of_its_layer(shared: Member, layer: int, order: list[int], form: str) -> None:
    quantization = {"ignore": [form.format(layer), "lm_head"]}
    config = {**shared.checkpoint.config, "quantization_config": quantization}
    changed = Member(dataclasses.replace(shared.checkpoint, config=config), shared.stack)
    done = follow("m", {"m": changed}, order_of(*order))
    after = done.edits[0].after if done.edits else quantization["ignore"]
    assert after == [*(form.format(at) for at, index in enumerate(order) if index == layer), "lm_head"]


TWO_LISTS = {f"transformer.{name}.{at}.lin.weight": ("U8", (4,), b"....") for name in ("attentions", "ffns") for at in range(4)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["transformer.attentions.1.lin", "transformer.ffns.1.lin"], []),
        (["transformer.attentions.2", "transformer.ffns.3.lin"], ["transformer.attentions.1", "transformer.ffns.2.lin"]),
        (["ffns.0.lin", "attentions.3.lin"], ["ffns.0.lin", "attentions.2.lin"]),
        (["re:.*ffns\\.2\\..*"], ["re:.*ffns\\.1\\..*"]),
        (["*.ffns.[12].lin"], ["transformer.ffns.1.lin"]),
        (["*.[af]*s.3.*"], ["transformer.attentions.2.lin", "transformer.ffns.2.lin"]),
        (["transformer.*.lin"], ["transformer.*.lin"]),
        (["encoder.ffns.2.lin"], ["encoder.ffns.2.lin"]),
    ],
)
def test_names_in_every_list_of_a_stack_follow(tmp_path: Path, before: list[str], after: list[str]) -> None:
    """XLM keeps the parts of a layer in lists side by side."""
    config = {"model_type": "xlm", "n_layers": 4, "quantization_config": {"ignore": before}}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, TWO_LISTS, config))
    source = Member(checkpoint, find_stack(checkpoint))
    assert source.stack.prefixes == ("transformer.attentions.", "transformer.ffns.")
    done = follow("m", {"m": source}, order_of(0, 2, 3))
    assert (done.edits[0].after if done.edits else before) == after


def test_a_list_with_an_entry_for_every_few_layers(tmp_path: Path) -> None:
    """IDEFICS: gate 1 belongs to layer 2, and follows it."""
    tensors = {f"model.layers.{at}.w": ("U8", (4,), b"....") for at in range(6)}
    tensors |= {f"model.gated_cross_attn_layers.{at}.lin.weight": ("U8", (4,), b"....") for at in range(3)}
    names = ["model.gated_cross_attn_layers.1.lin", "model.gated_cross_attn_layers.2", "model.layers.4"]
    config = {"model_type": "idefics", "num_hidden_layers": 6, "cross_layer_interval": 2, "quantization_config": {"ignore": names}}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config))
    source = Member(checkpoint, find_stack(checkpoint))
    assert source.stack.siblings[0].stride == 2
    done = follow("m", {"m": source}, order_of(0, 1, 4, 5))
    assert done.edits[0].after == ["model.gated_cross_attn_layers.1", "model.layers.2"]


def test_depth_is_no_reason_to_guess(tmp_path: Path) -> None:
    """A stack without a name before its numbers has no names that can be told apart."""
    write_checkpoint(tmp_path, {f"{layer}.w": ("U8", (4,), b"....") for layer in range(3)}, {"num_hidden_layers": 3})
    checkpoint = open_checkpoint(tmp_path)
    naming = Naming(find_stack(checkpoint), checkpoint.tensors)
    assert naming.spot("layers.0.w") is None and naming.spot("0.w") is None


def test_errors_are_layercut_errors(byte_checkpoint: Callable[..., Path]) -> None:
    assert issubclass(RefusedError, LayercutError)
    assert is_quantized(open_checkpoint(byte_checkpoint()), find_stack(open_checkpoint(byte_checkpoint()))) is False
