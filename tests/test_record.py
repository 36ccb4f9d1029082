from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import Field, ValidationError

from layercut.record import Record, field_docs


class Base(Record):
    """A base."""

    first: int
    """The first
    number."""
    bare: int = 0


class Derived(Base):
    """A subclass."""

    second: str = Field(default="", alias="two")
    """The second."""
    first: int
    """Said again."""


def properties(kind: type[Record]) -> dict[str, Any]:
    found: dict[str, Any] = kind.model_json_schema()["properties"]
    return found


def test_the_string_under_a_field_describes_it() -> None:
    assert field_docs(Base) == {"first": "The first\nnumber."}
    assert properties(Base)["first"]["description"] == "The first\nnumber."
    assert "description" not in properties(Base)["bare"]


def test_aliases_and_bases() -> None:
    found = properties(Derived)
    assert found["two"]["description"] == "The second."
    assert found["first"]["description"] == "Said again."


def test_nested_records_are_described_too() -> None:
    class Outer(Record):
        inner: tuple[Base, ...]
        """Records in a record."""

    schema = Outer.model_json_schema()
    assert schema["$defs"]["Base"]["properties"]["first"]["description"] == "The first\nnumber."


def test_a_class_without_source_has_no_descriptions() -> None:
    namespace: dict[str, Any] = {"Record": Record, "__name__": "nowhere"}
    exec("class Made(Record):\n    x: int = 1\n    'unseen'\n", namespace)
    made = namespace["Made"]
    made.model_rebuild()
    assert field_docs(made) == {}
    assert made.model_json_schema()["properties"]["x"]["type"] == "integer"


def test_records_are_frozen_and_refuse_unknown_keys() -> None:
    record = Base(first=1)
    with pytest.raises(ValidationError, match="frozen"):
        record.first = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Base.model_validate({"first": 1, "other": 2})
    assert record == Base(first=1) and hash(record) == hash(Base(first=1))


BUILT = """
import layercut.cli
from layercut.record import Record

def below(kind):
    for one in kind.__subclasses__():
        yield one
        yield from below(one)

kinds = list(below(Record))
print(len(kinds) > 50, sorted(one.__name__ for one in kinds if one.__pydantic_complete__))
"""


def test_no_validator_is_built_at_import() -> None:
    """They are built when something is read; building those of what the modules hold ready took a tenth of every start."""
    done = subprocess.run([sys.executable, "-c", BUILT], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"
