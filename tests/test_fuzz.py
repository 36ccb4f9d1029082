"""Bytes changed at random in one file of a checkpoint, a recipe, a plan, or a report. `make fuzz` goes on for longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import Lab, changed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {"weights": 150, "config": 100, "index": 100, "recipes": 150, "plans": 100, "reports": 80}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("number", range(6), ids=list(EXAMPLES))
def test_changed_bytes(number: int, lab: Lab) -> None:
    path, target = list(lab.targets.items())[number]
    few = settings(
        max_examples=EXAMPLES[target.__name__], deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )
    few(given(changed(lab.seeds[path]))(target))()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_noise(lab: Lab, data: bytes) -> None:
    for target in (lab.weights, lab.recipes, lab.reports):
        target(data)


def test_unchanged_bytes_pass(lab: Lab) -> None:
    """The seeds are good, so that the changes start from something: every command works with them."""
    for path, target in lab.targets.items():
        target(lab.seeds[path])
    for arguments in (
        ["plan", str(lab.recipe)],
        ["verify", str(lab.cut), "--no-load"],
        ["run", str(lab.plan), "--overwrite", "--out", str(lab.out)],
    ):
        assert lab.run(*arguments) == 0


def test_a_bug_is_found(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("layercut.api.plan_recipe", broken)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        lab.recipes(b"model: m")


def test_the_long_run_starts(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    seconds = "60" if os.environ.get("CI") else "1"
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), seconds]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("layercut-fuzz-*")) == []
