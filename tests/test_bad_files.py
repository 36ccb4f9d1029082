"""Bad input of every kind: one clear line, exit status 1, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from layercut.cli import main

Make = Callable[..., Path]
STATIC = "model: {source}\nsteps:\n  - prune: {{at: 1}}\noutput: {out}\n"
TEXT = "calibration: {{source: text, path: {text}, samples: 2, max_length: 16}}\n"
AUTO = "model: {source}\n" + TEXT + "steps:\n  - prune: {{layers: 1}}\noutput: {out}\n"
SLICE = "model: {source}\nslices: [{{layer_range: [%s]}}]\noutput: {out}\n"


class Case:
    """A source, a recipe and a text in a folder of their own."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        self.out, self.text, self.recipe = folder / "out", folder / "text.txt", folder / "r.yaml"

    def run(self, template: str, *arguments: str, **more: object) -> int:
        self.recipe.write_text(template.format(source=self.source, out=self.out, text=self.text, **more), encoding="utf-8")
        return main(["run", str(self.recipe), "-q", *arguments])

    def listing(self) -> list[str]:
        """Everything in the folder but the recipe."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path != self.recipe)


@pytest.fixture
def case(tmp_path: Path, byte_checkpoint: Make) -> Case:
    return Case(tmp_path, byte_checkpoint("source", shards=2))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STATIC.replace("at: 1", "att: 1"), "{r}:3:13: unknown key 'att'; did you mean 'at'?"),
        (STATIC + "colour: red\n", "{r}:5:1: unknown key 'colour'; known keys are"),
        (
            STATIC.replace("at: 1", "layers: many"),
            "{r}:3:21: expected a number of layers such as 6, or a percentage such as 25%, found 'many'",
        ),
        (SLICE % "5, 3", "layer_range [5, 3] is empty"),
        (SLICE % "3, 3", "layer_range [3, 3] is empty: [a, b) holds layers a to b - 1"),
        (SLICE % "0, 99", "{r}:2:24: layer_range [0, 99] leaves the model, which has 6 layers"),
        ("depth: 9\n" + SLICE % "0, auto", "{r}:1:8: depth 9 cannot be reached: the slices hold 1 to 6 layers"),
        (STATIC.replace("{source}", "{source}-not"), "no such folder"),
        (STATIC.replace("output: {out}\n", ""), "no output folder; set 'output' in the recipe or give --out DIR"),
    ],
)  # fmt: skip
def test_recipes(template: str, message: str, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    before = case.listing()
    assert case.run(template) == 1
    _one_line(capsys, message.replace("{r}", str(case.recipe)))
    assert case.listing() == before


def _one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert message in shown.err


def _lose_shard(case: Case) -> str:
    (case.source / "model-00002-of-00002.safetensors").unlink()
    return "missing shard model-00002-of-00002.safetensors"


def _truncate(case: Case) -> str:
    path = case.source / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return "truncated"


def _lead_out(case: Case) -> str:
    path = case.source / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))
    return "../model-00002-of-00002.safetensors"


def _lose_config(case: Case) -> str:
    (case.source / "config.json").unlink()
    return "config.json"


def _no_layers(case: Case) -> str:
    path = case.source / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 6', '"num_hidden_layers": 7'))
    return "no layers found: numbered tensors are model.layers.* (6); depth keys are num_hidden_layers = 7"


def _fill_output(case: Case) -> str:
    case.out.mkdir()
    (case.out / "precious.txt").write_text("mine")
    return "is not empty; choose another folder or pass --overwrite"


def _other_format(case: Case) -> str:
    for path in case.source.glob("model*"):
        path.unlink()
    (case.source / "pytorch_model.bin").write_bytes(b"pickle")
    return "pytorch_model.bin: not a file of torch.save; download it again"


def _unreadable(case: Case) -> str:
    path = case.source / "model-00001-of-00002.safetensors"
    path.unlink()
    path.mkdir()  # root may read any file, but nobody can read a folder
    return "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("damage", [_lose_shard, _truncate, _lead_out, _lose_config, _no_layers, _fill_output, _other_format, _unreadable])
def test_checkpoints_and_outputs(damage: Callable[[Case], str], case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    message = damage(case)
    before = case.listing()
    assert case.run(STATIC) == 1
    _one_line(capsys, message)
    assert case.listing() == before


def test_no_space(case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = case.listing()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    assert case.run(STATIC) == 1
    _one_line(capsys, "100 bytes free")
    assert case.listing() == before


def test_disk_full_while_writing(case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **more: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = case.listing()
    for name in ("copy_file_range", "sendfile", "pwrite", "write"):
        monkeypatch.setattr(os, name, full)
    status = case.run(STATIC)
    monkeypatch.undo()
    assert status == 1
    _one_line(capsys, "No space left on device")
    assert case.listing() == before


def test_empty_calibration(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, tiny("llama"))
    case.text.write_text("  \n\n")
    assert case.run(AUTO) == 1
    _one_line(capsys, "text.txt")
    assert case.listing() == ["text.txt"]


def test_text_shorter_than_the_token_index(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, tiny("llama"))
    case.text.write_text("short")
    assert case.run(AUTO.replace("samples: 2", "samples: 2, bos: false") + "metric: {{name: angular, token: 9}}\n") == 1
    _one_line(capsys, "metric angular[9] needs 10 tokens, but sample 0 has 5")
    assert case.listing() == ["text.txt"]


def test_auto_without_a_tokenizer(tiny: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path, tiny("llama", tokenizer=False))
    case.text.write_text("some text to measure on, long enough for a window")
    assert case.run(AUTO) == 1
    _one_line(capsys, "tokenizer")
    assert case.listing() == ["text.txt"]


def test_usage_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 2
    assert "Missing argument" in capsys.readouterr().err
    assert main(["cut"]) == 2
    assert main(["run", "--help"]) == 0
    assert "--overwrite" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_a_bug_is_reported_as_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("layercut.api.load", broken)
    assert main(["run", "r.yaml"]) == 3
    shown = capsys.readouterr().err
    assert "This is a bug in layercut" in shown and "ZeroDivisionError: oops" in shown

    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layercut.api.load", interrupted)
    assert main(["run", "r.yaml"]) == 130


def test_one_json_document(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert case.run(STATIC, "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]
    assert main(["inspect", str(case.source), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 6
    assert main(["plan", str(case.recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "layercut-plan/1"
    assert main(["verify", str(case.out), "--no-load", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"]
    assert main(["schema"]) == 0
    assert "properties" in json.loads(capsys.readouterr().out)
