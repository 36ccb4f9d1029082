"""Every model type of transformers is cut, and what comes out computes what the source computes without these layers, or is refused.

By default the types that people use most and a tenth of the others are run; LAYERCUT_ARCHITECTURES=all runs all of them, and another
number from 1 to 9 another tenth.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import sweep
import transformers
import zoo
from conftest import script

from layercut.api import run_recipe
from layercut.recipe import Recipe

PAGES = script("outcomes").PAGES
PAGE = PAGES["architectures"]
LEAST = 0.94
"""Share of the causal types that is exact at every place; the others are refused at some."""
pytestmark = pytest.mark.usefixtures("quietly")


@pytest.mark.parametrize("name", sweep.chosen())
@pytest.mark.filterwarnings("ignore")
def test_cuts_are_exact_or_refused(name: str, tmp_path: Path) -> None:
    task, _, kind = name.partition(":")
    examined = sweep.examine(kind, task, tmp_path)
    wrong = [outcome for outcome in examined.outcomes if outcome.verdict == sweep.WRONG]
    assert not wrong
    assert all(outcome.why for outcome in examined.outcomes if outcome.verdict == sweep.REFUSED)
    assert bool(examined.outcomes) != bool(examined.reason)
    if PAGE.version == transformers.__version__ and zoo.lacking(kind) is None:  # it is made with all packages that towers need
        assert sweep.row(examined) == PAGE.listed()[name], f"make the page again: {sys.executable} docs/outcomes.py architectures {name}"


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
    if PAGE.listed().get(name) == sweep.EXACT and name not in KINDS_IN_ORDER:
        refused = [outcome for outcome in outcomes if outcome.verdict != sweep.EXACT]
        assert not [outcome for outcome in refused if name not in SHARED or outcome.change == "repeat"]


# Types whose kinds of layers no value of their config can say once this block stands twice: a period, and a number of first layers.
KINDS_IN_ORDER = ("causal:jamba", "causal:deepseek_v3")
# Types whose layers share weights: they are repeated, but not mixed with those of other models.
SHARED = ("seq2seq:t5", "masked:albert")


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_pages_list_every_type(page: Any) -> None:
    if page.version != transformers.__version__:
        pytest.skip("the page is of another version of transformers")
    assert sorted(page.listed()) == sorted(f"{task}:{kind}" for kind, task in zoo.pairs())


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_pages_count_what_they_list_and_nothing_is_wrong(page: Any) -> None:
    rows = page.listed()
    assert page.document(rows, page.version) == page.path.read_text(encoding="utf-8")
    assert not [name for name, told in rows.items() if "wrong" in told]


def test_almost_every_causal_type_is_exact_everywhere() -> None:
    causal = [told for name, told in PAGE.listed().items() if name.startswith("causal:") and not told.startswith("not run")]
    assert len(causal) > 180
    assert sum(told == sweep.EXACT for told in causal) / len(causal) >= LEAST


@pytest.mark.parametrize(
    ("told", "kind"),
    [("exact", "exact"), ("exact: first; last refused: x", "some"), ("refused: x", "refused"), ("not run: x", "not run")],
)
def test_what_an_outcome_of_a_cut_counts_as(told: str, kind: str) -> None:
    assert PAGE.kind_of(told) == kind


def test_a_page_is_written_of_the_types_that_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One row is made again, and the others stay as they are."""
    module = script("outcomes")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("LAYERCUT_CACHE", "")  # set again by the script
    (tmp_path / "docs").mkdir()
    page, wanted = module.PAGES["architectures"], PAGE.listed()
    page.path.write_text(page.document({**wanted, "causal:llama": "old"}, "1.0"), encoding="utf-8")
    assert page.version == "1.0"
    assert module.main(["architectures", "causal:llama"]) == 0
    assert page.listed() == wanted and page.version == transformers.__version__
    assert capsys.readouterr().err == "causal:llama exact\n"
    monkeypatch.setattr(sweep, "examine", lambda *given: sweep.Examined((sweep.Outcome("", sweep.WRONG, "off", "first"),)))
    assert module.main(["architectures", "causal:llama"]) == 1
    assert page.listed()["causal:llama"] == "wrong: off"
    assert module.main(["nonesuch"]) == 2


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
