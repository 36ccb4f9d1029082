"""Every model type of transformers is cut, and what comes out computes what the source computes without these layers, or is refused.

By default the types that people use most and a tenth of the others are run; LAYERCUT_ARCHITECTURES=all runs all of them, and another
number from 1 to 9 another tenth.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import sweep
import transformers
import zoo

from layercut.api import run_recipe
from layercut.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"
LEAST = 0.94
"""Share of the causal types that is exact at every place; the others are refused at some."""
pytestmark = pytest.mark.usefixtures("quietly")


def page() -> Any:
    """docs/architectures.py, which writes the page and reads it."""
    spec = importlib.util.spec_from_file_location("architectures_page", ROOT / "docs" / "architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def listed() -> dict[str, str]:
    """The outcome of every `task:type`, as the page says it."""
    rows: dict[str, str] = page().listed()
    return rows


def of_this_version() -> bool:
    return f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sweep.chosen())
@pytest.mark.filterwarnings("ignore")
def test_cuts_are_exact_or_refused(name: str, tmp_path: Path) -> None:
    task, _, kind = name.partition(":")
    examined = sweep.examine(kind, task, tmp_path)
    wrong = [outcome for outcome in examined.outcomes if outcome.verdict == sweep.WRONG]
    assert not wrong
    assert all(outcome.why for outcome in examined.outcomes if outcome.verdict == sweep.REFUSED)
    assert bool(examined.outcomes) != bool(examined.reason)
    if of_this_version() and zoo.lacking(kind) is None:  # the page is made with all packages that towers need
        assert sweep.row(examined) == listed()[name], f"make the page again: {sys.executable} docs/architectures.py {name}"


@pytest.mark.parametrize("name", [name for name in sweep.chosen() if name in sweep.USED])
@pytest.mark.filterwarnings("ignore")
def test_repeats_and_stacks_of_two_are_exact_or_refused(name: str, tmp_path: Path) -> None:
    task, _, kind = name.partition(":")
    try:
        source, other = (sweep.saved(kind, task, tmp_path / str(seed), seed) for seed in (0, 1))
    except sweep.Unrunnable as reason:
        pytest.skip(str(reason))
    outcomes = [*sweep.repeat(source, tmp_path), *sweep.stack_two(source, other, tmp_path)]
    assert {outcome.change for outcome in outcomes} == {"repeat", "stack"}
    assert not [outcome for outcome in outcomes if outcome.verdict == sweep.WRONG]
    if listed().get(name) == sweep.EXACT and name not in KINDS_IN_ORDER:
        refused = [outcome for outcome in outcomes if outcome.verdict != sweep.EXACT]
        assert not [outcome for outcome in refused if name not in SHARED or outcome.change == "repeat"]


# Types whose kinds of layers no value of their config can say once this block stands twice: a period, and a number of first layers.
KINDS_IN_ORDER = ("causal:jamba", "causal:deepseek_v3")
# Types whose layers share weights: they are repeated, but not mixed with those of other models.
SHARED = ("seq2seq:t5", "masked:albert")


def test_the_page_lists_every_type() -> None:
    if not of_this_version():
        pytest.skip("the page is of another version of transformers")
    assert sorted(listed()) == sorted(f"{task}:{kind}" for kind, task in zoo.pairs())


def test_almost_every_causal_type_is_exact_everywhere_and_nothing_is_wrong() -> None:
    rows = listed()
    causal = [told for name, told in rows.items() if name.startswith("causal:") and not told.startswith("not run")]
    assert len(causal) > 180
    assert sum(told == sweep.EXACT for told in causal) / len(causal) >= LEAST
    assert not [name for name, told in rows.items() if "wrong" in told]


def test_the_page_counts_what_it_lists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    version = re.search(r"type of transformers (\S+?),", text)
    assert version is not None
    assert page().document(listed(), version[1]) == text


@pytest.mark.parametrize("kind", ["llama", "dory", "zaya", "blt", "hy_v4", "diffllama"])
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_cut_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is no rubber stamp: when another layer goes than the one that was asked for, that is seen."""

    def other(recipe: Recipe, **more: Any) -> Any:
        asked = recipe.model_dump(mode="json", exclude_none=True)["steps"][0]["prune"]["at"]
        steps = [{"prune": {"at": [2 if asked == [1] else 1]}}]
        assert recipe.output is not None
        return run_recipe(Recipe.model_validate({"model": recipe.model, "steps": steps, "output": recipe.output.path}), **more)

    monkeypatch.setattr(sweep, "run_recipe", other)
    examined = sweep.examine(kind, "causal", tmp_path)
    assert {outcome.verdict for outcome in examined.outcomes} == {sweep.WRONG}


def test_a_type_whose_tower_needs_a_package_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "PACKAGES", {"llama": ("json", "no_such_package")})
    assert zoo.lacking("llama") == "no_such_package" and zoo.lacking("qwen3") is None
    examined = sweep.examine("llama", "causal", tmp_path)
    assert sweep.row(examined) == "not run: a tower of it needs the package no_such_package"
