"""Calibration settings: every source, defaults, and messages."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from layercut.calibration import (
    Auto,
    BuiltinCalibration,
    BuiltinPart,
    Calibration,
    CalibrationBase,
    HubCalibration,
    HubPart,
    MixCalibration,
    TextCalibration,
    TextPart,
    described,
    sources,
)


class Recipe(BaseModel):
    calibration: Calibration = BuiltinCalibration()


# Settings


def test_defaults() -> None:
    assert Recipe().calibration.model_dump() == {
        "source": "builtin", "samples": 128, "max_length": 512, "min_length": 1, "packed": False, "seed": None, "batch_size": 8,
        "bos": "auto",
    }  # fmt: skip
    hub = Recipe.model_validate({"calibration": {"source": "hub", "dataset": "allenai/c4"}}).calibration
    assert isinstance(hub, HubCalibration)
    assert (hub.name, hub.split, hub.column, hub.revision, hub.streaming) == (None, "train", None, None, True)


def test_the_example_of_the_manual() -> None:
    found = Recipe.model_validate({"calibration": {"source": "builtin", "samples": 32, "max_length": 512}}).calibration
    assert found == BuiltinCalibration(samples=32, max_length=512)


@pytest.mark.parametrize(
    ("mapping", "place", "text"),
    [
        ({"source": "builtin", "samples": 0}, "samples", "Input should be greater than or equal to 1"),
        ({"source": "builtin", "max_length": 1}, "max_length", "Input should be greater than or equal to 2"),
        ({"source": "builtin", "bos": "yes"}, "bos", "bos must be auto, true or false"),
        ({"source": "builtin", "bos": 1}, "bos", "bos must be auto, true or false"),
        ({"source": "builtin", "path": "x"}, "path", "Extra inputs are not permitted"),
        ({"source": "text"}, "path", "Field required"),
        ({"source": "text", "path": ""}, "path", "String should have at least 1 character"),
        ({"source": "text", "path": "x", "prompt": "q"}, "text", "'prompt' goes with 'completion'"),
        ({"source": "text", "path": "x", "completion": "a"}, "text", "'completion' goes with 'prompt'"),
        (
            {"source": "hub", "dataset": "x", "prompt": "q", "completion": "a", "column": "c"},
            "hub",
            "takes 'column', or 'prompt' and 'completion', not both",
        ),
        ({"source": "mix"}, "of", "Field required"),
        ({"source": "mix", "of": []}, "of", "Tuple should have at least 1 item after validation, not 0"),
        ({"source": "mix", "of": [{"source": "builtin", "weight": 0}]}, "weight", "Input should be greater than 0"),
        ({"source": "mix", "of": [{"source": "builtin", "weight": float("inf")}]}, "weight", "Input should be a finite number"),
        ({"source": "mix", "of": [{"source": "builtin", "samples": 3}]}, "samples", "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_do(mapping: dict[str, Any], place: str, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"calibration": mapping})
    first, *rest = [(error["loc"][-1], error["msg"]) for error in caught.value.errors()]
    assert first == (place, text)
    assert rest in ([], [("of", "Tuple should have at least 1 item after validation, not 0")])  # a list that lost its faulty entry


def test_a_mix_has_parts_with_weights() -> None:
    parts = [{"source": "text", "path": "a.txt", "weight": 2}, {"source": "hub", "dataset": "d"}, {"source": "builtin", "weight": 0.5}]
    found = Recipe.model_validate({"calibration": {"source": "mix", "of": parts, "samples": 64}}).calibration
    assert isinstance(found, MixCalibration)
    assert found.of == (TextPart(path="a.txt", weight=2), HubPart(dataset="d", weight=1), BuiltinPart(weight=0.5))
    assert [part.title for part in sources(found)] == ["a.txt", "d", "builtin"]
    assert found.samples == 64


def test_one_source_is_its_own_only_part() -> None:
    single = TextCalibration(path="a.txt", column="body", samples=3)
    assert list(sources(single)) == [single]
    assert described(single) == {"source": "text", "path": "a.txt", "column": "body", "prompt": None, "completion": None}
    assert described(BuiltinPart(weight=2)) == {"source": "builtin", "weight": 2.0}
    assert {"samples", "max_length", "packed", "bos"} <= set(CalibrationBase.model_fields)


def test_columns() -> None:
    assert TextPart(path="x").columns == ()
    assert TextPart(path="x", column="body").columns == ("body",)
    assert HubPart(dataset="x", prompt="question", completion="answer").columns == ("question", "answer")


def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="'builtin', 'text', 'hub', 'mix'"):
        Recipe.model_validate({"calibration": {"source": "file"}})


def test_every_setting_says_what_it_is() -> None:
    schema = Recipe.model_json_schema()["$defs"]
    for name in ("BuiltinCalibration", "TextCalibration", "HubCalibration", "MixCalibration", "BuiltinPart", "TextPart", "HubPart"):
        for key, value in schema[name]["properties"].items():
            assert value.get("description", "").endswith("."), (name, key)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("auto", Auto()), ({"least": 16}, Auto(least=16)), ({"least": 2, "most": 512}, Auto(least=2, most=512)), (5, 5)],
)
def test_samples_may_be_auto(value: Any, expected: Any) -> None:
    found = Recipe.model_validate({"calibration": {"source": "builtin", "samples": value}}).calibration
    assert found.samples == expected
    assert found.most == (expected if isinstance(expected, int) else expected.most)


@pytest.mark.parametrize(
    ("value", "place", "text"),
    [
        ("many", "samples", "samples must be a number, auto, or a mapping of least and most"),
        (True, "samples", "samples must be a number, auto, or a mapping of least and most"),
        ({"least": 1}, "least", "Input should be greater than or equal to 2"),
        ({"up_to": 9}, "up_to", "Extra inputs are not permitted"),
    ],
)
def test_samples_that_do_not_do(value: Any, place: str, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"calibration": {"source": "builtin", "samples": value}})
    assert [(error["loc"][-1], error["msg"]) for error in caught.value.errors()] == [(place, text)]
