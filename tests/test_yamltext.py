from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import failure
from hypothesis import given
from hypothesis import strategies as st

from layercut.errors import RecipeError
from layercut.recipe import parse_recipe
from layercut.yamltext import YamlText

COLON = (
    "not valid YAML: mapping values are not allowed in this context; "
    "check the indentation, and that a space follows every ':'; text with ': ' in it goes in quotes"
)


def read(text: str) -> YamlText:
    return YamlText(text, "r.yaml")


def refusal(text: str) -> str:
    return failure(RecipeError, lambda: read(text))


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("1_000", 1000),
        ("010", 8),  # YAML 1.1: octal
        ("0o10", "0o10"),  # YAML 1.2's octal is text in 1.1
        ("0x1F", 31),
        ("0b11", 3),
        ("1:30", 90),  # YAML 1.1: sexagesimal
        ("1.5", 1.5),
        ("1e-3", "1e-3"),  # YAML 1.1 wants a dot
        ("1.0e-3", 0.001),
        ("1.0e+3", 1000.0),
        (".inf", float("inf")),
        ("on", True),
        ("off", False),
        ("yes", True),
        ("No", False),
        ("true", True),
        ("y", "y"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2001-12-14", "2001-12-14"),  # a date stays text
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("25%", "25%"),
        ("'5'", "5"),
        ('"on"', "on"),
        ('"caf\\u00e9"', "café"),
        ("a@main", "a@main"),
        ("=", "="),
        ("[]", []),
        ("{}", {}),
        ("[1, [2, {a: b}]]", [1, [2, {"a": "b"}]]),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_values_are_those_of_yaml_1_1(scalar: str, value: Any) -> None:
    found = read(f"key: {scalar}").data["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("!!python/object/apply:os.system ['touch gone']", ["touch gone"]),
        ("!!python/object/new:os.system {args: [x]}", {"args": ["x"]}),
        ("!!python/name:os.system", ""),
        ("!!python/tuple [1, 2]", [1, 2]),
        ("!secret x", "x"),
        ("!!binary aGk=", "aGk="),
        ("!!timestamp 2001-12-14", "2001-12-14"),
        ("!!set {a, b}", {"a": None, "b": None}),
        ("!!str 5", "5"),
        ("!!int '5'", 5),
        ("!!int five", "five"),
        ("!!int ''", ""),
        ("!!int [5]", [5]),
        ("!!bool maybe", "maybe"),
        ("!!float x", "x"),
    ],
)
def test_tags_never_build_objects(value: str, found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(f"key: {value}").data["key"] == found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000, "-" + "1" * 101, "1" + ":10" * 20_000])
def test_numbers_that_nobody_can_print_stay_text(number: str) -> None:
    assert read(f"key: {number}").data["key"] == number


def test_keys_are_text() -> None:
    assert read("1: a\non: b\n~: c\n1.5: d").data == {"1": "a", "on": "b", "~": "c", "1.5": "d"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml: expected a mapping such as 'model: …'"),
        ("# nothing\n", "r.yaml: expected a mapping such as 'model: …'"),
        ("- a\n- b\n", "r.yaml: expected a mapping such as 'model: …'"),
        ("just text", "r.yaml: expected a mapping such as 'model: …'"),
        ("a: [1, 2\nb: 3\n", "r.yaml:2:2: not valid YAML: did not find expected ',' or ']'; is the bracket of line 1 closed?"),
        ("a: b: c", f"r.yaml:1:5: {COLON}"),
        ("a:\n\tb: 1", "r.yaml:2:1: not valid YAML: found character that cannot start any token; indent with spaces, not tabs"),
        (
            "a: 1\n---\nb: 2\n",
            "r.yaml:2:1: several recipes in one file; split them at '---'; "
            "a later one names the output folder of an earlier one as its model",
        ),
        ("a: 'x", "r.yaml:1:4: not valid YAML: this quote is not closed"),
        ("a: *b", "r.yaml:1:4: not valid YAML: found undefined alias; put text that begins with '*' in quotes"),
        ("a: \x00", "r.yaml: not valid YAML: unacceptable character #x0000: control characters are not allowed"),
        ("? [1, 2]\n: x", "r.yaml:1:3: a key must be text"),
        ("a: &x [1, *x]", "r.yaml:1:4: an alias that contains itself"),
        ("a: &x\n  b: {c: *x}", "r.yaml:1:4: an alias that contains itself"),
        ("a: &x {<<: *x}", "r.yaml:1:4: an alias that contains itself"),
        ("a:\n  <<: 5", "r.yaml:2:7: '<<' takes a mapping or a list of mappings"),
        ("b: &b {c: 1}\na:\n  <<: [*b, 5]", "r.yaml:3:7: '<<' takes a mapping or a list of mappings"),
        ("éé: b: c", f"r.yaml:1:6: {COLON}"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    assert refusal(text) == message


def test_a_tower_of_brackets_is_refused() -> None:
    assert "nest" in refusal("a: " + "[" * 50_000)
    assert refusal("a: " + "[" * 100 + "]" * 100) == "r.yaml:1:64: nested too deeply"
    assert read("a: " + "[" * 50 + "]" * 50).data["a"] == eval("[" * 50 + "]" * 50)


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    started = time.process_time()
    assert refusal("\n".join(lines)) == "r.yaml:6:5: aliases expand to more than 500,000 values"
    assert time.process_time() - started < 1


def test_a_bomb_of_merge_keys_is_refused_at_once() -> None:
    lines = ["a0: &a0 {" + ", ".join(f"k{n}: [1, 2, 3]" for n in range(10)) + "}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 30)]
    started = time.process_time()
    assert "aliases expand to more than 500,000 values" in refusal("\n".join(lines))
    assert time.process_time() - started < 1


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("model: café\n".encode())
    assert YamlText.read(path).data == {"model": "café"}
    path.write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert YamlText.read(path).data == {"model": "m"}
    path.write_bytes(b"model: m\r\nsteps: []\r\n")
    assert YamlText.read(path).where(("steps",)) == f"{path}:2:8"
    for data, message in ((b"model: caf\xe9\n", "not UTF-8 text (byte 10)"), (b"\xff\xfem\0", "not UTF-8 text (byte 0)")):
        path.write_bytes(data)
        with pytest.raises(RecipeError) as caught:
            YamlText.read(path)
        assert str(caught.value) == f"{path}: {message}; save it as UTF-8"
    begin = "a recipe is a YAML file; `layercut new` lists some to begin with"
    for missing, message in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(RecipeError) as caught:
            YamlText.read(missing)
        assert str(caught.value) == f"{missing}: cannot read: {message}; {begin}"
    with pytest.raises(RecipeError) as caught:
        YamlText.read(tmp_path / "r.yml")
    assert str(caught.value) == f"{tmp_path / 'r.yml'}: cannot read: No such file or directory; did you mean 'r.yaml'?"


PLACES = """\
model: m
base: &base
  samples: 4
  nested: {deep: [1, 2]}
other: &other {samples: 5, extra: yes}
calibration:
  <<: [*base, *other]
  source: builtin
steps:
  - prune: {at: [3, "7-9"]}
  - keep:
      at: 1
"""


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ((), "1:1", "1:1"),
        (("model",), "1:8", "1:1"),
        (("base", "samples"), "3:12", "3:3"),
        (("calibration",), "7:3", "6:1"),
        (("calibration", "source"), "8:11", "8:3"),
        (("calibration", "samples"), "3:12", "3:3"),  # through the merge key, first mapping first
        (("calibration", "extra"), "5:35", "5:28"),  # through the second
        (("calibration", "nested", "deep", 1), "4:22", "4:22"),
        (("steps", 0, "prune", "at", 1), "10:21", "10:21"),
        (("steps", 1, "keep", "at"), "12:11", "12:7"),
        (("steps", 1, "keep", "missing"), "12:7", "11:5"),  # the nearest place that exists
        (("steps", 1, "keep", "<tag>", "at"), "12:11", "12:7"),  # components that are no places are passed over
        (("steps", 9, "prune"), "10:3", "9:1"),
        (("steps", -1), "10:3", "9:1"),
    ],
)
def test_places(path: tuple[Any, ...], value: str, key: str) -> None:
    text = read(PLACES)
    assert text.where(path) == f"r.yaml:{value}"
    assert text.where(path, key=True) == f"r.yaml:{key}"


def test_merge_keys() -> None:
    text = read(PLACES)
    assert text.data["calibration"] == {"samples": 4, "nested": {"deep": [1, 2]}, "extra": True, "source": "builtin"}
    text.data["calibration"]["nested"]["deep"].append(3)  # copies, not shared objects
    assert text.data["base"]["nested"]["deep"] == [1, 2]
    own = read("b: &b {x: 1, y: 2}\na: {<<: *b, x: 3}").data["a"]
    assert own == {"x": 3, "y": 2}
    chain = read("a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b, z: 3}").data["c"]
    assert chain == {"x": 1, "y": 2, "z": 3}
    assert read("'<<': 5").data == {"<<": 5}


def test_duplicates_are_listed_where_they_stand() -> None:
    text = read("a: 1\nb: {c: 1, d: 2, c: 3}\na: 2\n")
    assert text.data == {"a": 2, "b": {"c": 3, "d": 2}}
    assert sorted(text.duplicates) == [("r.yaml:2:17", "c"), ("r.yaml:3:1", "a")]
    assert read("b: &b {x: 1}\na: {<<: *b, x: 2}").duplicates == []


def test_present_leaves_out_what_is_no_place() -> None:
    text = read(PLACES)
    assert text.present(("steps", 0, "prune", "<many>", "at", 1, "<range>")) == ("steps", 0, "prune", "at", 1)
    assert text.present(("calibration", "builtin", "samples")) == ("calibration", "samples")
    assert text.present(("steps", 7)) == ("steps",)


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("model=n", ("model",), "n"),
        ("model=", ("model",), None),
        ("depth=24", ("depth",), 24),
        ("steps.0.prune.at=[1, 2]", ("steps", 0, "prune", "at"), [1, 2]),
        ("steps.0.prune.at.1=5", ("steps", 0, "prune", "at", 1), 5),
        ("steps.-1.keep.at=7", ("steps", 1, "keep", "at"), 7),
        ("steps.-2={keep: {at: 0}}", ("steps", 0), {"keep": {"at": 0}}),
        ("steps=[]", ("steps",), []),
        ("output.path=./x", ("output", "path"), "./x"),  # a missing mapping is made
        ("a.b.c.d=1", ("a", "b", "c", "d"), 1),
        ("calibration.samples=9", ("calibration", "samples"), 9),
        ("output=a=b", ("output",), "a=b"),
        ("output=2001-01-01", ("output",), "2001-01-01"),
        ("metric=name: angular", ("metric",), {"name": "angular"}),
        ("metric=!!python/name:os.system x", ("metric",), "x"),
        ("depth=" + "9" * 5000, ("depth",), "9" * 5000),
    ],
)
def test_overrides(assignment: str, path: tuple[Any, ...], value: Any) -> None:
    text = read(PLACES)
    text.override(assignment)
    found: Any = text.data
    for part in path:
        found = found[part]
    assert found == value
    assert text.where(path) == f"--set {assignment.partition('=')[0]}"


def test_an_override_of_a_whole_answers_for_its_parts_and_a_part_not_for_the_whole() -> None:
    text = read(PLACES)
    text.override("steps.0.prune.at.0=4")
    assert text.where(("steps", 0, "prune", "at", 0)) == "--set steps.0.prune.at.0"
    assert text.where(("steps", 0, "prune", "at", 1)) == "r.yaml:10:21"
    assert text.where(("steps", 0, "prune")) == "r.yaml:10:12"
    text.override("steps.0=prune")
    assert text.where(("steps", 0, "prune")) == "--set steps.0"


def test_overrides_do_not_reach_other_uses_of_an_anchor() -> None:
    text = read(PLACES)
    text.override("calibration.nested.deep.0=9")
    assert text.data["calibration"]["nested"]["deep"] == [9, 2]
    assert text.data["base"]["nested"]["deep"] == [1, 2]


def test_later_overrides_see_earlier_ones() -> None:
    text = read("model: m\nsteps:\n")
    text.override("steps=[{prune: {layers: 1}}]")
    text.override("steps.0.prune.layers=3")
    assert text.data == {"model": "m", "steps": [{"prune": {"layers": 3}}]}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model", "expected KEY=VALUE, for example steps.0.prune.layers=8"),
        ("=5", "expected KEY=VALUE, for example steps.0.prune.layers=8"),
        ("", "expected KEY=VALUE, for example steps.0.prune.layers=8"),
        ("model=[1", "the value is not YAML"),
        ("model=&x [*x]", "the value is not YAML"),
        ("model=1\nother: 2", "the value is not YAML"),
        ("steps.2=x", "'2' is not a position in a list of 2"),
        ("steps.-3=x", "'-3' is not a position in a list of 2"),
        ("steps.x=x", "'x' is not a position in a list of 2"),
        ("steps.--1=x", "'--1' is not a position in a list of 2"),
        ("steps.²=x", "'²' is not a position in a list of 2"),
        ("steps." + "9" * 5000 + "=x", f"'{'9' * 5000}' is not a position in a list of 2"),
        ("steps.5.prune=x", "'5' is not a position in a list of 2"),
        ("model.name=x", "nothing can stand below the plain value at 'model'"),
        ("steps.0.prune.at.0.x.y=5", "nothing can stand below the plain value at 'steps.0.prune.at.0'"),
    ],
)
def test_overrides_that_cannot_be(assignment: str, message: str) -> None:
    text = read(PLACES)
    with pytest.raises(RecipeError) as caught:
        text.override(assignment)
    shown = assignment.replace("\n", "\\n")  # one line, whatever was typed
    assert str(caught.value) == f"--set {shown}: {message}"


trees = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | st.text("ab: #'\"\\é\n-", max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), trees, max_size=4), st.booleans())
def test_what_yaml_writes_is_read_back(data: dict[str, Any], flow: bool) -> None:
    import yaml

    text = read(yaml.safe_dump(data, allow_unicode=True, default_flow_style=flow) if data else "{}")
    assert text.data == data
    assert text.duplicates == []


def test_ten_thousand_lines_with_anchors_and_merge_keys() -> None:
    lines = ["model: m", "steps:", "  - prune: &base {layers: 2, protect: [0, '1-2'], metric: {name: angular}}"]
    for number in range(3332):
        lines += ["  - prune:", "      <<: *base", f"      protect: {number % 50}"]
    started = time.process_time()
    recipe = parse_recipe(read("\n".join(lines)))
    assert time.process_time() - started < 3
    assert len(lines) == 9999
    assert len(recipe.steps) == 3333
    assert recipe.where("steps", 3332, "prune", "protect") == "r.yaml:9999:16"
    assert recipe.where("steps", 3332, "prune", "metric", "name") == "r.yaml:3:66"
