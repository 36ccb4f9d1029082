"""Faults in words, on small models of their own; what is said of real recipes stands in test_bad_input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from layercut.errors import RecipeError
from layercut.faults import EXPECTED, fault_lines
from layercut.yamltext import Key, YamlText


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Cat(Strict):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(Strict):
    kind: Literal["dog"] = "dog"
    tricks: tuple[str, ...] = ()


class Inner(Strict):
    count: int = Field(ge=1, le=5, strict=True)
    ratio: float = Field(default=1, gt=0)
    wide: bool = Field(default=False, alias="is_wide", strict=True)
    colour: Literal["red", "green"] = "red"

    @model_validator(mode="after")
    def _check(self) -> Inner:
        if self.count == 4:
            raise ValueError("four is unlucky")
        if self.count == 5:
            raise PydanticCustomError("five", "five does not go with anything", {"at": "count"})
        return self


class Root(Strict):
    name: str = Field(default="x", min_length=1)
    inner: Inner | None = None
    many: Annotated[tuple[Inner, ...], Field(min_length=1)] | None = None
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    table: dict[str, int] = {}


def lines(text: str, origin: Any = tuple) -> list[str]:
    yaml = YamlText(text, "r")
    with pytest.raises(ValidationError) as caught:
        Root.model_validate(yaml.data)
    return fault_lines(caught.value, yaml, Root, origin)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: 5", "r:1:7: name: expected text, found 5"),
        ("name: ''", "r:1:7: name: expected some text, found ''"),
        ("nam: x", "r:1:1: unknown key 'nam'; did you mean 'name'?"),
        ("zzz: x", "r:1:1: unknown key 'zzz'; known keys are inner, many, name, pet, table"),
        ("inner: 5", "r:1:8: inner: expected a mapping, found 5"),
        ("inner: {}", "r:1:8: 'count' is missing"),
        ("inner: {count: 0}", "r:1:16: inner.count: expected at least 1, found 0"),
        ("inner: {count: 6}", "r:1:16: inner.count: expected at most 5, found 6"),
        ("inner: {count: 1.5}", "r:1:16: inner.count: expected a whole number, found 1.5"),
        ("inner: {count: 4}", "r:1:8: four is unlucky"),
        ("inner: {count: 5}", "r:1:9: five does not go with anything"),
        ("inner: {count: 1, ratio: 0}", "r:1:26: inner.ratio: expected more than 0, found 0"),
        ("inner: {count: 1, ratio: far}", "r:1:26: inner.ratio: expected a number, found 'far'"),
        ("inner: {count: 1, is_wide: 3}", "r:1:28: inner.is_wide: expected true or false, found 3"),
        ("inner: {count: 1, wide: true}", "r:1:19: unknown key 'wide'; did you mean 'is_wide'?"),
        ("inner: {count: 1, colour: blue}", "r:1:27: inner.colour: expected 'red' or 'green', found 'blue'"),
        ("inner: {count: 1, colour: rde}", "r:1:27: inner.colour: expected 'red' or 'green', found 'rde'; did you mean 'red'?"),
        ("many: 5", "r:1:7: many: expected a list, found 5"),
        ("many: []", "r:1:7: many: expected at least one entry, found []"),
        ("many: [{count: 1}, {count: x}]", "r:1:28: many.1.count: expected a whole number, found 'x'"),
        ("many: [{count: 1, cunt: 2}]", "r:1:19: unknown key 'cunt'; did you mean 'count'?"),
        ("pet: {kind: cow}", "r:1:13: unknown kind 'cow'; known are cat, dog"),
        ("pet: {kind: cta}", "r:1:13: unknown kind 'cta'; did you mean 'cat'?"),
        ("pet: {}", "r:1:6: 'kind' is missing; known are cat, dog"),
        ("pet: {kind: dog, lives: 3}", "r:1:18: unknown key 'lives'; known keys are kind, tricks"),
        ("pet: {kind: cat, lives: x}", "r:1:25: pet.lives: expected a whole number, found 'x'"),
        ("table: {a: 1, b: x}", "r:1:18: table.b: expected a whole number, found 'x'"),
        ("table: [1]", "r:1:8: table: expected a mapping, found [1]"),
    ],
)
def test_one_line_says_where_what_and_what_to_do(text: str, line: str) -> None:
    assert lines(text) == [line]


def test_each_mistake_has_its_line() -> None:
    text = "name: 5\nzzz: 1\ninner: {count: x, ratio: y}\n"
    assert lines(text) == [
        "r:1:7: name: expected text, found 5",
        "r:3:16: inner.count: expected a whole number, found 'x'",
        "r:3:26: inner.ratio: expected a number, found 'y'",
        "r:2:1: unknown key 'zzz'; known keys are inner, many, name, pet, table",
    ]


def test_what_follows_from_a_mistake_is_not_told() -> None:
    """A misspelt key is not missing too, and a list that lost its faulty entry is not too short."""
    assert lines("inner: {cont: 1}") == ["r:1:9: unknown key 'cont'; did you mean 'count'?"]
    assert lines("many: [5]") == ["r:1:8: many.0: expected a mapping, found 5"]


def test_a_place_can_stand_elsewhere_in_the_text() -> None:
    """Data that was translated tells where its values came from."""

    def origin(path: Sequence[Key]) -> tuple[Key, ...]:
        return ("was", *path[1:]) if path[:1] == ("inner",) else tuple(path)

    yaml = YamlText("name: x\nwas: {count: none}\n", "r")
    with pytest.raises(ValidationError) as caught:
        Root.model_validate({"name": "x", "inner": {"count": "none"}})
    assert fault_lines(caught.value, yaml, Root, origin) == ["r:2:14: was.count: expected a whole number, found 'none'"]


def test_a_line_stays_one_line_and_short() -> None:
    (line,) = lines('inner: {count: "a\\nb\\e[31m"}')
    assert line == r"r:1:16: inner.count: expected a whole number, found 'a\nb\x1b[31m'"
    (line,) = lines(f"inner: {{count: {'y' * 300}}}")
    assert line == f"r:1:16: inner.count: expected a whole number, found '{'y' * 56}..."


def test_an_override_is_named_in_place_of_a_line() -> None:
    yaml = YamlText("inner: {count: 1}", "r")
    yaml.override("inner.count=none")
    with pytest.raises(ValidationError) as caught:
        Root.model_validate(yaml.data)
    assert fault_lines(caught.value, yaml, Root) == ["--set inner.count: inner.count: expected a whole number, found 'none'"]


def test_no_sentence_of_pydantic_stands_in_the_words() -> None:
    for words in EXPECTED.values():
        assert words.startswith("expected ") and "Input" not in words


def test_lines_make_one_error() -> None:
    error = RecipeError("\n".join(lines("name: 5\nzzz: 1")))
    assert str(error).splitlines() == lines("name: 5\nzzz: 1")
