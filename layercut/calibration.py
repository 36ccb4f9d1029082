"""Calibration text: where it comes from and how it is cut into samples. Knows no tokenizer beyond a function.

One document is one sample, truncated to `max_length` tokens. Plain text (`.txt` files and the built-in text) has no document
boundaries: each file is cut into consecutive windows of `max_length` tokens, and what is left at its end is dropped unless
the file gave no full window.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from random import Random
from typing import IO, Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, StrictBool, Tag
from pydantic_core import PydanticCustomError, PydanticKnownError

from layercut.errors import CalibrationError, did_you_mean
from layercut.record import Record

Item = TypeVar("Item")

BUFFER = 1024
"""Samples that a shuffle chooses from."""
PIECE = 1 << 16
"""Characters of plain text that are read at a time."""


def _check_bos(value: object) -> object:
    """One message instead of one for each kind of value."""
    if not isinstance(value, bool) and value != "auto":
        raise PydanticCustomError("bos", "bos must be auto, true or false")
    return value


class Auto(Record):
    """As many samples as make the choice sure: text is taken in looks, each as long as all before it."""

    least: int = Field(8, ge=2)
    """Samples at the first look."""
    most: int = Field(128, ge=2)
    """Samples after which the choice is made, settled or not."""


def _as_samples(value: object) -> object:
    """`auto` stands for its defaults; one message instead of one for each kind of value."""
    if value == "auto":
        return Auto()
    if isinstance(value, bool) or not isinstance(value, int | Auto | Mapping):
        raise PydanticCustomError("samples", "samples must be a number, auto, or a mapping of least and most")
    if isinstance(value, int) and value < 1:
        raise PydanticKnownError("greater_than_equal", {"ge": 1})
    return value


def _kind(value: object) -> str:
    return "auto" if isinstance(value, Auto | Mapping) else "number"


class CalibrationBase(Record):
    """What all sources of text have in common."""

    samples: Annotated[
        Annotated[Annotated[int, Tag("number")] | Annotated[Auto, Tag("auto")], Discriminator(_kind)],
        BeforeValidator(_as_samples, json_schema_input_type=Annotated[int, Field(ge=1)] | Literal["auto"] | Auto),
    ] = 128
    """Token sequences that are used at most. `auto` takes text until the choice is settled, and says how sure it is: 8 to 128 samples, or
    `{least: 16, most: 512}`."""
    max_length: int = Field(512, ge=2)
    """Tokens of a sample at most, a BOS token included."""
    min_length: int = Field(1, ge=1)
    """Tokens of a sample at least, a BOS token included; shorter documents are skipped."""
    seed: int | None = None
    """Shuffles the samples, through a buffer of 1,024 so that nothing is read to its end; without it they come in the order of the text."""
    batch_size: int = Field(8, ge=1)
    """Samples that run through the model at once; changes speed and memory, not results."""
    bos: Annotated[Literal["auto"] | StrictBool, BeforeValidator(_check_bos)] = "auto"
    """Whether each sample starts with the BOS token: auto does what the tokenizer does by default."""

    @property
    def most(self) -> int:
        """Samples at most."""
        return self.samples.most if isinstance(self.samples, Auto) else self.samples


class BuiltinCalibration(CalibrationBase):
    """English prose that comes with layercut: 150 kB of State of the Union addresses (CC0), and 50 kB held out for perplexity."""

    source: Literal["builtin"] = "builtin"
    """The text that comes with layercut."""


class TextCalibration(CalibrationBase):
    """Local files: .txt (one running text), .jsonl, .csv and .parquet (one document a row)."""

    source: Literal["text"] = "text"
    """Local files."""
    path: str = Field(min_length=1)
    """A file, or a pattern such as `texts/*.jsonl`; files are read in the order of their names."""
    column: str | None = None
    """Column that holds the text; without it, `text`."""


class HubCalibration(CalibrationBase):
    """A dataset of the Hugging Face Hub."""

    source: Literal["hub"] = "hub"
    """A dataset of the Hugging Face Hub."""
    dataset: str = Field(min_length=1)
    """Name of the dataset, for example `allenai/c4`."""
    name: str | None = None
    """Configuration of the dataset, for example `en`."""
    split: str = "train"
    """Split that is read, for example `validation`."""
    column: str = "text"
    """Column that holds the text."""
    revision: str | None = None
    """Branch, tag or commit of the dataset."""
    streaming: bool = True
    """Read rows as they are needed instead of downloading the split first."""


Calibration: TypeAlias = Annotated[BuiltinCalibration | TextCalibration | HubCalibration, Field(discriminator="source")]
"""The `calibration:` mapping of a recipe."""


@dataclass
class Tally:
    """Counts what was read."""

    read: int = 0
    """Documents that hold text; a plain text file is one document."""
    skipped: int = 0
    """Documents that are blank, or whose text gives no tokens."""
    short: int = 0
    """Documents, or whole running texts, of fewer tokens than `min_length`."""


class Passage(NamedTuple):
    """A piece of text: a document of its own, or the next part of a running text."""

    text: str
    stream: str | None
    """Name of the running text that this is a part of; None for a document."""


def passages(calibration: Calibration, held_out: bool = False, tally: Tally | None = None) -> Iterator[Passage]:
    """The text, lazily, blank documents left out. `held_out` takes the other part of the built-in text; other sources have one part."""
    tally = Tally() if tally is None else tally
    if isinstance(calibration, BuiltinCalibration):
        name = "held_out.txt" if held_out else "calibration.txt"
        with (resources.files("layercut") / "data" / name).open(encoding="utf-8") as file:
            yield from _running(file, name, tally)
    elif isinstance(calibration, TextCalibration):
        for path in _matches(calibration.path):
            yield from _file(path, calibration.column, tally)
    else:
        yield from _documents(_hub(calibration), calibration.column, tally)


def documents(calibration: Calibration, held_out: bool = False) -> Iterator[str]:
    """The texts, lazily: documents, and the parts of running texts in order. Raises CalibrationError on anything unreadable."""
    return (passage.text for passage in passages(calibration, held_out))


def samples(
    texts: Iterable[Passage],
    encode: Callable[[str], list[int]],
    prefix: list[int],
    max_length: int,
    tally: Tally,
    min_length: int = 1,
) -> Iterator[list[int]]:
    """Token sequences of `min_length` to `max_length` tokens, lazily; `encode` adds no special tokens, `prefix` starts each sample."""
    room = max_length - len(prefix)
    if min_length > max_length:
        raise CalibrationError(f"min_length {min_length} is more than max_length {max_length}")
    if room < 1:
        raise CalibrationError(f"max_length {max_length} leaves no room after {len(prefix)} special tokens")
    for stream, group in itertools.groupby(texts, key=lambda passage: passage.stream):
        encoded = (encode(passage.text) for passage in group)
        if stream is not None:
            for window in windows(encoded, room):
                if len(prefix) + len(window) < min_length:
                    tally.short += 1
                else:
                    yield [*prefix, *window]
            continue
        for ids in encoded:
            if not ids:
                tally.skipped += 1
            elif len(prefix) + len(ids) < min_length:
                tally.short += 1
            else:
                yield [*prefix, *ids[:room]]


def shuffled(items: Iterable[Item], seed: int | None) -> Iterator[Item]:
    """The items in a seeded order, through a buffer: each comes from the next `BUFFER` ones. In their own order without a seed."""
    if seed is None:
        yield from items
        return
    random, buffer = Random(seed), list[Item]()
    for item in items:
        if len(buffer) < BUFFER:
            buffer.append(item)
            continue
        at = random.randrange(BUFFER)
        yield buffer[at]
        buffer[at] = item
    random.shuffle(buffer)
    yield from buffer


def windows(encoded: Iterable[list[int]], size: int) -> Iterator[list[int]]:
    """Consecutive windows of `size` tokens of a running text; a shorter rest is dropped unless it is all there is."""
    rest: list[int] = []
    full = False
    for ids in encoded:
        rest += ids
        for start in range(0, len(rest) - size + 1, size):
            full = True
            yield rest[start : start + size]
        rest = rest[len(rest) - len(rest) % size :]
    if rest and not full:
        yield rest


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise CalibrationError("this is a folder", where=pattern, hint="name a file, or a pattern such as folder/*.txt")
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - Path.glob takes no absolute pattern
    files = [match for match in found if match.is_file()]
    if not files:
        raise CalibrationError("no such file", where=pattern)
    return files


Row: TypeAlias = tuple[str, Mapping[str, Any]]
"""The place of a row in its file, for messages, and its columns."""


def _file(path: Path, column: str | None, tally: Tally) -> Iterator[Passage]:
    """The passages of one file, read as its suffix says."""
    suffix = path.suffix.lower()
    if suffix not in (".txt", *_ROWS):
        known = ", ".join([".txt", *_ROWS])
        raise CalibrationError(f"unknown kind of text file '{suffix}'", where=path, hint=f"known are {known}")
    if suffix == ".txt" and column is not None:
        raise CalibrationError(f"a .txt file has no column '{column}'", where=path)
    before = tally.read
    try:
        if suffix == ".txt":
            with path.open(encoding="utf-8-sig") as file:
                yield from _running(file, str(path), tally)
        else:
            yield from _documents(_ROWS[suffix](path, column or "text"), column or "text", tally)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"not UTF-8 text: {error.reason}", where=path) from None
    except OSError as error:
        raise CalibrationError(error.strerror or str(error), where=path) from None
    if tally.read == before:
        raise CalibrationError("the file holds no text", where=path)


def _running(file: IO[str], name: str, tally: Tally) -> Iterator[Passage]:
    """Plain text in parts, cut after a line, else before a space, so that words stay whole."""
    rest = ""
    found = False
    while block := file.read(PIECE):
        rest += block
        cut = rest.rfind("\n") + 1 or max(rest.rfind(" "), 0) or len(rest)
        part, rest = rest[:cut], rest[cut:]
        if not found and part.strip():
            found = True
            tally.read += 1
        yield Passage(part, name)
    if rest:
        tally.read += not found and bool(rest.strip())
        yield Passage(rest, name)


def _documents(rows: Iterable[Row], column: str, tally: Tally) -> Iterator[Passage]:
    """One document a row; null and blank ones are skipped."""
    for place, row in rows:
        if column not in row:
            columns = ", ".join(f"'{key}'" for key in row) or "none"
            hint = did_you_mean(column, [key for key in row if isinstance(key, str)])
            raise CalibrationError(f"no column '{column}' (available: {columns})", where=place, hint=hint)
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise CalibrationError(f"column '{column}' holds {type(text).__name__}, not text", where=place)
        if text is None or not text.strip():
            tally.skipped += 1
            continue
        tally.read += 1
        yield Passage(text, None)


def _jsonl(path: Path, column: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except (ValueError, RecursionError) as error:
                detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise CalibrationError(f"invalid JSON: {detail}", where=f"{path}:{number}") from None
            if not isinstance(row, dict):
                raise CalibrationError("a line must hold a JSON object", where=f"{path}:{number}")
            yield f"{path}:{number}", row


def _csv(path: Path, column: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            hint = "long texts belong in .jsonl or .parquet" if "field limit" in str(error) else None
            raise CalibrationError(str(error), where=f"{path}:{reader.reader.line_num}", hint=hint) from None


def _parquet(path: Path, column: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"cannot be read as parquet: {first_line(error)}", where=path) from None


def _hub(calibration: HubCalibration) -> Iterator[Row]:
    """Rows of a Hub dataset. Whatever `datasets` raises becomes one line: it has no base class of its own."""
    import datasets

    try:
        rows = iter(
            datasets.load_dataset(
                calibration.dataset,
                calibration.name,
                split=calibration.split,
                revision=calibration.revision,
                streaming=calibration.streaming,
            )
        )
    except Exception as error:
        raise _unreachable(calibration, error) from None
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreachable(calibration, error) from None
        if row is None:
            return
        yield f"{calibration.dataset}: row {number}", row


def _unreachable(calibration: HubCalibration, error: Exception) -> CalibrationError:
    hint = "check the name, the split and the network, or use local files: {source: text, path: ...}"
    return CalibrationError(f"the dataset cannot be read: {first_line(error)}", where=calibration.dataset, hint=hint)


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


_ROWS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
