from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from layercut.errors import LayercutError
from layercut.plan import (
    Actions,
    Band,
    Candidate,
    Choice,
    Companion,
    Distance,
    Edit,
    Grown,
    LayerRef,
    LeftOut,
    Map,
    Measurement,
    OutputFile,
    Part,
    Plan,
    Seam,
    Source,
    Table,
    TensorCopy,
    TensorMade,
)
from layercut.stack import Fold, Scaling, Share


def tensor(name: str = "model.layers.0.w", begin: int = 100, end: int = 164) -> TensorCopy:
    return TensorCopy(name=name, dtype="F32", shape=(4, 4), model="m", file="model.safetensors", begin=begin, end=end)


def actions(**changes: Any) -> Actions:
    whole: dict[str, Any] = {
        "layers": (LayerRef(model="m", index=0), LayerRef(model="m", index=2)),
        "config": '{"num_hidden_layers": 2}',
        "files": (OutputFile(name="model.safetensors", metadata={"format": "pt"}, tensors=(tensor(), tensor("lm_head.weight", 200, 232))),),
        "index": None,
        "companions": (Companion(name="tokenizer.json", model="m", size=9),),
    }
    return Actions(**{**whole, **changes})


def source(**changes: Any) -> Source:
    whole: dict[str, Any] = {
        "reference": "org/m", "folder": "/models/m", "revision": None, "depth": 3, "parameters": 48, "digest": "d" * 64,
        "files": {"model.safetensors": 264},
    }  # fmt: skip
    return Source(**{**whole, **changes})


TABLE = Table(metric="angular[last]", a="m", b="m", mean=((0.0, 0.125), (0.125, 0.0)), stderr=((0.0, 0.5), (0.5, 0.0)))


def plan(**changes: Any) -> Plan:
    whole: dict[str, Any] = {
        "version": "1", "recipe": {"model": "org/m"}, "output": "out", "sources": {"m": source()}, "donor": "m",
        "seams": (
            Seam(at=1, from_model="m", from_boundary=1, to_model="m", to_boundary=2, distances={"x": Distance(mean=0.1, stderr=0.2)}),
        ),
        "choices": (Choice(where="steps.0.prune", metric="x", chosen="remove layers [1, 2)", cost=0.1,
                           candidates=(Candidate(start=1, stop=2, cost=0.1, stderr=0.2),)),),
        "edits": (Edit(key="num_hidden_layers", before=3, after=2, reason="depth"),),
        "left_out": (LeftOut(model="m", what="layer 1", reason="not in the stack"),),
        "measurement": Measurement(tables=(TABLE,), samples=4, tokens=64, details={"bos": "auto"}),
        "actions": actions(),
    }  # fmt: skip
    return Plan(**{**whole, **changes})


def test_round_trip() -> None:
    text = plan().to_json()
    assert text.endswith("}\n")
    again = Plan.from_json(text)
    assert again == plan()
    assert again.to_json() == text
    assert Plan.from_json(text.encode()).digest == plan().digest


@pytest.mark.parametrize(
    "change",
    [
        {"version": "2"},
        {"recipe": {}},
        {"output": None},
        {"donor": "n"},
        {"seams": ()},
        {"choices": ()},
        {"edits": ()},
        {"left_out": ()},
        {"notes": ("a note",)},
        {"measurement": None},
        {"sources": {"m": source(folder="/elsewhere", reference="other", parameters=1)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_does_not_see_the_evidence(change: dict[str, Any]) -> None:
    assert plan(**change).digest == plan().digest


@pytest.mark.parametrize(
    "change",
    [
        {"sources": {"m": source(digest="e" * 64)}},
        {"sources": {"m": source(), "n": source()}},
        {"actions": actions(layers=(LayerRef(model="m", index=0), LayerRef(model="m", index=1)))},
        {"actions": actions(config='{"num_hidden_layers":2}')},
        {"actions": actions(index="{}")},
        {"actions": actions(companions=())},
        {"actions": actions(files=(OutputFile(name="model.safetensors", metadata={}, tensors=(tensor(),)),))},
        {
            "actions": actions(
                files=(OutputFile(name="model.safetensors", metadata={"format": "pt"}, tensors=(tensor(begin=36, end=100),)),)
            )
        },
    ],
)
def test_the_digest_sees_everything_that_is_written(change: dict[str, Any]) -> None:
    assert plan(**change).digest != plan().digest


def test_the_digest_is_this_one() -> None:
    """Pinned by a second spelling of the definition: a digest that drifts would turn away plans that are fine."""
    parts = [json.loads(actions().model_dump_json()), {"m": "d" * 64}]
    expected = hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert plan().digest == expected
    assert len(expected) == 64


def test_the_digest_does_not_depend_on_the_order_of_sources() -> None:
    one, two = source(), source(digest="e" * 64)
    assert plan(sources={"m": one, "n": two}).digest == plan(sources={"n": two, "m": one}).digest


def test_weight_bytes() -> None:
    assert plan().weight_bytes == 64 + 32


def test_table() -> None:
    measurement = plan().measurement
    assert measurement is not None
    assert measurement.table("angular[last]", "m", "m") is measurement.tables[0]
    with pytest.raises(KeyError, match=r"cosine\[all\] between m and m"):
        measurement.table("cosine[all]", "m", "m")
    with pytest.raises(KeyError):
        measurement.table("angular[last]", "m", "n")


def test_plans_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan().output = "x"  # type: ignore[misc]


HINT = "; make the plan again with: layercut plan RECIPE -o FILE"


def changed(change: Callable[[dict[str, Any]], Any]) -> str:
    data = json.loads(plan().to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.json: plan: Invalid JSON: EOF while parsing a value at line 1 column 0"),
        ("[]", "p.json: plan: Input should be an object"),
        (changed(lambda p: p.update(format="layercut-plan/2")), "p.json: format: Input should be 'layercut-plan/1'"),
        (changed(lambda p: p.pop("actions")), "p.json: actions: Field required"),
        (changed(lambda p: p.update(colour=1)), "p.json: colour: Extra inputs are not permitted"),
        (
            changed(lambda p: p["actions"]["layers"][1].update(index="x")),
            "p.json: actions.layers.1.index: Input should be a valid integer, unable to parse string as an integer",
        ),
    ],
)
def test_a_text_that_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(LayercutError) as caught:
        Plan.from_json(text, Path("p.json"))
    assert str(caught.value) == message + HINT


PART = Part(model="m", file="model.safetensors", begin=100, end=164, dtype="F32", weight=0.5)
MADE = TensorMade(name="model.layers.0.w", dtype="BF16", shape=(4, 4), parts=(PART, PART), factors=(0.5, -2.0), compute="F32")
AVERAGE = LayerRef(
    model="m", index=0, span=2, shares=(Share(model="m", index=0, weight=0.25), Share(model="n", index=1, weight=0.75)),
    scalings=((Scaling(tensors="*.w", by=0.5), Scaling(tensors="*", by=0)),), identity=True,
)  # fmt: skip
FOLD = Fold(sha256="a" * 64, size=4, module="mlp.down_proj", tokens=100, ridge=0.01, explained=0.5)
FOLDED = LayerRef(model="m", index=3, folds=(FOLD,))


def arithmetic(*layers: LayerRef, made: TensorMade = MADE, **more: Any) -> Actions:
    files = (OutputFile(name="model.safetensors", metadata={"format": "pt"}, tensors=(made, tensor("lm_head.weight", 200, 232))),)
    return actions(layers=layers or (AVERAGE, FOLDED), files=files, **more)


def test_round_trip_of_arithmetic() -> None:
    whole = plan(actions=arithmetic(texts={"chat_template.jinja": "{{ a }}\n"}))
    again = Plan.from_json(whole.to_json())
    assert again == whole
    assert again.digest == whole.digest
    assert again.actions.layers == (AVERAGE, FOLDED)
    made, copied = again.actions.files[0].tensors
    assert (made, type(copied)) == (MADE, TensorCopy)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("BF16", (4, 4), 32), ("F32", (), 4), ("F64", (3, 0), 0), ("F8_E4M3", (5,), 5), ("F4", (2, 3), 3)]
)
def test_bytes_that_are_made(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert TensorMade(name="w", dtype=dtype, shape=shape, parts=()).nbytes == nbytes


@pytest.mark.parametrize("amend", [Band(by=0.5, row=4, stop=2), Grown(by=0.5)])
def test_round_trip_of_what_is_amended(amend: Band | Grown) -> None:
    whole = plan(actions=arithmetic(made=MADE.model_copy(update={"amend": amend})))
    again = Plan.from_json(whole.to_json())
    assert again == whole and type(again.actions.files[0].tensors[0].amend) is type(amend)  # type: ignore[union-attr]


def test_weight_bytes_count_what_is_written_and_not_what_is_read() -> None:
    assert plan(actions=arithmetic()).weight_bytes == 32 + 32


@pytest.mark.parametrize(
    "change",
    [
        arithmetic(AVERAGE.model_copy(update={"scalings": ()}), FOLDED),
        arithmetic(AVERAGE.model_copy(update={"shares": AVERAGE.shares[::-1]}), FOLDED),
        arithmetic(AVERAGE.model_copy(update={"identity": False}), FOLDED),
        arithmetic(AVERAGE, FOLDED.model_copy(update={"folds": ()})),
        arithmetic(AVERAGE, FOLDED.model_copy(update={"folds": (FOLD.model_copy(update={"sha256": "b" * 64}),)})),
        arithmetic(made=MADE.model_copy(update={"maps": (Map(sha256="a" * 64, size=4, columns=False),)})),
        arithmetic(made=MADE.model_copy(update={"factors": (-2.0, 0.5)})),
        arithmetic(made=MADE.model_copy(update={"compute": None})),
        arithmetic(made=MADE.model_copy(update={"amend": Band(by=0.5, row=4, stop=2)})),
        arithmetic(made=MADE.model_copy(update={"amend": Grown(by=0.5)})),
        arithmetic(made=MADE.model_copy(update={"dtype": "F16"})),
        arithmetic(made=MADE.model_copy(update={"parts": (PART,)})),
        arithmetic(made=MADE.model_copy(update={"parts": (PART, PART.model_copy(update={"weight": 0.25}))})),
        arithmetic(texts={"chat_template.jinja": "x"}),
    ],
)  # fmt: skip
def test_the_digest_sees_arithmetic(change: Actions) -> None:
    assert plan(actions=change).digest != plan(actions=arithmetic()).digest
