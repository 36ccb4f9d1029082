"""contents.py: every byte of an output against its sources, and which of them, where, and why it cannot be told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_tensors, write_checkpoint
from test_executor import plan_for

from layercut import contents as module
from layercut.api import run_recipe
from layercut.checkpoint import open_checkpoint
from layercut.contents import DiffersError, NotCheckedError, check_contents, expected, recipe_of
from layercut.executor import execute
from layercut.header import read_header
from layercut.recipe import Recipe
from layercut.report import Report, read_report

O_PROJ = "model.layers.2.self_attn.o_proj.weight"


@pytest.fixture
def output(byte_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Layers 0, 1, 4 and 4 again of `source`, which is where the report says: in the current directory."""
    monkeypatch.chdir(tmp_path)
    plan = plan_for({"source": byte_checkpoint("source", layers=6)}, [("source", index) for index in (0, 1, 4, 4)], shards=2)
    execute(plan, tmp_path / "out", progress=False)
    return tmp_path / "out"


def changed(output: Path, **values: Any) -> Report:
    """The report with other values."""
    return Report.model_validate({**json.loads(read_report(output).to_json()), **values})


def told(output: Path, report: Report | None = None) -> str:
    """What is said of the contents, whichever way it ends."""
    try:
        return check_contents(open_checkpoint(output), read_report(output) if report is None else report)
    except (DiffersError, NotCheckedError) as error:
        return f"{type(error).__name__}: {error}"


def flip(folder: Path, name: str, at: int) -> None:
    """Change one byte of a tensor."""
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in read_header(file).tensors:
            if tensor.name == name:
                data = bytearray(file.read_bytes())
                data[tensor.begin + at] ^= 255
                file.write_bytes(data)
                return
    raise AssertionError(name)


# What differs


def test_all_tensors_are_compared(output: Path) -> None:
    assert told(output) == "11 tensors are byte for byte those of the sources"


@pytest.mark.parametrize("piece", [7, 16, 64, 4 << 20])
@pytest.mark.parametrize("at", [0, 6, 7, 15, 16, 63])
def test_the_first_byte_that_differs_is_named(output: Path, monkeypatch: pytest.MonkeyPatch, piece: int, at: int) -> None:
    """In whichever piece of the tensor it stands."""
    monkeypatch.setattr(module, "PIECE", piece)
    flip(output, O_PROJ, at)
    if at < 50:
        flip(output, O_PROJ, 60)
    origin = "'model.layers.4.self_attn.o_proj.weight' of 'source'"
    assert told(output) == f"DiffersError: '{O_PROJ}' is not {origin}: they differ from byte {at} on"


def test_of_several_tensors_the_first_is_named_and_all_are_counted(output: Path) -> None:
    for layer in (3, 1, 2):
        flip(output, f"model.layers.{layer}.mlp.down_proj.weight", 5)
    name = "model.layers.1.mlp.down_proj.weight"
    assert told(output) == f"DiffersError: '{name}' is not '{name}' of 'source': they differ from byte 5 on (3 tensors differ)"


def test_tensors_that_are_missing_or_too_many(output: Path) -> None:
    whole = open_checkpoint(output)
    report = read_report(output)
    for tensors, said in (
        ({name: tensor for name, tensor in whole.tensors.items() if name != O_PROJ}, f"'{O_PROJ}' is missing"),
        ({**whole.tensors, "odd": whole.tensors[O_PROJ]}, "'odd' is of no layer that the report lists"),
        ({**whole.tensors, "odd": whole.tensors[O_PROJ], "even": whole.tensors[O_PROJ]}, "'even' is of no layer that the report lists"),
        ({**whole.tensors, O_PROJ: whole.tensors[O_PROJ]._replace(shape=(64,))}, f"'{O_PROJ}' is U8 [64], and should be U8 [8, 8]"),
        ({**whole.tensors, O_PROJ: whole.tensors[O_PROJ]._replace(dtype="I8")}, f"'{O_PROJ}' is I8 [8, 8], and should be U8 [8, 8]"),
    ):
        odd = type(whole)(**{**{field: getattr(whole, field) for field in whole.__dataclass_fields__}, "tensors": tensors})
        with pytest.raises(DiffersError) as caught:
            check_contents(odd, report)
        assert str(caught.value) == said


def test_a_report_of_other_layers(output: Path) -> None:
    layers = json.loads(read_report(output).to_json())["layers"]
    assert told(output, changed(output, layers=layers[:3])) == "DiffersError: the report lists 3 layers, config.json states 4"
    layers[2]["index"] = 3
    name = "model.layers.3.self_attn.o_proj.weight"
    assert told(output, changed(output, layers=layers)) == (
        f"DiffersError: '{O_PROJ}' is not '{name}' of 'source': they differ from byte 7 on (2 tensors differ)"
    )


def test_a_report_whose_recipe_is_none(output: Path) -> None:
    report = changed(output, recipe={"model": "source", "steps": "x"})
    assert told(output, report).startswith("DiffersError: the recipe in the report is none: ")
    assert recipe_of(read_report(output)) == Recipe(model="source")


def test_a_report_of_another_depth_of_a_source(output: Path) -> None:
    sources = json.loads(read_report(output).to_json())["sources"]
    sources["source"]["depth"] = 7
    assert told(output, changed(output, sources=sources)) == "DiffersError: the report gives 'source' 7 layers, it has 6"


# What cannot be compared


@pytest.mark.parametrize("reference", ["source", "./source", "~/source"])
def test_a_source_is_found_by_its_reference(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    sources = json.loads(read_report(output).to_json())["sources"]
    sources["source"]["reference"] = reference
    assert told(output, changed(output, sources=sources)) == "11 tensors are byte for byte those of the sources"


def test_a_source_that_cannot_be_told_from(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, head = tmp_path / "source", "NotCheckedError: source 'source' ('source') "
    sources = json.loads(read_report(output).to_json())["sources"]
    sources["source"]["revision"] = "0" * 40
    assert told(output, changed(output, sources=sources)) == f"{head}is not in the local Hub cache"
    config = source / "config.json"
    kept = config.read_text(encoding="utf-8")
    config.write_text(kept.replace("llama", "mistral"), encoding="utf-8")
    assert told(output) == f"{head}is no longer what it was: config or structure are others"
    config.write_text("{", encoding="utf-8")
    assert told(output).startswith(f"{head}cannot be opened: not JSON")

    def denied(*given: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(module, "resolve", denied)
        assert told(output) == f"{head}cannot be read: Permission denied"
    source.rename(tmp_path / "elsewhere")
    assert told(output) == f"{head}is gone"


# Computed tensors


def test_computed_tensors_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {name: ("F32", (4, 4), data) for name, (_, _, data) in byte_tensors(4).items()}
    write_checkpoint(tmp_path / "source", values, {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 4, "vocab_size": 4})
    recipe = Recipe.model_validate({"model": "source", "steps": [{"zero": {"at": 1, "tensors": "*o_proj*"}}], "output": "out"})
    run_recipe(recipe, progress=False)
    out = tmp_path / "out"
    assert told(out) == "11 tensors are byte for byte those of the sources, 1 of them computed again"
    content = expected(read_report(out))
    assert (len(content.entries), content.lost, dict(content.maps), list(content.members)) == (11, [], {}, ["source"])
    name = "model.layers.1.self_attn.o_proj.weight"
    flip(out, name, 9)
    assert told(out) == f"DiffersError: '{name}' is not what its sources give: they differ from byte 9 on"
