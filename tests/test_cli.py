from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from layercut.cli import main
from layercut.version import __version__

ROOT = Path(__file__).parent.parent


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def recipe(byte_checkpoint: Callable[..., Path], tmp_path: Path) -> str:
    return write(tmp_path / "r.yaml", f"model: {byte_checkpoint()}\nsteps: [{{prune: {{at: 2}}}}]\noutput: {tmp_path / 'out'}\n")


def test_results_go_to_stdout_and_notes_to_stderr(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "-o", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr()
    assert "6 -> 5 layers" in shown.out
    assert shown.err == f"to do this: layercut run {tmp_path / 'plan.json'}\n"


def test_what_a_file_is_read_without_is_said_when_it_runs(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "slices: [{sources: [{model: SOURCE, layer_range: [0, 4]}]}]\nmerge_method: passthrough\ndtypee: x\n"
    path = write(tmp_path / "m.yaml", text.replace("SOURCE", str(tmp_path / "source")))
    assert main(["run", path, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"note: {path}:3:1: unknown key 'dtypee' is ignored; did you mean 'dtype'?\n"


def test_a_disk_that_is_full_is_no_bug(recipe: str, tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ran = subprocess.run([sys.executable, "-m", "layercut", "plan", recipe], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (1, "error: stdout: cannot be written: No space left on device\n")


def test_overrides_change_the_recipe_and_not_a_plan(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--set", "steps.0.prune.at=[0, 1]", "-o", str(tmp_path / "plan.json")]) == 0
    assert "6 -> 4 layers" in capsys.readouterr().out
    assert main(["run", str(tmp_path / "plan.json"), "--set", "depth=3", "-q"]) == 1
    assert capsys.readouterr().err.endswith("--set changes recipes, not plans; plan the recipe again with the override\n")
    assert main(["plan", recipe, "--set", "steps.0.prune.at=9"]) == 1
    assert capsys.readouterr().err == "error: --set steps.0.prune.at: layer 9 does not exist: the stack has layers 0 to 5 here\n"


def test_out_takes_the_place_of_the_recipes_output(recipe: str, tmp_path: Path) -> None:
    assert main(["run", recipe, "-q", "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "layercut.json").is_file() and not (tmp_path / "out").exists()


def test_an_output_is_only_replaced_when_told(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe, "-q"]) == 0
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert main(["run", recipe, "-q"]) == 1
    assert "is not empty; choose another folder or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").exists()
    assert main(["run", recipe, "-q", "--overwrite"]) == 0
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_a_plan_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked.json").write_text("mine")
    (tmp_path / "locked.json").chmod(0o444)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "locked.json")  # root may write everything
    cases = {"missing/plan.json": "there is no such folder", ".": "it is a folder", "locked.json": "no permission"}
    for name, why in cases.items():
        assert main(["plan", str(tmp_path / "none.yaml"), "-o", str(tmp_path / name)]) == 1  # before the recipe is read
        assert capsys.readouterr().err == f"error: {tmp_path / name}: cannot write the plan: {why}\n"
    assert (tmp_path / "locked.json").read_text() == "mine"


def test_inspect_tells_how_an_output_was_made(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "source")]) == 0
    assert "made by" not in capsys.readouterr().out
    assert main(["run", recipe, "-q"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"\nmade by layercut {__version__} from\n{tmp_path / 'source'}\n  layers      6 -> 5\n" in shown
    assert main(["inspect", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["dropped"] == {str(tmp_path / "source"): [2]}


def test_a_failed_check_is_exit_status_1(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", recipe, "-q"]) == 0
    (tmp_path / "out" / "stray.txt").write_text("x")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--no-load"]) == 1
    shown = capsys.readouterr()
    assert "FAILED  no other files" in shown.out
    assert "checks failed: no other files" in shown.err


def test_a_reader_that_goes_away_is_no_error(recipe: str) -> None:
    command = f"{sys.executable} -m layercut schema | head -c 10"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '{\n  "$sche' and done.stderr == ""


def test_python_dash_m(recipe: str) -> None:
    done = subprocess.run([sys.executable, "-m", "layercut", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"layercut, version {__version__}\n"
