from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut.jsontext import replace, spans

TEXT = """{
  "b": 1,
  "a" : [ 1, 2 ],
  "nested": {"c": {"d": "x"}, "e": null},
  "float": 1e-05
}
"""


def test_spans_are_in_order_and_exact() -> None:
    found = spans(TEXT)
    assert list(found) == ["b", "a", "nested", "float"]
    assert [TEXT[span.start : span.stop] for span in found.values()] == ["1", "[ 1, 2 ]", '{"c": {"d": "x"}, "e": null}', "1e-05"]
    assert [TEXT[span.key] for span in found.values()] == ['"'] * 4
    inner = spans(TEXT, ("nested", "c"))
    assert [TEXT[span.start : span.stop] for span in inner.values()] == ['"x"']
    assert spans("{}") == {}
    assert spans(' { "a":{ } } ', ("a",)) == {}


def test_keys_with_escapes() -> None:
    text = '{"\\u00e9\\"\\\\": 1, "a}b": 2}'
    assert list(spans(text)) == ['é"\\', "a}b"]
    assert replace(text, {('é"\\',): 5}) == '{"\\u00e9\\"\\\\": 5, "a}b": 2}'


@pytest.mark.parametrize("path", [("b", "c"), ("a", "0"), ("nested", "e", "x"), ("z", "y"), ("nested", "z", "y")])
def test_paths_that_lead_through_no_object(path: tuple[str, ...]) -> None:
    with pytest.raises(KeyError):
        replace(TEXT, {path: 1})


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("1", 2, "2"),
        ("1", 0.5, "0.5"),
        ('"x"', "é", '"é"'),
        ("null", None, "null"),
        ("false", True, "true"),
        ('["a", "b"]', ["a"], '["a"]'),
        ('["a","b"]', ["b", "a"], '["b", "a"]'),
        ("[]", [1, 2], "[1, 2]"),
        ("[1]", [], "[]"),
        ('[\n    "a",\n    "b"\n  ]', ["b", "b", "a"], '[\n    "b",\n    "b",\n    "a"\n  ]'),
        ("[\n\t\t1,\n\t\t2\n\t]", [2], "[\n\t\t2\n\t]"),
        ("[\r\n    1,\r\n    2\r\n  ]", [2, 1], "[\r\n    2,\r\n    1\r\n  ]"),
        ("[\n    1,\n    2\n  ]", [], "[]"),
        ("[\n1,\n2]", [2, 1], "[\n2,\n1]"),
        ('{\n    "0": 1,\n    "1": 2\n  }', {"0": 2}, '{\n    "0": 2\n  }'),
        ('{"0": 1, "1": 2}', {"0": 2, "é": 3}, '{"0": 2, "é": 3}'),
        ("[\n    [1, 2],\n    [3, 4]\n  ]", [[3, 4]], "[\n    [3, 4]\n  ]"),
    ],
)
def test_new_values_take_the_layout_of_the_old(old: str, value: Any, new: str) -> None:
    text = f'{{"first": "\\u00e9",\n  "key": {old},\n "last": 1E5}}'
    assert replace(text, {("key",): value}) == f'{{"first": "\\u00e9",\n  "key": {new},\n "last": 1E5}}'


def test_several_changes_at_once() -> None:
    new = replace(TEXT, {("float",): 1, ("b",): 22, ("nested", "c", "d"): "longer", ("nested", "e"): [1]})
    assert new == TEXT.replace("1e-05", "1").replace('"b": 1', '"b": 22').replace('"x"', '"longer"').replace("null", "[1]")


def test_nothing_to_change() -> None:
    assert replace(TEXT, {}) == TEXT


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)
objects = st.dictionaries(st.text(max_size=5), values, min_size=1, max_size=6)


@given(objects, values, st.sampled_from([None, 0, 1, 2, "\t"]), st.booleans(), st.data())
def test_one_value_changes_and_no_other_byte(before: dict[str, Any], value: Any, indent: Any, escaped: bool, data: st.DataObject) -> None:
    text = json.dumps(before, indent=indent, ensure_ascii=escaped)
    key = data.draw(st.sampled_from(list(before)))
    after = replace(text, {(key,): value})
    expected = {name: value if name == key else item for name, item in before.items()}
    assert json.loads(after) == expected
    assert list(json.loads(after)) == list(before)
    old, new = spans(text)[key], spans(after)[key]
    assert after[: new.start] == text[: old.start]
    assert after[new.stop :] == text[old.stop :]


@given(objects, st.sampled_from([None, 2, "\t"]))
def test_a_value_written_over_itself_keeps_the_data(before: dict[str, Any], indent: Any) -> None:
    text = json.dumps(before, indent=indent)
    assert json.loads(replace(text, {(key,): value for key, value in before.items()})) == before


@pytest.mark.parametrize(
    ("text", "path", "value", "after"),
    [
        ('{"a": 1}', ("b",), 2, '{"a": 1, "b": 2}'),
        ('{"a":1}', ("b",), [1], '{"a":1, "b": [1]}'),
        ('{ "a": 1 }', ("b",), 2, '{ "a": 1, "b": 2 }'),
        ('{\n  "a": 1\n}\n', ("b",), False, '{\n  "a": 1,\n  "b": false\n}\n'),
        ('{\r\n\t"a": 1\r\n}', ("b",), None, '{\r\n\t"a": 1,\r\n\t"b": null\r\n}'),
        ('{\n  "a": {"c": 1},\n  "d": 2\n}', ("a", "é"), "ü", '{\n  "a": {"c": 1, "é": "ü"},\n  "d": 2\n}'),
        ('{\n  "a": {\n    "c": [1,\n 2]\n  }\n}', ("a", "b"), 1, '{\n  "a": {\n    "c": [1,\n 2],\n    "b": 1\n  }\n}'),
        ('{"a": "}", "b": "\\"}"}', ("c",), 1, '{"a": "}", "b": "\\"}", "c": 1}'),
    ],
)
def test_a_new_key_goes_to_the_end_of_its_object(text: str, path: tuple[str, ...], value: Any, after: str) -> None:
    assert replace(text, {path: value}) == after


def test_new_keys_and_new_values_at_once() -> None:
    text = '{\n  "a": 1,\n  "n": {"x": [1, 2]}\n}'
    after = replace(text, {("b",): 2, ("a",): 100, ("n", "y"): 3, ("n", "x"): [], ("c",): 4})
    assert after == '{\n  "a": 100,\n  "n": {"x": [], "y": 3},\n  "b": 2,\n  "c": 4\n}'


def test_an_object_without_members_gives_no_layout() -> None:
    with pytest.raises(KeyError, match="no member to write b after"):
        replace('{"a": {}}', {("a", "b"): 1})


@given(objects, st.text(max_size=5), values, st.sampled_from([None, 0, 1, 2, "\t"]), st.booleans())
def test_inserting_leaves_every_other_byte(before: dict[str, Any], key: str, value: Any, indent: Any, escaped: bool) -> None:
    text = json.dumps(before, indent=indent, ensure_ascii=escaped)
    after = replace(text, {(key,): value})
    assert json.loads(after) == {**before, key: value}
    assert list(json.loads(after)) == list({**before, key: value})
    if key not in before:
        last = list(spans(text).values())[-1].stop
        assert after.startswith(text[:last]) and after.endswith(text[last:])
