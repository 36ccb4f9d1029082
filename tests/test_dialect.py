from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import failure
from hypothesis import given
from hypothesis import strategies as st

from layercut.dialect import DTYPES, Reader, bound, is_normalised, number, shown
from layercut.errors import RecipeError
from layercut.yamltext import YamlText


def reader(value: str = "null") -> Reader:
    return Reader(YamlText(f"value: {value}\n", "d.yaml"))


def refusal(call: Any) -> str:
    return failure(RecipeError, call)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("org/name", "org/name"),
        ("org/name@main", "org/name@main"),
        ("org/name/@main", "org/name@main"),
        ("a@b@c", "a@b@c"),  # the Hub has no such model, and says so
        ("./folder//", "./folder"),
        ("/", "/"),
        ("'quoted name'", "quoted name"),
        (r"C:\models\x", r"C:\models\x"),
        (r"..\x", r"..\x"),
        ("{model: org/name@main}", "org/name@main"),
        ("{path: org/name, revision: v1}", "org/name@v1"),
        ("{path: ./folder/, revision: v1}", "./folder@v1"),
        ("{model: {path: ./folder/, revision: null}, lora: null}", "./folder"),
        ("{model: {model: {path: x}}}", "x"),
        # Left for the recipe to refuse.
        ("7", 7),
        ("{path: 7, revision: v1}", 7),
        ("[a]", ["a"]),
        ("''", ""),
        ("null", None),
    ],
)
def test_references_have_one_spelling(written: str, meant: Any) -> None:
    source = reader(written)
    assert source.reference(source.data["value"], ("value",)) == meant
    assert source.notes == []


MERGE = "merge it into the model first, for example with peft's merge_and_unload"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("a+b", f"d.yaml:1:8: no folder 'a+b'; LoRA adapters are not applied (+b); {MERGE}"),
        ("a@main+b@v1", f"d.yaml:1:8: no folder 'a@main+b@v1'; LoRA adapters are not applied (+b@v1); {MERGE}"),
        ("./c++", f"d.yaml:1:8: no folder './c++'; LoRA adapters are not applied (++); {MERGE}"),
        ("{model: a+b}", f"d.yaml:1:16: no folder 'a+b'; LoRA adapters are not applied (+b); {MERGE}"),
        ("{model: a, lora: {path: b}}", f"d.yaml:1:25: LoRA adapters are not applied; {MERGE}"),
        ("{}", "d.yaml:1:8: a model reference is text, or a mapping with 'path'"),
        ("{model: {}}", "d.yaml:1:16: a model reference is text, or a mapping with 'path'"),
        ("{modle: a}", "d.yaml:1:9: unknown key 'modle'; did you mean 'model'?"),
        ("{path: a, revision: 12}", "d.yaml:1:28: 'revision' is text, found 12; put it in quotes"),
        ("{path: a@b, revision: c}", "d.yaml:1:30: 'revision' stands beside a path that has one, 'a@b'"),
    ],
)
def test_references_that_are_refused(written: str, message: str) -> None:
    source = reader(written)
    assert refusal(lambda: source.reference(source.data["value"], ("value",))) == message


@pytest.mark.parametrize("name", ["c++", "v1@final", "a+b@c+d"])
def test_folders_that_exist_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert reader().reference(f"{name}/", ()) == name
    assert reader().reference(f"{tmp_path}/{name}", ()) == f"{tmp_path}/{name}"


@pytest.mark.parametrize("name", ["x" * 5000 + "@a", "\0@a", "~nobody-of-that-name/x@a"])
def test_names_that_no_folder_can_have_are_left_for_the_resolver(name: str) -> None:
    assert reader().reference(name, ()) == name


def test_aliases_are_left_alone() -> None:
    source = Reader(YamlText("models: {a+b: x, c/: y}\n", "d.yaml"))
    assert [source.reference(name, ()) for name in ("a+b", "c/", "d/")] == ["a+b", "c/", "d"]


def test_what_a_reference_ignores_is_noted() -> None:
    source = reader("{path: a, override_architecture: X, extra: 1}")
    assert source.reference(source.data["value"], ("value",)) == "a"
    assert source.notes == [
        "d.yaml:1:44: unknown key 'extra' is ignored",
        "d.yaml:1:18: 'override_architecture' is ignored: the architecture is read from the checkpoint",
    ]


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("0.5", 0.5),
        ("'0.5'", 0.5),
        ("[0.5, '1']", [0.5, 1]),
        ("{filter: q_proj, value: 0.5}", [{"filter": "q_proj", "value": 0.5}]),
        ("{filter: '*', value: [0, '1e-3']}", [{"value": [0, 0.001]}]),
        ("[{filter: '', value: 1}, {filter: null, value: 2}]", [{"value": 1}, {"value": 2}]),
        ("[{filter: x}, loud]", [{"filter": "x"}, "loud"]),
        ("{filter: [a], value: {b: c}}", [{"filter": ["a"], "value": {"b": "c"}}]),
        ("true", True),
    ],
)
def test_settings_have_one_spelling(setting: str, meant: Any) -> None:
    source = reader(setting)
    assert source.setting(source.data["value"], ("value",)) == meant
    assert source.notes == []


def test_what_a_setting_ignores_is_noted_and_what_it_misspells_is_refused() -> None:
    source = reader("[1, {value: 2, comment: x}]")
    assert source.setting(source.data["value"], ("value",)) == [1, {"value": 2}]
    assert source.notes == ["d.yaml:1:23: unknown key 'comment' is ignored"]
    wrong = reader("[1, {value: 2, fliter: x}]")
    assert refusal(lambda: wrong.setting(wrong.data["value"], ("value",))) == "d.yaml:1:23: unknown key 'fliter'; did you mean 'filter'?"


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("form", ["{}", "torch.{}", " {} "])
def test_dtypes_by_their_names(name: str, form: str) -> None:
    assert reader().dtype(form.format(name), "value") == name
    assert reader().dtype(form.format(name.upper()), "value") == name


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("fp16", "float16"), ("half", "float16"), ("bf16", "bfloat16"), ("BF16", "bfloat16"), ("torch.half", "float16"),
        ("fp32", "float32"), ("float", "float32"), ("fp64", "float64"), ("torch.double", "float64"),
    ],
)  # fmt: skip
def test_dtypes_by_their_short_names(short: str, name: str) -> None:
    assert reader().dtype(short, "value") == name


@pytest.mark.parametrize(
    ("value", "found", "hint"),
    [
        ("bfloat", "'bfloat'", "did you mean 'bfloat16'?"),
        ("float8", "'float8'", "did you mean 'float64'?"),
        ("int64", "'int64'", "leave it out to keep that of the source"),
        ("auto", "'auto'", "leave it out to keep that of the source"),
        ("", "''", "leave it out to keep that of the source"),
        (16, "16", "leave it out to keep that of the source"),
        (None, "nothing", "leave it out to keep that of the source"),
    ],
)
def test_other_dtypes_are_refused(value: Any, found: str, hint: str) -> None:
    message = f"d.yaml:1:8: 'value' is one of float16, bfloat16, float32, float64, found {found}; {hint}"
    assert refusal(lambda: reader().dtype(value, "value")) == message


@pytest.mark.parametrize(
    ("levels", "found"),
    [
        ([], [1]),
        ([None, {}, {"weight": None}, {"weight": []}, "odd"], [1]),
        ([{"weight": 0}, {"weight": 5}], [0]),
        ([{}, {"weight": "0.5"}], [0.5]),
        ([{"weight": [0, 1, 0.5]}, {"weight": 5}], [0, 1, 0.5]),
        ([{"weight": {"filter": "mlp", "value": 0}}, {"weight": 5}], [0, 5]),
        ([{"weight": [{"filter": "mlp", "value": [0, 2]}]}, {}], [0, 2, 1]),
        ([{"weight": [{"filter": "mlp", "value": 0}, {"value": 3}, {"value": 4}]}, {"weight": 5}], [0, 3]),
        ([{"weight": {"filter": "*", "value": 0}}, {"weight": 5}], [0]),
    ],
)
def test_weights_that_a_source_can_take(levels: list[Any], found: list[float]) -> None:
    assert reader().weights(levels, ()) == found


@pytest.mark.parametrize("weight", [True, "heavy", float("nan"), float("inf"), [[[1]]], {"filter": "x"}])
def test_weights_are_numbers(weight: Any) -> None:
    with pytest.raises(RecipeError, match=r"^d\.yaml:1:8: a weight is a number, found "):
        reader().weights([{"weight": weight}], ("value",))


@pytest.mark.parametrize(
    ("levels", "answer"),
    [
        ([], True),
        ([{"normalize": True}, {"normalize": False}], True),
        ([{"normalize": False}, {"normalize": True}], False),
        ([{}, {"normalize": False}], False),
        ([{"normalize": {"filter": "mlp", "value": False}}], False),
        ([{"normalize": "no"}], False),
    ],
)
def test_is_normalised(levels: list[Any], answer: bool) -> None:
    assert is_normalised(levels) is answer


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("1", 1.0), ("-1.5", -1.5), (".5", 0.5), ("5.", 5.0), ("1e-3", 0.001), ("+2E2", 200.0), (3, 3), (True, True), (None, None),
        ("nan", "nan"), ("inf", "inf"), ("1_000", "1_000"), ("٣", "٣"), ("9" * 21, "9" * 21), ("1e999", "1e999"), ("", ""), ("1 ", "1 "),
    ],
)  # fmt: skip
def test_numbers_in_quotes(value: Any, meant: Any) -> None:
    assert number(value) == meant
    assert type(number(value)) is type(meant)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("2", 2), ("-2", -2), ("+2", 2), (2.0, 2), (7, 7), (2.5, 2.5), (1e300, 1e300), (float("inf"), float("inf")), ("1e1", "1e1"),
        ("٣", "٣"), ("9" * 16, "9" * 16), ("auto", "auto"), ("0-2", "0-2"), (True, True), (None, None),
    ],
)  # fmt: skip
def test_boundaries_in_quotes(value: Any, meant: Any) -> None:
    assert bound(value) == meant
    assert type(bound(value)) is type(meant)


@given(value=st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.booleans(), st.none()))
def test_what_was_read_reads_the_same(value: Any) -> None:
    assert number(number(value)) == number(value)
    assert bound(bound(value)) == bound(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "nothing"), ("a", "'a'"), (True, "true"), ([1, "é"], '[1, "é"]'), ("x" * 80, "'" + "x" * 56 + "...")],
)
def test_shown(value: Any, text: str) -> None:
    assert shown(value) == text


def test_keys_that_nothing_reads() -> None:
    source = reader("{size: 1, colour: 2, sise: 3}")
    source.check_keys(source.data["value"], ("value",), ("size", "shape"), ("size",))
    assert source.notes == [
        "d.yaml:1:18: unknown key 'colour' is ignored",
        "d.yaml:1:29: unknown key 'sise' is ignored; did you mean 'size'?",
    ]
    wrong = reader("{sise: 3}")
    message = "d.yaml:1:9: unknown key 'sise'; did you mean 'size'?"
    assert refusal(lambda: wrong.check_keys(wrong.data["value"], ("value",), ("size", "shape"), ("size",))) == message


def test_messages_are_one_line_and_the_text_is_left_alone() -> None:
    text = YamlText("value: [1]\n", "d.yaml")
    source = Reader(text)
    source.note("two\n\n lines", "value")
    source.data["value"].append(2)
    assert source.notes == ["d.yaml:1:1: two lines"]
    assert text.data == {"value": [1]}
