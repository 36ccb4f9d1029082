"""Looks and the cache, through the engine and the planner: text until a choice is settled, and no forward for what was measured before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model

from layercut import api
from layercut.cli import main
from layercut.errors import CalibrationError
from layercut.plan import Plan
from layercut.recipe import Recipe
from layercut.resident import Resident

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), layers=6)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Numbers of the samples that ran, in order; with a cache of its own."""
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))
    found: list[int] = []
    run: Callable[..., None] = Resident._run

    def counted(self: Resident, batch: Any, accumulators: Any) -> None:
        found.extend(sample.number for sample in batch)
        run(self, batch, accumulators)

    monkeypatch.setattr(Resident, "_run", counted)
    return found


def recipe(model: Path, **changes: Any) -> Recipe:
    base = {
        "model": str(model),
        "steps": [{"prune": {"layers": 2}}],
        "calibration": {"source": "builtin", "samples": 6, "max_length": 16},
        "metric": {"name": "angular", "token": "all"},
    }
    return Recipe.model_validate(base | changes)


def planned(model: Path, **changes: Any) -> Plan:
    return api.plan_recipe(recipe(model, **changes), progress=False)


def test_the_same_plan_with_and_without_the_cache(model: Path, forwards: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = planned(model).to_json()
    assert sorted(forwards) == [0, 1, 2, 3, 4, 5]
    forwards.clear()
    assert planned(model).to_json() == first
    assert forwards == []
    monkeypatch.setenv("LAYERCUT_NO_CACHE", "1")
    assert planned(model).to_json() == first
    assert sorted(forwards) == [0, 1, 2, 3, 4, 5]


def test_documents_are_counted_anew_when_the_numbers_are_not(model: Path, forwards: list[int], tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    counts = []
    for blank in (0, 2):
        path.write_text(blank * '{"text": ""}\n' + '{"text": "one text"}\n{"text": "another"}\n')
        made = planned(model, calibration={"source": "text", "path": str(path)}).measurement
        assert made is not None
        counts.append((made.details["documents_read"], made.details["documents_skipped"]))
    assert counts == [(2, {}), (4, {"empty": 2})]
    assert len(forwards) == 2


def test_another_budget_or_metric_costs_no_forward(model: Path, forwards: list[int]) -> None:
    planned(model)
    forwards.clear()
    plan = planned(model, steps=[{"prune": {"layers": 3, "strategy": "block"}}], metric={"name": "cosine", "token": "all"})
    assert forwards == []
    assert plan.choices[0].metric == "cosine[all]"
    assert plan.measurement is not None
    assert [table.metric for table in plan.measurement.tables] == ["cosine[all]"]


def test_what_is_missing_is_measured_once(model: Path, forwards: list[int]) -> None:
    planned(model)
    forwards.clear()
    both = [{"name": "angular", "token": "last"}, {"name": "angular", "token": "all"}]
    first = planned(model, metric=None, metrics=both)
    assert len(forwards) == 6
    assert planned(model, metric=None, metrics=both).to_json() == first.to_json()
    assert len(forwards) == 6


@pytest.mark.parametrize("change", [{"samples": 5}, {"max_length": 12}, {"bos": False}, {"batch_size": 2}])
def test_other_settings_are_measured_anew(model: Path, forwards: list[int], change: dict[str, Any]) -> None:
    planned(model)
    forwards.clear()
    planned(model, calibration={"source": "builtin", "samples": 6, "max_length": 16} | change)
    assert forwards != []


def test_progress_says_that_it_was_measured_before(model: Path, forwards: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        api.plan_recipe(recipe(model), progress=True)
    assert "measured before: 4 tables come from " in capfd.readouterr().err


def test_auto_stops_when_the_choice_is_settled(tmp_path: Path, forwards: list[int]) -> None:
    """Layers 2 and 3 do next to nothing."""
    folder = tiny_model(tmp_path / "planted", layers=6)
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if any(f"layers.{layer}." in name for layer in (2, 3)) and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = tensors[name] * 1e-3
    save_file(tensors, path, {"format": "pt"})
    plan = planned(folder, calibration={"source": "builtin", "samples": "auto", "max_length": 16})
    assert plan.choices[0].chosen == "remove layers [2, 4)"
    assert sorted(forwards) == list(range(8))
    assert plan.measurement is not None
    assert plan.measurement.samples == 8
    assert plan.measurement.details["settled"] is True
    (note,) = [note for note in plan.notes if "settled" in note]
    assert note.startswith("steps.0.prune: settled, remove layers [2, 4) against remove layers [")


def test_auto_ends_at_its_most_and_says_so(model: Path, forwards: list[int]) -> None:
    plan = planned(model, calibration={"source": "builtin", "samples": {"least": 2, "most": 5}, "max_length": 4})
    assert sorted(forwards) == list(range(5))  # looks at 2, 4 and 5, and no sample runs twice
    assert plan.measurement is not None
    assert plan.measurement.samples == 5
    assert plan.measurement.details["settled"] is False
    assert any("not settled" in note and "more text may lead to" in note for note in plan.notes)


AUTO = {"source": "builtin", "samples": {"least": 2, "most": 5}, "max_length": 4}


def test_what_was_settled_is_found_again(model: Path, forwards: list[int]) -> None:
    first = planned(model, calibration=AUTO)
    assert sorted(forwards) == list(range(5))
    assert planned(model, calibration=AUTO, output="elsewhere", evaluate={"generate": "hello"}).measurement == first.measurement
    assert planned(model, calibration=AUTO).to_json() == first.to_json()
    assert len(forwards) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [{"prune": {"layers": 3}}]},
        {"metric": {"name": "cosine", "token": "all"}},
        {"calibration": {"source": "builtin", "samples": {"least": 2, "most": 4}, "max_length": 4}},
    ],
)
def test_another_question_is_settled_anew(model: Path, forwards: list[int], change: dict[str, Any]) -> None:
    planned(model, calibration=AUTO)
    forwards.clear()
    planned(model, **{"calibration": AUTO, **change})
    assert forwards != []


def test_an_analysis_finds_its_own_again(model: Path, forwards: list[int]) -> None:
    text = {"samples": {"least": 2, "most": 4}, "max_length": 4}
    first = api.analyze(model, text=text, progress=False)
    forwards.clear()
    assert api.analyze(model, text=text, progress=False) == first
    assert forwards == []
    assert main(["analyze", str(model), "--samples", "auto", "--max-length", "4", "--quiet"]) == 0
    assert len(forwards) >= 8


def test_looks_give_the_numbers_of_one_pass(model: Path, forwards: list[int]) -> None:
    looks = planned(model, calibration={"source": "builtin", "samples": {"least": 2, "most": 5}, "max_length": 4}).measurement
    once = planned(model, calibration={"source": "builtin", "samples": 5, "max_length": 4}).measurement
    assert looks is not None
    assert once is not None
    for found, wanted in ((looks.tables[0].mean, once.tables[0].mean), (looks.tables[0].stderr, once.tables[0].stderr)):
        for a, b in zip(found, wanted, strict=True):
            assert a == pytest.approx(b, abs=1e-6)


def test_several_steps_must_all_be_settled(model: Path, forwards: list[int]) -> None:
    steps = [{"prune": {"layers": 1}}, {"prune": {"layers": 2, "strategy": "blocks"}}]
    plan = planned(model, steps=steps, calibration={"source": "builtin", "samples": {"least": 2, "most": 4}, "max_length": 4})
    told = [note.split(":")[0] for note in plan.notes if "settled" in note]
    assert told == ["steps.0.prune", "steps.1.prune"]


def test_less_text_than_auto_may_take(model: Path, forwards: list[int], tmp_path: Path) -> None:
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one text", "another", "x")))
    plan = planned(model, calibration={"source": "text", "path": str(path), "samples": "auto"})
    assert plan.measurement is not None
    assert plan.measurement.samples == 3


def test_auto_with_a_metric_that_keeps_no_samples(model: Path, forwards: list[int]) -> None:
    with pytest.raises(CalibrationError, match=r"samples: auto cannot tell whether linear\[skip-first-1\] is settled"):
        planned(model, metric="linear", calibration={"source": "builtin", "samples": "auto", "max_length": 16})


def test_auto_of_the_command_says_how_sure_it_is(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one text", "another", "x")))
    arguments = ["analyze", str(model), "--text", str(path), "--max-length", "8", "-q"]
    assert main([*arguments, "--samples", "auto"]) == 0
    shown = capsys.readouterr().out
    told = shown.partition("how sure that is\n")[2].splitlines()
    assert [line.split(":")[0] for line in told] == [f"  blocks of {size}" for size in range(1, 6)]
    assert main([*arguments, "--samples", "2"]) == 0
    assert "how sure" not in capsys.readouterr().out
    assert main([*arguments, "--samples", "some"]) == 2
    assert "Invalid value for '--samples': 'some' is not a valid integer range." in capsys.readouterr().err


def test_auto_of_an_analysis_settles_all_block_sizes(model: Path, forwards: list[int]) -> None:
    found = api.analyze(model, text={"samples": {"least": 2, "most": 4}, "max_length": 4}, progress=False)
    told = found.measurement.details["settling"]
    assert [text.split(":")[0] for text in told] == [f"blocks of {size}" for size in range(1, 6)]
