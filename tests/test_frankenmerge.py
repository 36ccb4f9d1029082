"""Several models and arithmetic, the whole way: the oracle is transformers with the same done in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import KINDS, byte_tokenizer, tiny_model
from test_end_to_end import logits, rearranged, reloaded, write

from layercut.cli import main
from layercut.report import read_report

Make = Callable[..., Path]


@pytest.mark.parametrize("kind", KINDS)
def test_an_expanded_model_computes_the_same(kind: str, tiny: Make, tmp_path: Path) -> None:
    """LLaMA-Pro: the copies add nothing until they are trained."""
    import torch

    source = tiny(kind)
    recipe = write(tmp_path / "r.yaml", f"model: {source}\nsteps: [{{expand: {{every: 2}}}}]\noutput: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    model = reloaded(tmp_path / "out")
    assert model.config.num_hidden_layers == 9
    torch.testing.assert_close(logits(model), logits(rearranged(source, range(6))), rtol=0, atol=1e-6)
    assert not read_report(tmp_path / "out").seams


def test_a_zeroed_block_is_an_identity(tiny: Make, tmp_path: Path) -> None:
    import torch

    source = tiny("llama")
    steps = '[{zero: {at: "2-3", tensors: "*.self_attn.o_proj.weight"}}, {zero: {at: "2-3", tensors: "*.mlp.down_proj.weight"}}]'
    recipe = write(tmp_path / "r.yaml", f"model: {source}\nsteps: {steps}\noutput: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    assert torch.equal(logits(reloaded(tmp_path / "out")), logits(rearranged(source, [0, 1, 4, 5])))


def test_merge_and_scale_are_what_they_say(tiny: Make, tmp_path: Path) -> None:
    import torch

    source = tiny("llama")
    steps = '[{merge: {at: [1, 2], weights: [3, 1]}}, {scale: {at: -1, tensors: "*.mlp.down_proj.weight", by: 0.5}}]'
    recipe = write(tmp_path / "r.yaml", f"model: {source}\nsteps: {steps}\noutput: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    model = rearranged(source, [0, 1, 3, 4, 5])
    other = rearranged(source, range(6)).model.layers[2]
    with torch.no_grad():
        for mine, theirs in zip(model.model.layers[1].parameters(), other.parameters(), strict=True):
            mine.copy_(0.75 * mine + 0.25 * theirs)
        model.model.layers[4].mlp.down_proj.weight.mul_(0.5)
    assert torch.equal(logits(reloaded(tmp_path / "out")), logits(model))


def test_a_stack_of_two_models(tiny: Make, tmp_path: Path) -> None:
    """Embeddings of the first slice's model, layers of each, head of the last slice's model."""
    import torch

    first, second = tiny("llama", seed=1), tiny("llama", seed=2)
    text = f"slices:\n- {{model: {first}, layer_range: [0, 4]}}\n- {{model: {second}, layer_range: [2, 6]}}\n"
    recipe = write(tmp_path / "r.yaml", f"{text}output: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    model, other = rearranged(first, range(4)), rearranged(second, range(2, 6))
    model.model.layers.extend(other.model.layers)
    model.config.num_hidden_layers = 8
    model.model.norm, model.lm_head = other.model.norm, other.lm_head
    assert torch.equal(logits(reloaded(tmp_path / "out")), logits(model))
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("tied", "expected"), [((True, False), False), ((False, True), False), ((True, True), True)])
def test_heads_that_are_tied_and_heads_that_are_not(tied: tuple[bool, bool], expected: bool, tiny: Make, tmp_path: Path) -> None:
    import torch

    folders = [tiny("llama", layers=3, seed=3 + number, tie_word_embeddings=flag) for number, flag in enumerate(tied)]
    slices = "".join(f"- {{model: {folder}, layer_range: [0, 3]}}\n" for folder in folders)
    recipe = write(tmp_path / "r.yaml", f"slices:\n{slices}allow: inexact\noutput: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is expected
    model = reloaded(tmp_path / "out")
    last = rearranged(folders[1], range(3))
    head = model.model.embed_tokens.weight if expected else last.lm_head.weight
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, rearranged(folders[0], range(3)).model.embed_tokens.weight)


def quiet_layer(layer: Any) -> Any:
    """A layer that hardly changes the state."""
    import copy

    import torch

    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
    return layer


def planted(folder: Path, base: Any, layers: Sequence[Any]) -> Path:
    import copy

    import torch

    model = copy.deepcopy(base)
    model.model.layers = torch.nn.ModuleList([copy.deepcopy(layer) for layer in layers])
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_cross_model_boundaries_find_a_planted_hand_over(tiny: Make, tmp_path: Path) -> None:
    """One model does nothing and then a step, the other the step and then nothing: only after both are the states the same."""
    base, other = rearranged(tiny("llama", seed=5), range(6)), rearranged(tiny("llama", seed=6), range(6))
    mine, theirs = list(base.model.layers), list(other.model.layers)
    still, step = quiet_layer(mine[1]), mine[0]
    first = planted(tmp_path / "first", base, [still, step, *theirs[2:]])
    second = planted(tmp_path / "second", base, [step, still, *mine[2:]])
    text = (
        f"models: {{one: {first}, two: {second}}}\nslices:\n"
        "- {model: one, layer_range: [0, auto]}\n- {model: two, layer_range: [auto, end]}\n"
        "depth: 6\ncalibration: {source: builtin, samples: 4, max_length: 64}\nmetric: {name: angular, token: all}\n"
    )
    recipe = write(tmp_path / "r.yaml", f"{text}output: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    report = read_report(tmp_path / "out")
    assert report.kept == {"one": ("[0, 2)",), "two": ("[2, 6)",)}
    assert report.seams[0].distances["angular[all]"].mean < 0.02


def test_other_tokenizers_are_refused(tmp_path: Path, tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tiny("llama", seed=1), tiny_model(tmp_path / "second", seed=2)
    path = second / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(data))
    slices = f"- {{model: {first}, layer_range: [0, 3]}}\n- {{model: {second}, layer_range: [3, 6]}}\n"
    recipe = write(tmp_path / "r.yaml", f"slices:\n{slices}output: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 1
    shown = capsys.readouterr().err
    assert "would load together but compute something else: the tokenizer's id of 'A' is 35 in one and 36 in the other" in shown
    assert shown.count("\n") == 1 and not (tmp_path / "out").exists()


def test_cast_to_another_dtype(tiny: Make, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    source = tiny("llama")
    recipe = write(tmp_path / "r.yaml", f"model: {source}\ndtype: bfloat16\noutput: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    mine, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name].to(torch.bfloat16)) for name in mine)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
