"""The whole way: recipe in, model out. The oracle is transformers with the layers removed in memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import KINDS, tiny_model

from layercut.api import plan_recipe
from layercut.cli import main
from layercut.errors import CalibrationError
from layercut.plan import Plan
from layercut.report import VOLATILE, read_report

ROOT = Path(__file__).parent.parent


def rearranged(folder: Path, order: Sequence[int]) -> Any:
    """The model of `folder` with its layers picked in memory, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    backbone = model.base_model
    name = "h" if hasattr(backbone, "h") else "layers"
    layers = getattr(backbone, name)
    setattr(backbone, name, torch.nn.ModuleList([layers[index] for index in order]))
    model.config.num_hidden_layers = len(order)
    kinds = getattr(model.config, "layer_types", None)
    if kinds is not None:
        model.config.layer_types = [kinds[index] for index in order]
    return model


def logits(model: Any, length: int = 24) -> Any:
    import torch

    ids = torch.arange(3, 3 + length).remainder(model.config.vocab_size)[None]
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def reloaded(folder: Path) -> Any:
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, clocks and versions in the report aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        if path.name == "layercut.json":
            report = json.loads(data)
            data = json.dumps({key: value for key, value in report.items() if key not in VOLATILE}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("steps", "order"),
    [
        ("[{prune: {at: [1, 4]}}]", [0, 2, 3, 5]),
        ("[{prune: {at: 0}}]", [1, 2, 3, 4, 5]),
        ("[{keep: {at: ['0-2', 5]}}]", [0, 1, 2, 5]),
        ("[{duplicate: {at: '2-3'}}]", [0, 1, 2, 3, 2, 3, 4, 5]),
    ],
)
def test_same_logits_as_in_memory(kind: str, steps: str, order: list[int], tiny: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    source = tiny(kind)
    recipe = write(tmp_path / "r.yaml", f"model: {source}\nsteps: {steps}\noutput: {tmp_path / 'out'}\n")
    assert main(["run", str(recipe), "-q"]) == 0
    assert torch.equal(logits(reloaded(tmp_path / "out")), logits(rearranged(source, order)))
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_smollm2_cut_by_measurement(smollm2: Path, tmp_path: Path) -> None:
    """Real weights: the block is chosen by distance, and the result is the model without it, bit for bit."""
    import torch

    recipe = write(
        tmp_path / "r.yaml",
        f"model: {smollm2}\ncalibration: {{source: builtin, samples: 4, max_length: 128}}\n"
        f"steps: [{{prune: {{layers: 6, strategy: block}}}}]\noutput: {tmp_path / 'out'}\n",
    )
    assert main(["run", str(recipe), "-q"]) == 0
    report = read_report(tmp_path / "out")
    assert len(report.layers) == 24 and len(report.seams) == 1
    order = [layer.index for layer in report.layers]
    assert torch.equal(logits(reloaded(tmp_path / "out"), 64), logits(rearranged(smollm2, order), 64))
    candidates = report.choices[0].candidates
    assert len(candidates) == 25
    best = min(candidates, key=lambda candidate: candidate.cost)
    assert (report.seams[0].from_boundary, report.seams[0].to_boundary) == (best.start, best.stop)
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_planted_block_is_found(tmp_path: Path) -> None:
    """Layers 5 to 8 of 12 hardly change the state: a cut of four layers takes exactly them."""
    import torch
    import transformers
    from conftest import tiny_model

    source = tiny_model(tmp_path / "source", layers=12)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for index in range(5, 9):
            model.model.layers[index].self_attn.o_proj.weight.mul_(1e-3)
            model.model.layers[index].mlp.down_proj.weight.mul_(1e-3)
    model.save_pretrained(source)
    for metric in ("angular", "cosine"):
        text = f"model: {source}\nmetric: {metric}\ncalibration: {{source: builtin, samples: 4, max_length: 64}}\n"
        text += "steps: [{prune: {layers: 4}}]\n"
        recipe = write(tmp_path / f"{metric}.yaml", text)
        assert main(["run", str(recipe), "-q", "--out", str(tmp_path / metric)]) == 0
        assert read_report(tmp_path / metric).dropped == {str(source): (5, 6, 7, 8)}


def test_slices_with_auto_and_prune_are_one_plan(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama", layers=8)
    text = "calibration: {source: builtin, samples: 4, max_length: 64}\n"
    pruned = write(tmp_path / "a.yaml", f"model: {source}\n{text}steps: [{{prune: {{layers: 3, strategy: block}}}}]\n")
    slices = f"slices:\n- {{model: {source}, layer_range: [0, auto]}}\n- {{model: {source}, layer_range: [auto, 8]}}\n"
    sliced = write(tmp_path / "b.yaml", f"{slices}depth: 5\n{text}")
    plans = []
    for recipe in (pruned, sliced):
        assert main(["plan", str(recipe), "-q", "-o", str(recipe.with_suffix(".json"))]) == 0
        plans.append(Plan.from_json(recipe.with_suffix(".json").read_bytes()))
    assert plans[0].digest == plans[1].digest
    assert (plans[0].actions, plans[0].seams, plans[0].edits) == (plans[1].actions, plans[1].seams, plans[1].edits)


def test_a_plan_runs_to_the_same_bytes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    text = f"model: {tiny('qwen3')}\ncalibration: {{source: builtin, samples: 2, max_length: 64}}\nsteps: [{{prune: {{layers: 2}}}}]\n"
    recipe = write(tmp_path / "r.yaml", text)
    assert main(["plan", str(recipe), "-q", "-o", str(tmp_path / "plan.json")]) == 0
    assert main(["run", str(tmp_path / "plan.json"), "-q", "--out", str(tmp_path / "from-plan")]) == 0
    assert main(["run", str(recipe), "-q", "--out", str(tmp_path / "from-recipe")]) == 0
    assert digests(tmp_path / "from-plan") == digests(tmp_path / "from-recipe")


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ("{perplexity: {source: text, path: none.txt}}", "none.txt: no such file"),
        (
            "{generate: Hello}",
            "{model}: no tokenizer can be loaded: there is no file of one; "
            "copy tokenizer.json and tokenizer_config.json of the original model into the folder",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_found_out_before_it_is_written(
    evaluate: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "m", layers=3, tokenizer="perplexity" in evaluate)
    (tmp_path / "r.yaml").write_text(f"model: {model}\nsteps: [{{prune: {{at: 1}}}}]\noutput: {tmp_path}/out\nevaluate: {evaluate}\n")
    assert main(["run", str(tmp_path / "r.yaml")]) == 1
    assert capsys.readouterr().err == f"error: {message.format(model=model)}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "r.yaml"]


def test_a_text_that_cannot_be_read_is_told_with_its_place(tiny: Callable[..., Path], tmp_path: Path) -> None:
    text = "calibration: {source: text, path: none.txt}\nsteps: [{prune: {layers: 1, strategy: block}}]\n"
    (tmp_path / "r.yaml").write_text(f"model: {tiny('llama')}\n{text}")
    with pytest.raises(CalibrationError) as caught:
        plan_recipe(tmp_path / "r.yaml")
    assert str(caught.value) == f"{tmp_path}/r.yaml:2:14: none.txt: no such file"


def test_evaluation_is_reported(tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(
        tmp_path / "r.yaml",
        f"model: {tiny('llama')}\nsteps: [{{prune: {{at: 2}}}}]\noutput: {tmp_path / 'out'}\n"
        "evaluate: {perplexity: {source: builtin, samples: 2, max_length: 64}, generate: Once upon a time, tokens: 5}\n",
    )
    assert main(["run", str(recipe), "-q"]) == 0
    shown = capsys.readouterr().out
    report = read_report(tmp_path / "out")
    assert report.evaluation is not None
    before, after = (report.evaluation["perplexity"][name]["value"] for name in ("before", "after"))
    assert before != after and f"{before:.2f} -> {after:.2f}" in shown
    assert main(["eval", str(tmp_path / "out"), "--samples", "2", "--max-length", "64", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["value"] == pytest.approx(after)


@pytest.mark.parametrize("shards", [1, 3])
def test_static_output_does_not_depend_on_seed_or_threads(shards: int, byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = byte_checkpoint(shards=shards)
    (source / "tokenizer.json").write_text("{}")
    recipe = write(
        tmp_path / "r.yaml",
        f"model: {source}\nsteps: [{{prune: {{at: [1, 3]}}}}, {{duplicate: {{at: 2, times: 2}}}}]\n"
        "output: {path: out, max_shard_size: 500}\n",
    )
    found = []
    for number, (seed, threads) in enumerate([("0", "1"), ("1", "2"), ("2", "1"), ("3", "2")]):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-m", "layercut", "run", str(recipe), "-q"],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(ROOT)},
            check=True,
        )
        found.append(digests(folder / "out"))
    assert found[1:] == found[:-1] and len(found[0]) > 5


def test_a_second_cut_of_a_cut(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """An output is a checkpoint like any other."""
    import torch

    source = tiny("gemma3_text", layers=6)
    first = write(tmp_path / "a.yaml", f"model: {source}\nsteps: [{{prune: {{at: 1}}}}]\noutput: {tmp_path / 'a'}\n")
    second = write(tmp_path / "b.yaml", f"model: {tmp_path / 'a'}\nsteps: [{{prune: {{at: 2}}}}]\noutput: {tmp_path / 'b'}\n")
    assert main(["run", str(first), "-q"]) == main(["run", str(second), "-q"]) == 0
    assert torch.equal(logits(reloaded(tmp_path / "b")), logits(rearranged(source, [0, 2, 4, 5])))


def test_of_several_weight_sets_only_the_indexed_one_is_used(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Repositories hold their weights two or three times over. The other sets are not even read: here they are not what they seem."""
    source = byte_checkpoint(layers=6, shards=2)
    plain = write(tmp_path / "plain.yaml", f"model: {source}\nsteps: [{{prune: {{at: 2}}}}]\n")
    assert main(["run", str(plain), "-q", "--out", str(tmp_path / "plain")]) == 0
    others = (
        "consolidated.safetensors",
        "model-00003-of-00003.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "pytorch_model.bin",
    )
    for name in (*others, "original/params.json", "params.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"\xff" * 9)
    again = write(tmp_path / "again.yaml", f"model: {source}\nsteps: [{{prune: {{at: 2}}}}]\n")
    assert main(["run", str(again), "-q", "--out", str(tmp_path / "again")]) == 0
    before, after = (digests(tmp_path / name) for name in ("plain", "again"))
    assert after.keys() - before.keys() == {"params.json"}
    assert {name: after[name] for name in before if name != "layercut.json"} == {
        name: before[name] for name in before if name != "layercut.json"
    }
    uncut = "weights of the uncut model, in another format or copy"
    listed = {item.what: item.reason for item in read_report(tmp_path / "again").left_out}
    assert listed == {
        "layer 2 (2 tensors, model.layers.*)": "not in the stack that the recipe asks for",
        **dict.fromkeys(["consolidated.safetensors", "model-00003-of-00003.safetensors", "onnx/", "original/", "pytorch_model.bin"], uncut),
    }


COMPANIONS = (
    "LICENSE", "README.md", "USE_POLICY.md", "added_tokens.json", "additional_chat_templates/tools.jinja", "chat_template.jinja",
    "configuration_custom.py", "generation_config.json", "merges.txt", "modeling_custom.py", "modules.json", "preprocessor_config.json",
    "sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "images/figure 1.png", "1_Pooling/config.json",
)  # fmt: skip


def test_no_companion_is_lost(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = byte_checkpoint(shards=2)
    for number, name in enumerate(COMPANIONS):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number]) * (number + 1))
    recipe = write(tmp_path / "r.yaml", f"model: {source}\nsteps: [{{prune: {{at: 1}}}}]\n")
    for name in ("a", "b"):
        assert main(["run", str(recipe), "-q", "--out", str(tmp_path / name)]) == 0
    for name in COMPANIONS:
        assert (tmp_path / "a" / name).read_bytes() == (source / name).read_bytes()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


EVERY_METRIC = """\
metrics:
  - angular
  - {name: cosine, token: skip-first-1}
  - relative_magnitude
  - {name: euclidean, token: 2}
  - {name: euclidean, normalised: true}
  - {name: linear, draw: 128}
  - {name: procrustes, draw: 64}
  - cka
calibration: {source: builtin, samples: 6, max_length: 24}
"""
LABELS = [
    "angular[last]", "cosine[skip-first-1]", "relative_magnitude[all]", "euclidean[2]", "euclidean[all, normalised]",
    "linear[skip-first-1, draw=128]", "procrustes[skip-first-1, draw=64]", "cka[skip-first-1]",
]  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "cka", "procrustes", "relative_magnitude", "euclidean"])
def test_every_metric_can_decide(name: str, tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"model: {tiny()}\nsteps: [{{prune: {{layers: 2, strategy: block, metric: {name}}}}}]\n{EVERY_METRIC}"
    plan_file = tmp_path / "plan.json"
    assert main(["plan", str(write(tmp_path / "r.yaml", text)), "-o", str(plan_file), "--quiet"]) == 0, capsys.readouterr().err
    plan = Plan.from_json(plan_file.read_text(encoding="utf-8"))
    assert plan.measurement is not None
    label = f"{name}[{'all' if name in ('relative_magnitude', 'euclidean') else 'skip-first-1'}]"
    assert [table.metric for table in plan.measurement.tables] == list(dict.fromkeys([*LABELS, label]))
    (choice,) = plan.choices
    assert choice.metric == label
    mean = plan.measurement.table(label, plan.donor, plan.donor).mean
    best = min(range(5), key=lambda start: mean[start][start + 2])
    assert choice.candidates[best].cost == choice.cost == pytest.approx(mean[best][best + 2], abs=1e-11)
    assert all(set(seam.distances) == {*LABELS, label} for seam in plan.seams)


def test_a_directed_metric_decides_between_two_models(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""\
models: {{a: {tiny()}, b: {tiny(seed=1)}}}
slices: [{{model: a, layer_range: [0, auto]}}, {{model: b, layer_range: [auto, end]}}]
depth: 6
metric: relative_magnitude
calibration: {{source: builtin, samples: 4, max_length: 24}}
"""
    plan_file = tmp_path / "plan.json"
    assert main(["plan", str(write(tmp_path / "r.yaml", text)), "-o", str(plan_file), "--quiet"]) == 0, capsys.readouterr().err
    plan = Plan.from_json(plan_file.read_text(encoding="utf-8"))
    assert plan.measurement is not None
    label = "relative_magnitude[all]"
    given = plan.measurement.table(label, "a", "b").mean  # |h_b - h_a| / |h_b|: what b expects is the measure
    other = plan.measurement.table(label, "b", "a").mean
    (seam,) = (seam for seam in plan.seams if seam.from_model != seam.to_model)
    assert (seam.from_model, seam.to_model) == ("a", "b")
    assert seam.distances[label].mean == given[seam.from_boundary][seam.to_boundary] != other[seam.to_boundary][seam.from_boundary]
    assert given[seam.from_boundary][seam.to_boundary] == min(given[at][at] for at in range(1, 6))
