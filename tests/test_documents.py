"""Documents: what each source holds, every message, and what is counted."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import failure

from layercut import documents as module
from layercut.calibration import BuiltinSource, HubSource, Source, TextSource
from layercut.documents import PIECE, Passage, Tally, passages
from layercut.errors import CalibrationError

FORMS = "a message is {role, content}, or {from, value}"


def texts(source: Source, held_out: bool = False) -> Iterator[Any]:
    return (passage.content for passage in passages(source, held_out))


def read(path: Path | str, column: str | None = None) -> list[Any]:
    return list(texts(TextSource(path=str(path), column=column)))


def message(call: Callable[[], object]) -> str:
    return failure(CalibrationError, call)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# Sources


def test_builtin_parts_differ_and_are_plain_prose() -> None:
    main, held_out = ("".join(texts(BuiltinSource(), held_out=part)) for part in (False, True))
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
    assert list(passages(TextSource(path=str(path)), tally=tally)) == [Passage("one\n\ntwo \u00e9\n", str(path))]
    assert tally == Tally(read=1)


@pytest.mark.parametrize("line", ["words and words\n", "words and words ", "x"])
def test_long_txt_comes_in_parts_without_loss(tmp_path: Path, line: str) -> None:
    text = line * (3 * PIECE // len(line))
    tally = Tally()
    parts = [passage.content for passage in passages(TextSource(path=str(write(tmp_path / "a.txt", text))), tally=tally)]
    assert "".join(parts) == text
    assert len(parts) >= 3
    assert max(map(len, parts)) < 2 * PIECE
    if "\n" in line:
        assert all(part.endswith("\n") for part in parts)
    elif " " in line:
        assert all(part.startswith(" ") for part in parts[1:])  # a word and the space before it stay together
    assert tally == Tally(read=1)


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"text": "  \n"}, {"text": None}, {"text": "two\nlines"}]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    tally = Tally()
    assert list(passages(TextSource(path=str(path)), tally=tally)) == [
        Passage("one", None, f"{path}:1"),
        Passage("two\nlines", None, f"{path}:4"),
    ]
    assert tally == Tally(read=4, skipped={"empty": 2})


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
    found = texts(TextSource(path=str(path)))
    assert next(found) == "good"
    assert message(lambda: next(found)) == f"{path}:2: invalid JSON: Expecting value at column 1"


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "some words in a line\n" * 500_000)  # 10 MB
    tracemalloc.start()
    for _ in texts(TextSource(path=str(path))):
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
    assert message(lambda: read(path)) == f"{path}: not UTF-8 text: invalid continuation byte; save it as UTF-8"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": "x"', "invalid JSON: Expecting ',' delimiter at column 13"),
        ('["text"]', "a line must hold a JSON object"),
        ('"text"', "a line must hold a JSON object"),
        ('{"text": 5}', "column 'text' holds int, not text"),
        ('{"text": ["a"]}', "column 'text' holds list, not text or messages"),
        ('{"text": [{"role": "user"}]}', "message 1: no content; " + FORMS),
        (
            '{"text": [{"role": "user", "content": "x"}, {"content": "x"}]}',
            "message 2: no role; a message is {role, content}, or {from, value}",
        ),
        ('{"text": [{"role": "user", "content": 5}]}', "message 1: the content is int, not text"),
        ('{"text": [{"from": 3, "value": "x"}]}', "message 1: no role; " + FORMS),
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
    assert message(lambda: read(path)) == f"{path}:2: no column 'text' (available: 'id', 'body'); name the one to read: column: …"
    path = write(tmp_path / "d.csv", "id;body\n1;x\n")
    assert message(lambda: read(path)) == f"{path}:2: no column 'text' (available: 'id;body'); columns stand between commas, not ';'"
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
    found = passages(HubSource(dataset="some/set", name="en", split="validation", column="body", revision="abc"), tally=tally)
    assert [next(found).content for _ in range(2)] == ["text 0", "text 2"]
    assert served == [0, 1, 2]
    assert tally == Tally(read=3, skipped={"empty": 1})
    assert loader.call == (("some/set", "en"), {"split": "validation", "revision": "abc", "streaming": True})


def test_hub_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hint = "check the name, the split and the network, or use local files: {source: text, path: ...}"

    def no_network() -> Iterator[dict[str, Any]]:
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nmore lines")

    def breaks_later() -> Iterator[dict[str, Any]]:
        yield {"text": "one"}
        raise RuntimeError("connection reset")

    hub = HubSource(dataset="some/set")
    monkeypatch.setattr(datasets, "load_dataset", Loader(no_network))
    assert message(lambda: list(texts(hub))) == f"some/set: the dataset cannot be read: Couldn't reach 'some/set' on the Hub; {hint}"
    monkeypatch.setattr(datasets, "load_dataset", Loader(breaks_later))
    assert message(lambda: list(texts(hub))) == f"some/set: the dataset cannot be read: connection reset; {hint}"
    monkeypatch.setattr(datasets, "load_dataset", Loader(lambda: iter([{"content": "x"}])))
    assert message(lambda: list(texts(hub))) == "some/set: row 1: no column 'text' (available: 'content'); name the one to read: column: …"


def test_hub_with_the_real_library_and_local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert list(texts(HubSource(dataset=str(folder)))) == ["one", "two"]
    found = message(lambda: list(texts(HubSource(dataset=str(folder), split="test"))))
    assert found.startswith(f"{folder}: the dataset cannot be read: ")


# Columns


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"body": "x", "id": 1}', "no column 'text' (available: 'body', 'id'); name the one to read: column: …"),
        ('{"txt": "x"}', "no column 'text' (available: 'txt'); did you mean 'txt'?"),
        ("{}", "no column 'text' (available: none)"),
    ],
)
def test_a_first_row_without_the_column_is_a_mistake(tmp_path: Path, line: str, text: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{line}\n{{"text": "fine"}}\n')
    assert message(lambda: read(path)) == f"{path}:1: {text}"


def test_a_later_row_without_the_column_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"body": "x"}\n{"text": ""}\n{"text": "two"}\n')
    tally = Tally()
    assert [passage.content for passage in passages(TextSource(path=str(path)), tally=tally)] == ["one", "two"]
    assert tally == Tally(read=4, skipped={"without the column": 1, "empty": 1})


HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize("column", ["messages", "conversations", "text"])
def test_the_column_of_conversations_need_not_be_named(tmp_path: Path, column: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"id": "text", column: HELLO}) + "\n")
    assert read(path) == [tuple(HELLO)]
    assert read(path, column) == [tuple(HELLO)]


def test_text_goes_before_messages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": HELLO, "text": "plain"}) + "\n")
    assert read(path) == ["plain"]
    assert read(path, "messages") == [tuple(HELLO)]


def test_prompts_and_completions(tmp_path: Path) -> None:
    rows = [{"q": "2 + 2?", "a": "4"}, {"q": " ", "a": "x"}, {"q": "x", "a": None}, {"q": "x"}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    tally = Tally()
    (found,) = passages(TextSource(path=str(path), prompt="q", completion="a"), tally=tally)
    assert found.content == ({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"})
    assert tally == Tally(read=4, skipped={"empty": 2, "without the column": 1})
    source = TextSource(path=str(path), prompt="q", completion="answer")
    assert message(lambda: list(texts(source))) == f"{path}:1: no column 'answer' (available: 'q', 'a')"
    plain = write(tmp_path / "a.txt", "x")
    assert (
        message(lambda: list(texts(TextSource(path=str(plain), prompt="q", completion="a")))) == f"{plain}: a .txt file has no column 'q'"
    )


def test_conversations_in_parquet(tmp_path: Path) -> None:
    """A struct has all keys in every row: those without a value are no keys of the message."""
    import pyarrow
    from pyarrow import parquet

    called = [{"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "5"}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "messages": [HELLO, called, []]}), path)
    tally = Tally()
    found = [passage.content for passage in passages(TextSource(path=str(path)), tally=tally)]
    assert found == [tuple(HELLO), tuple(called)]
    assert tally == Tally(read=3, skipped={"empty": 1})


# Counting


def test_a_source_that_gives_nothing_says_why() -> None:
    tally = Tally(read=5)
    for reason in ("empty", "too short", "empty"):
        tally.skip(reason)
    hint = "lower min_length or use longer texts"
    assert str(tally.nothing()) == f"the calibration text gives no sample: of 5 documents 2 empty, 1 too short; {hint}"
    refused = Tally("a.jsonl", read=2)
    refused.skip("refused by the chat template", "a.jsonl:1: roles must alternate")
    refused.skip("refused by the chat template", "a.jsonl:2: something else")
    told = "a.jsonl gives no sample: of 2 documents 2 refused by the chat template; a.jsonl:1: roles must alternate"
    assert str(refused.nothing()) == told
    assert str(Tally(read=1, skipped={"empty": 1}).nothing()) == "the calibration text gives no tokens"


def test_a_stream_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Iterator[dict[str, Any]]:
        while True:
            yield {"text": ""}

    monkeypatch.setattr(module, "PATIENCE", 50)
    monkeypatch.setattr(datasets, "load_dataset", Loader(rows))
    assert message(lambda: list(texts(HubSource(dataset="some/set")))) == "the calibration text gives no tokens"
    patient = Tally(samples=1)
    for _ in range(60):
        patient.skip("empty")
    assert patient.skipped == {"empty": 60}
