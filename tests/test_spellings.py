"""Old and new spellings of the same model: each checkpoint is cut by what its own files say, and loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import sweep
import torch
import zoo
from safetensors.torch import load_file, save_file

from layercut.api import run_recipe
from layercut.errors import LayercutError
from layercut.recipe import Recipe

KINDS = ("causal:mixtral", "causal:qwen3_moe", "causal:deepseek_v3", "causal:gpt_oss", "image:llava", "image:gemma3", "image:qwen2_5_vl")
GONE = 1
pytestmark = pytest.mark.usefixtures("quietly")


def cut(folder: Path, out: Path, *gone: int) -> Any:
    """The model without one layer, or without these, loaded whole."""
    recipe = {"model": str(folder), "steps": [{"prune": {"at": list(gone) or [GONE]}}], "output": str(out)}
    run_recipe(Recipe.model_validate(recipe), progress=False)
    loaded = oracle.load(out)
    assert loaded.problems == ()
    return loaded.model


def skipped(source: sweep.Source) -> torch.Tensor:
    ((_, lists),) = oracle.stacks(source.model, zoo.depth_of(source.kind)).items()
    with oracle.skipped(source.model, lists, [GONE]):
        return oracle.logits(source.model)


def in_memory_names(source: sweep.Source, folder: Path) -> Path:
    """The same checkpoint with the names that its tensors have in memory: experts fused, prefixes as they are since the rename."""
    shutil.copytree(source.folder, folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    seen: set[int] = set()
    held = {}
    for name, tensor in source.model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            held[name] = tensor.clone().contiguous()
        seen.add(tensor.data_ptr())
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def names(folder: Path) -> set[str]:
    return set(oracle_names(folder))


def oracle_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_names_on_disk_and_in_memory(name: str, tmp_path: Path) -> None:
    task, _, kind = name.partition(":")
    source = sweep.saved(kind, task, tmp_path / "old")
    new = in_memory_names(source, tmp_path / "new")
    wanted = skipped(source)
    for folder in (source.folder, new):
        assert oracle.difference(oracle.logits(oracle.load(folder).model), oracle.logits(source.model)) == 0
        assert oracle.difference(oracle.logits(cut(folder, tmp_path / f"{folder.name}-cut")), wanted) < sweep.TOLERANCE
    if kind in ("mixtral", "qwen3_moe", "deepseek_v3", "llava", "gemma3"):
        assert names(source.folder) != names(new), "two spellings"
    assert len(names(tmp_path / "new-cut")) < len(names(new))


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.filterwarnings("ignore")
def test_rope_as_it_was_written_before(theta: float, tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` of older files stay as they are, and mean the same."""
    source = sweep.saved("llama", "causal", tmp_path / "m")
    path = source.folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("rope_parameters")
    scaling = {"type": "linear", "factor": 2.0}
    path.write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": scaling}, indent=2), encoding="utf-8")
    old = source._replace(model=oracle.load(source.folder).model)
    assert oracle.difference(oracle.logits(old.model), oracle.logits(source.model)) > 1e-3
    assert oracle.difference(oracle.logits(cut(source.folder, tmp_path / "out")), skipped(old)) < sweep.TOLERANCE
    after = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (after["rope_theta"], after["rope_scaling"], "rope_parameters" in after) == (theta, scaling, False)


@pytest.mark.filterwarnings("ignore")
def test_a_base_model_without_the_prefix_of_its_class(tmp_path: Path) -> None:
    source = sweep.saved("gpt2", "causal", tmp_path / "whole")
    source.model.base_model.save_pretrained(tmp_path / "base")
    assert {name.split(".")[0] for name in names(tmp_path / "base")} == {"wte", "wpe", "h", "ln_f"}
    recipe = {"model": str(tmp_path / "base"), "steps": [{"prune": {"at": [GONE]}}], "output": str(tmp_path / "out")}
    run_recipe(Recipe.model_validate(recipe), progress=False)
    left = {name.split(".")[1] for name in names(tmp_path / "out") if name.startswith("h.")}
    assert left == {str(at) for at in range(zoo.depth_of("gpt2") - 1)}
    loaded = oracle.load(tmp_path / "out")
    ids = torch.tensor(oracle.IDS)
    with oracle.skipped(source.model, ["transformer.h"], [GONE]), torch.no_grad():
        wanted = source.model.base_model(ids, use_cache=False).last_hidden_state
    with torch.no_grad():
        assert oracle.difference(loaded.model(ids, use_cache=False).last_hidden_state, wanted) < 1e-5


def in_halves(source: sweep.Source, folder: Path) -> Path:
    """A Dory as it was published: the attention and the MLP of layer i are entries 2i and 2i + 1."""
    shutil.copytree(source.folder, folder)
    held = {}
    for name, tensor in load_file(source.folder / "model.safetensors").items():
        head, layers, rest = name.partition("layers.")
        number, _, part = rest.partition(".")
        for module, half in (("self_attn", 0), ("mlp", 1)):
            if part.startswith(f"{module}."):
                part = f"mixer.{part.removeprefix(f'{module}.')}"
                number = str(2 * int(number) + half)
        if part in ("lambda_1", "lambda_2"):
            number, part = str(2 * int(number) + int(part == "lambda_2")), {"lambda_1": "attn_alpha", "lambda_2": "mlp_alpha"}[part]
        held[f"{head}{layers}{number}.{part}" if layers else name] = tensor
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_dory_in_halves_is_cut_in_whole_layers(tmp_path: Path) -> None:
    source = sweep.saved("dory", "causal", tmp_path / "m")
    folder = in_halves(source, tmp_path / "halves")
    assert {f"backbone.layers.{at}.{part}" for at, part in ((10, "attn_alpha"), (11, "mlp_alpha"))} <= names(folder)
    assert torch.equal(oracle.logits(oracle.load(folder).model), oracle.logits(source.model))
    model = cut(folder, tmp_path / "out", 2, 3)
    assert oracle.difference(oracle.logits(model), skipped(source)) <= sweep.TOLERANCE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers")] == [10, 2, 4, 4]


@pytest.mark.filterwarnings("ignore")
def test_an_hrm_that_counts_the_layers_of_one_stack(tmp_path: Path) -> None:
    """The first files say `num_hidden_layers` and mean the layers of each of the two."""
    source = sweep.saved("hrm_text", "causal", tmp_path / "m")
    shutil.copytree(source.folder, tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    assert (config.pop("num_layers_per_stack"), config["num_hidden_layers"]) == (6, 48)
    path.write_text(json.dumps({**config, "num_hidden_layers": 6}))
    model = cut(tmp_path / "old", tmp_path / "out")
    assert oracle.difference(oracle.logits(model), skipped(source)) <= sweep.TOLERANCE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 5


@pytest.mark.parametrize(("groups", "gone"), [(1, (0, 3, 4)), (2, (1, 5)), (3, (0, 2, 4))])
@pytest.mark.filterwarnings("ignore")
def test_albert_without_layers_of_its_groups(groups: int, gone: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.CONFIGS, "albert", {"num_hidden_groups": groups, "inner_group_num": 2})  # type: ignore[arg-type]
    source = sweep.saved("albert", "masked", tmp_path / "m")
    with oracle.skipped(source.model, [], gone):
        wanted = oracle.logits(source.model)
    assert oracle.difference(wanted, oracle.logits(source.model)) > sweep.TOLERANCE
    assert oracle.difference(oracle.logits(cut(source.folder, tmp_path / "out", *gone)), wanted) <= sweep.TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_a_whole_block_of_inkling2(tmp_path: Path) -> None:
    """No queries of it are left, and the blocks behind it attend to one less."""
    source = sweep.saved("inkling2_text", "causal", tmp_path / "m")
    for number, gone in enumerate(((3, 4, 5), (1, 2), (2, 5))):
        ((_, lists),) = oracle.stacks(source.model, 6).items()
        with oracle.skipped(source.model, lists, gone):
            wanted = oracle.logits(source.model)
        out = tmp_path / f"{number}"
        if number == 1:
            with pytest.raises(LayercutError, match="first layers of the blocks to which later layers attend"):
                cut(source.folder, out, *gone)
        else:
            assert oracle.difference(oracle.logits(cut(source.folder, out, *gone)), wanted) <= sweep.TOLERANCE
