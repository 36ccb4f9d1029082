"""api.py: what a file holds, where an output goes, what is measured of what, and which rank does which part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import failure
from test_analysis import measured, table

from layercut import api
from layercut.api import SURVEY, analyze, load, output_of, outstanding, plan_recipe, run_recipe
from layercut.calibration import BuiltinCalibration, HubCalibration, TextCalibration
from layercut.errors import CalibrationError, LayercutError, OutputError, RecipeError
from layercut.metrics import Angular, Cosine
from layercut.plan import Plan
from layercut.ranks import Ranks, Seat
from layercut.recipe import Recipe
from layercut.report import Published, read_report, write_report

CUT = [{"prune": {"at": 2}}]


@pytest.fixture
def model(byte_checkpoint: Callable[..., Path]) -> Path:
    return byte_checkpoint("source", layers=6)


def recipe(model: Path, **more: Any) -> Recipe:
    return Recipe.model_validate({"model": str(model), "steps": CUT, **more})


# What a file holds


def test_a_plan_is_told_from_a_recipe_by_what_stands_in_it(model: Path, tmp_path: Path) -> None:
    """Whatever the file is called, and in whatever order its keys stand."""
    plan = plan_recipe(recipe(model), out=tmp_path / "out", progress=False)
    data = json.loads(plan.to_json())
    for text in (plan.to_json(), "\n \t" + plan.to_json(), json.dumps(dict(sorted(data.items(), reverse=True)))):
        (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
        assert load(tmp_path / "x.yaml") == plan
    quoted = {"model": 'not "format": "layercut-plan/1" at all', "steps": CUT}
    (tmp_path / "r.json").write_text(json.dumps(quoted), encoding="utf-8")
    found = load(tmp_path / "r.json")
    assert isinstance(found, Recipe) and found.model == quoted["model"]
    named = {"models": {'my"format': "layercut-plan/1"}, "slices": [{"model": 'my"format', "layer_range": [0, 2]}]}
    (tmp_path / "r.json").write_text(json.dumps(named), encoding="utf-8")
    assert isinstance(load(tmp_path / "r.json"), Recipe), "a model of that name"
    (tmp_path / "r.yaml").write_text('model: m  # "format": "layercut-plan/1"\n', encoding="utf-8")
    assert isinstance(load(tmp_path / "r.yaml", ["depth=3"]), Recipe)
    (tmp_path / "x.yaml").write_text(plan.to_json(), encoding="utf-8")
    said = f"{tmp_path}/x.yaml: --set changes recipes, not plans; plan the recipe again with the override"
    assert failure(LayercutError, lambda: load(tmp_path / "x.yaml", ["depth=3"])) == said
    assert failure(RecipeError, lambda: load(tmp_path / "gone.yaml")).startswith(f"{tmp_path}/gone.yaml: ")


def test_a_plan_with_a_recipe_that_is_none(model: Path, tmp_path: Path) -> None:
    plan = plan_recipe(recipe(model), out=tmp_path / "out", progress=False)
    odd = plan.model_copy(update={"recipe": {**plan.recipe, "steps": [{"prune": {"at": []}}]}})
    text = failure(LayercutError, lambda: outstanding(odd))
    assert text.startswith("plan holds a recipe that this version cannot read: recipe.steps.0.")
    assert text.endswith("; make the plan again with: layercut plan RECIPE -o FILE")
    assert failure(LayercutError, lambda: run_recipe(odd, out=tmp_path / "out", progress=False)) == text
    assert not (tmp_path / "out").exists()
    assert outstanding(plan) == []


# Where an output goes


def test_the_output_is_the_one_that_is_given_or_that_of_the_recipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    named = recipe(model, output="~/here")
    assert output_of(named, None) == tmp_path / "here"
    assert output_of(named, "there") == Path("there") and output_of(named, tmp_path / "x") == tmp_path / "x"
    assert output_of(named, "~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    plan = plan_recipe(named, progress=False)
    assert output_of(plan, None) == tmp_path / "here" and output_of(plan, "there") == Path("there")
    nowhere = "no output folder; set 'output' in the recipe or give --out DIR"
    for asked, out in ((recipe(model), None), (named, ""), (plan_recipe(recipe(model), progress=False), None)):
        assert failure(OutputError, lambda asked=asked, out=out: output_of(asked, out)) == nowhere  # type: ignore[misc]
    assert failure(OutputError, lambda: output_of(named, "a\0b")) == r"'a\x00b': a name with a NUL is no folder"


def test_a_run_does_what_its_plan_says(model: Path, tmp_path: Path) -> None:
    wanted = recipe(model, output=str(tmp_path / "out"))
    plan = plan_recipe(wanted, progress=False)
    first = run_recipe(wanted, progress=False)
    again = run_recipe(plan, out=tmp_path / "again", progress=False)
    assert first.plan == again.plan == plan.digest
    assert [layer.index for layer in first.layers] == [0, 1, 3, 4, 5]
    assert first == read_report(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_what_is_in_the_way_is_said_before_the_long_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    monkeypatch.setattr(api, "plan_recipe", None)
    said = f"{tmp_path}/out/ is not empty; choose another folder or pass --overwrite"
    assert failure(OutputError, lambda: run_recipe(recipe(model), out=tmp_path / "out", progress=False)) == said


def test_of_a_finished_output_only_the_upload_is_left(model: Path, tmp_path: Path) -> None:
    """When it is what the recipe or plan would write, whatever place it is asked for at."""
    out = tmp_path / "out"
    wanted = recipe(model, output=str(out))
    assert api._unpublished(wanted, out, False) is None
    report = run_recipe(wanted, progress=False)
    judged = {"perplexity": {"source": "builtin", "samples": 2}}
    for asked in (wanted, plan_recipe(wanted, progress=False), recipe(model, output="elsewhere", upload="me/cut"), recipe(model)):
        assert api._unpublished(asked, out, True) == report
    sized = {"path": "elsewhere", "max_shard_size": "1GB"}
    for more in ({"evaluate": judged}, {"steps": [{"prune": {"at": 3}}]}, {"output": sized}):
        other = recipe(model, **more)
        assert api._unpublished(other, out, False) is None
        assert more != {"evaluate": judged} or api._unpublished(plan_recipe(other, progress=False), out, False) is None
    published = Published(repo="me/cut", revision="main", commit="0" * 40, url="https://huggingface.co/me/cut")
    write_report(out, report.with_published(published))
    assert api._unpublished(wanted, out, False) == report.with_published(published)
    assert api._unpublished(wanted, out, True) is None, "its sources may be others by now"
    (out / "layercut.json").write_text("{", encoding="utf-8")
    assert api._unpublished(wanted, out, False) is None


# What is measured


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would be measured, in the place of an engine: aliases, metrics, calibration."""
    seen: list[tuple[Any, ...]] = []

    def measure(members: Any, metrics: Any, calibration: Any, **how: Any) -> Any:
        seen.append((list(members), tuple(metrics), calibration))
        return measured(table(*2 * list(members), rows=7, columns=7))

    monkeypatch.setattr(api, "_measured", measure)
    return seen


def test_of_a_model_all_that_needs_no_fit_is_measured(model: Path, asked: list[tuple[Any, ...]]) -> None:
    analyze(model, progress=False)
    assert asked == [([str(model)], SURVEY, BuiltinCalibration())]


def test_of_a_recipe_what_it_asks_for(model: Path, tmp_path: Path, asked: list[tuple[Any, ...]]) -> None:
    text = TextCalibration(path="t.txt", samples=3)
    wanted = recipe(model, metrics=["cosine"], calibration=text.model_dump())
    (tmp_path / "R.YAML").write_text(f"model: {model}\nmetrics: [cosine]\n", encoding="utf-8")
    analyze(wanted, progress=False)
    analyze(tmp_path / "R.YAML", progress=False, overrides=["calibration={source: builtin, samples: 5}"])
    assert [(metrics, calibration) for _, metrics, calibration in asked] == [
        ((Cosine(),), text),
        ((Cosine(),), BuiltinCalibration(samples=5)),
    ]


def test_other_metrics_are_measured_once_each(model: Path, asked: list[tuple[Any, ...]]) -> None:
    analyze(model, metrics=[Angular(), Cosine(), Angular(token="last")], progress=False)
    assert asked[0][1] == (Angular(), Cosine())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, HubCalibration(dataset="d", samples=7, max_length=99)),
        ({"samples": 3}, HubCalibration(dataset="d", samples=3, max_length=99)),
        ({"path": "t.jsonl", "column": "body"}, TextCalibration(path="t.jsonl", column="body", samples=7, max_length=99)),
        ({"path": "t.txt", "samples": 2, "max_length": 12}, TextCalibration(path="t.txt", samples=2, max_length=12)),
    ],
)
def test_other_text_keeps_what_is_not_named(model: Path, asked: list[tuple[Any, ...]], text: dict[str, Any], expected: object) -> None:
    """A path makes it one of local files, with the sizes that were asked for before."""
    of_hub = HubCalibration(dataset="d", samples=7, max_length=99)
    analyze(recipe(model, calibration=of_hub.model_dump()), text=text, progress=False)
    assert asked[0][2] == expected


def test_text_that_cannot_be(model: Path, asked: list[tuple[Any, ...]]) -> None:
    assert failure(CalibrationError, lambda: analyze(model, text={"samples": -1}, progress=False)).startswith("builtin text: samples: ")
    assert failure(CalibrationError, lambda: analyze(model, text={"path": ""}, progress=False)).startswith("text text: path: ")
    assert asked == []


def test_what_cannot_be_analysed(model: Path, tmp_path: Path, asked: list[tuple[Any, ...]]) -> None:
    plan = plan_recipe(recipe(model), out=tmp_path / "out", progress=False)
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    said = f"{tmp_path}/plan.json: a plan, not a recipe or a model; name the recipe that it was made from"
    assert failure(LayercutError, lambda: analyze(tmp_path / "plan.json", progress=False)) == said
    said = f"{model}: --set changes recipes, and this is a model"
    assert failure(LayercutError, lambda: analyze(model, overrides=["depth=3"], progress=False)) == said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "is not empty" in failure(OutputError, lambda: analyze(model, out=tmp_path / "full", progress=False))
    assert asked == [], "before anything is measured"


# Ranks


class Told:
    """A store of one process, for a rank that waits for no other."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def set(self, key: str, data: str | bytes) -> None:
        self.kept[key] = data if isinstance(data, bytes) else data.encode()

    def get(self, key: str) -> bytes:
        return self.kept[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)


def test_the_main_rank_writes_and_the_others_are_given_the_report(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Told()
    main, other = (Ranks(Seat(rank, 2), store) for rank in range(2))
    wanted = recipe(model, output=str(tmp_path / "out"))
    report = run_recipe(wanted, ranks=main, progress=False)
    monkeypatch.setattr(api, "execute", None)
    assert run_recipe(wanted, ranks=other, progress=False) == report


def test_the_main_rank_alone_writes_an_analysis(model: Path, tmp_path: Path, asked: list[tuple[Any, ...]]) -> None:
    for rank in range(2):
        analyze(model, ranks=Ranks(Seat(rank, 2), Told()), out=tmp_path / str(rank), progress=False)
    assert (tmp_path / "0" / "analysis.json").is_file() and not (tmp_path / "1").exists()
    assert len(asked) == 2


def test_the_plan_of_a_file_is_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: {model}\nsteps: [{{prune: {{at: 2}}}}]\n", encoding="utf-8")
    found = plan_recipe(tmp_path / "r.yaml", overrides=["steps.0.prune.at=[0, 5]"], progress=False)
    assert isinstance(found, Plan) and [layer.index for layer in found.actions.layers] == [1, 2, 3, 4]
