"""Calibration text: every source, every message, and how documents become samples."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from layercut.calibration import (
    BUFFER,
    PIECE,
    Auto,
    BuiltinCalibration,
    Calibration,
    HubCalibration,
    Passage,
    Tally,
    TextCalibration,
    documents,
    passages,
    samples,
    shuffled,
    windows,
)
from layercut.errors import CalibrationError


class Recipe(BaseModel):
    calibration: Calibration = BuiltinCalibration()


def read(path: Path | str, column: str | None = None) -> list[str]:
    return list(documents(TextCalibration(path=str(path), column=column)))


def message(call: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def by_character(text: str) -> list[int]:
    """A tokenizer of one token a character."""
    return [ord(character) for character in text]


def cut(texts: list[Passage], max_length: int, prefix: list[int] | None = None) -> tuple[list[str], Tally]:
    tally = Tally(read=len(texts))
    found = samples(iter(texts), by_character, prefix or [], max_length, tally)
    return ["".join(chr(i) for i in ids) for ids in found], tally


# Settings


def test_defaults() -> None:
    assert Recipe().calibration.model_dump() == {
        "source": "builtin", "samples": 128, "max_length": 512, "min_length": 1, "seed": None, "batch_size": 8, "bos": "auto",
    }  # fmt: skip
    hub = Recipe.model_validate({"calibration": {"source": "hub", "dataset": "allenai/c4"}}).calibration
    assert isinstance(hub, HubCalibration)
    assert (hub.name, hub.split, hub.column, hub.revision, hub.streaming) == (None, "train", "text", None, True)


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
    ],
)
def test_settings_that_do_not_do(mapping: dict[str, Any], place: str, text: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate({"calibration": mapping})
    assert [(error["loc"][-1], error["msg"]) for error in caught.value.errors()] == [(place, text)]


def test_unknown_source_lists_the_known_ones() -> None:
    with pytest.raises(ValidationError, match="'builtin', 'text', 'hub'"):
        Recipe.model_validate({"calibration": {"source": "file"}})


def test_every_setting_says_what_it_is() -> None:
    schema = Recipe.model_json_schema()["$defs"]
    for name in ("BuiltinCalibration", "TextCalibration", "HubCalibration"):
        for key, value in schema[name]["properties"].items():
            assert value.get("description", "").endswith("."), (name, key)


# Sources


def test_builtin_parts_differ_and_are_plain_prose() -> None:
    main, held_out = ("".join(documents(BuiltinCalibration(), held_out=part)) for part in (False, True))
    assert 140_000 < len(main) < 160_000
    assert 45_000 < len(held_out) < 55_000
    assert len(main.splitlines()) == 30
    assert len(held_out.splitlines()) == 10
    sentences = {sentence for sentence in main.split(". ") if len(sentence) > 40}
    assert not sentences & set(held_out.split(". "))
    assert not [character for character in main + held_out if not character.isprintable() and character != "\n"]


def test_txt_is_one_running_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\n\ntwo \u00e9\n")
    tally = Tally()
    assert list(passages(TextCalibration(path=str(path)), tally=tally)) == [Passage("one\n\ntwo \u00e9\n", str(path))]
    assert tally == Tally(read=1, skipped=0)


@pytest.mark.parametrize("line", ["words and words\n", "words and words ", "x"])
def test_long_txt_comes_in_parts_without_loss(tmp_path: Path, line: str) -> None:
    text = line * (3 * PIECE // len(line))
    tally = Tally()
    parts = [passage.text for passage in passages(TextCalibration(path=str(write(tmp_path / "a.txt", text))), tally=tally)]
    assert "".join(parts) == text
    assert len(parts) >= 3
    assert max(map(len, parts)) < 2 * PIECE
    if "\n" in line:
        assert all(part.endswith("\n") for part in parts)
    elif " " in line:
        assert all(part.startswith(" ") for part in parts[1:])  # a word and the space before it stay together
    assert tally == Tally(read=1, skipped=0)


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"text": "  \n"}, {"text": None}, {"text": "two\nlines"}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    tally = Tally()
    assert list(passages(TextCalibration(path=str(path)), tally=tally)) == [Passage("one", None), Passage("two\nlines", None)]
    assert tally == Tally(read=2, skipped=2)


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,body\n1,"a, quoted\nline"\n2,\n3,plain\n')
    assert read(path, "body") == ["a, quoted\nline", "plain"]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "three"]}), path)
    assert read(path) == ["one", "three"]
    assert message(lambda: read(path, "txt")) == f"{path}: row 1: no column 'txt' (available: 'id', 'text'); did you mean 'text'?"
    assert message(lambda: read(path, "id")) == f"{path}: row 1: column 'id' holds int, not text"
    broken = write(tmp_path / "b.parquet", "not parquet at all")
    assert message(lambda: read(broken)).startswith(f"{broken}: cannot be read as parquet: Parquet magic bytes not found")


def test_a_pattern_reads_files_in_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", json.dumps({"text": name}))
    (tmp_path / "d.jsonl").mkdir()
    assert read(tmp_path / "*.jsonl") == ["a", "b", "c"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "deep" / "er" / "z.txt", "deep")
    assert read(tmp_path / "**" / "*.txt") == ["deep"]


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a[1].txt", "x")) == ["x"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\nbroken\n')
    texts = documents(TextCalibration(path=str(path)))
    assert next(texts) == "good"
    assert message(lambda: next(texts)) == f"{path}:2: invalid JSON: Expecting value at column 1"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "some words in a line\n" * 500_000)  # 10 MB
    tracemalloc.start()
    for _ in documents(TextCalibration(path=str(path))):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


# Messages


def test_file_messages(tmp_path: Path) -> None:
    assert message(lambda: read(tmp_path / "none.txt")) == f"{tmp_path / 'none.txt'}: no such file"
    assert message(lambda: read(tmp_path / "*.none")) == f"{tmp_path / '*.none'}: no such file"
    assert message(lambda: read(tmp_path)) == f"{tmp_path}: this is a folder; name a file, or a pattern such as folder/*.txt"
    path = write(tmp_path / "a.doc", "x")
    assert message(lambda: read(path)) == f"{path}: unknown kind of text file '.doc'; known are .txt, .jsonl, .csv, .parquet"
    path = write(tmp_path / "a.txt", "x")
    assert message(lambda: read(path, "text")) == f"{path}: a .txt file has no column 'text'"
    empty = {"e.txt": "", "f.txt": " \n\n", "g.jsonl": "\n", "h.jsonl": '{"text": " "}', "i.csv": "", "j.csv": "text\n"}
    for name, text in empty.items():
        path = write(tmp_path / name, text)
        assert message(lambda path=path: read(path)) == f"{path}: the file holds no text"  # type: ignore[misc]
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 x")
    assert message(lambda: read(path)) == f"{path}: not UTF-8 text: invalid continuation byte"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": "x"', "invalid JSON: Expecting ',' delimiter at column 13"),
        ('["text"]', "a line must hold a JSON object"),
        ('"text"', "a line must hold a JSON object"),
        ('{"text": 5}', "column 'text' holds int, not text"),
        ('{"text": ["a"]}', "column 'text' holds list, not text"),
        ('{"body": "x", "id": 1}', "no column 'text' (available: 'body', 'id')"),
        ('{"txt": "x"}', "no column 'text' (available: 'txt'); did you mean 'txt'?"),
        ("{}", "no column 'text' (available: none)"),
    ],
)
def test_jsonl_messages(tmp_path: Path, line: str, text: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    assert message(lambda: read(path)) == f"{path}:3: {text}"


def test_json_that_is_too_deep(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "[" * 200_000)
    assert message(lambda: read(path)).startswith(f"{path}:1: invalid JSON: maximum recursion depth exceeded")


def test_csv_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,body\n1,x\n")
    assert message(lambda: read(path)) == f"{path}:2: no column 'text' (available: 'id', 'body')"
    path = write(tmp_path / "b.csv", "text\n" + "x" * 200_000 + "\n")
    assert message(lambda: read(path)) == f"{path}:2: field larger than field limit (131072); long texts belong in .jsonl or .parquet"
    path = write(tmp_path / "c.csv", "text\nfine\nextra,cells\n")
    assert read(path) == ["fine", "extra"]


# The Hub, with a hand-made stand-in for datasets.load_dataset


class Loader:
    def __init__(self, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.rows = rows
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        self.call = (args, kwargs)
        return self.rows()


def test_hub_rows_come_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    served: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(1000):
            served.append(number)
            yield {"body": "" if number == 1 else f"text {number}"}

    loader = Loader(rows)
    monkeypatch.setattr(datasets, "load_dataset", loader)
    tally = Tally()
    found = passages(HubCalibration(dataset="some/set", name="en", split="validation", column="body", revision="abc"), tally=tally)
    assert [next(found).text for _ in range(2)] == ["text 0", "text 2"]
    assert served == [0, 1, 2]
    assert tally == Tally(read=2, skipped=1)
    assert loader.call == (("some/set", "en"), {"split": "validation", "revision": "abc", "streaming": True})


def test_hub_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hint = "check the name, the split and the network, or use local files: {source: text, path: ...}"

    def no_network() -> Iterator[dict[str, Any]]:
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nmore lines")

    def breaks_later() -> Iterator[dict[str, Any]]:
        yield {"text": "one"}
        raise RuntimeError("connection reset")

    hub = HubCalibration(dataset="some/set")
    monkeypatch.setattr(datasets, "load_dataset", Loader(no_network))
    assert message(lambda: list(documents(hub))) == f"some/set: the dataset cannot be read: Couldn't reach 'some/set' on the Hub; {hint}"
    monkeypatch.setattr(datasets, "load_dataset", Loader(breaks_later))
    assert message(lambda: list(documents(hub))) == f"some/set: the dataset cannot be read: connection reset; {hint}"
    monkeypatch.setattr(datasets, "load_dataset", Loader(lambda: iter([{"content": "x"}])))
    assert message(lambda: list(documents(hub))) == "some/set: row 1: no column 'text' (available: 'content')"


def test_hub_with_the_real_library_and_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert list(documents(HubCalibration(dataset=str(folder)))) == ["one", "two"]
    found = message(lambda: list(documents(HubCalibration(dataset=str(folder), split="test"))))
    assert found.startswith(f"{folder}: the dataset cannot be read: ")


# Samples


def test_a_document_is_a_sample() -> None:
    found, tally = cut([Passage("abcdef", None), Passage("xy", None), Passage("0123", None)], 4)
    assert found == ["abcd", "xy", "0123"]
    assert tally == Tally(read=3, skipped=0)


def test_a_running_text_is_cut_into_windows() -> None:
    # 10 characters in three parts: windows of 4 cross the parts, the rest of 2 is dropped
    assert cut([Passage("abc", "f"), Passage("defgh", "f"), Passage("ij", "f")], 4)[0] == ["abcd", "efgh"]
    assert cut([Passage("abcdefgh", "f")], 4)[0] == ["abcd", "efgh"]


def test_a_short_running_text_is_one_sample() -> None:
    assert cut([Passage("abc", "f")], 4)[0] == ["abc"]


def test_running_texts_do_not_mix() -> None:
    texts = [Passage("abcdef", "f"), Passage("0123456", "g"), Passage("doc", None), Passage("xy", "h")]
    assert cut(texts, 4)[0] == ["abcd", "0123", "doc", "xy"]


def test_the_prefix_counts() -> None:
    assert cut([Passage("abcdef", None), Passage("uvwxyz", "f")], 4, [ord("<")])[0] == ["<abc", "<uvw", "<xyz"]
    assert message(lambda: cut([Passage("a", None)], 2, [1, 2])) == "max_length 2 leaves no room after 2 special tokens"


def test_short_documents_are_skipped_and_counted() -> None:
    tally = Tally()
    texts = [Passage("abc", None), Passage("ab", None), Passage("", None), Passage("abcdef", None), Passage("x", "a.txt")]
    found = list(samples(texts, by_character, [1], 5, tally, min_length=4))
    assert found == [[1, 97, 98, 99], [1, 97, 98, 99, 100]]
    assert tally == Tally(read=0, skipped=1, short=2)
    assert message(lambda: list(samples(texts, by_character, [], 5, tally, min_length=6))) == "min_length 6 is more than max_length 5"


def test_a_shuffle_is_seeded_and_lazy() -> None:
    items = list(range(3 * BUFFER))
    assert list(shuffled(iter(items), None)) == items
    once, again, other = (list(shuffled(iter(items), seed)) for seed in (1, 1, 2))
    assert once == again
    assert sorted(once) == items
    assert len({tuple(order) for order in (items, once, other)}) == 3
    taken = iter(items)
    next(shuffled(taken, 1))
    assert next(taken) == BUFFER + 1


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


def test_a_document_without_tokens_is_skipped() -> None:
    tally = Tally(read=2)
    texts = iter([Passage("silent", None), Passage("a", None)])
    found = samples(texts, lambda text: [] if text == "silent" else [5], [1], 8, tally)
    assert list(found) == [[1, 5]]
    assert tally == Tally(read=2, skipped=1)


@given(st.lists(st.lists(st.integers(0, 9), max_size=9), max_size=6), st.integers(1, 5))
def test_windows_are_the_text(parts: list[list[int]], size: int) -> None:
    text = [token for part in parts for token in part]
    found = list(windows(parts, size))
    full = len(text) // size
    if full:
        assert found == [text[at * size : (at + 1) * size] for at in range(full)]
    else:
        assert found == ([text] if text else [])
