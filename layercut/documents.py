"""Documents: what a source of text holds, one after the other, and a tally of what was read and skipped. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, NamedTuple

from layercut.calibration import BuiltinSource, Columned, Source, TextSource
from layercut.conversations import Conversation, exchange, is_conversation, messages
from layercut.errors import CalibrationError, did_you_mean
from layercut.rows import ROWS, Row, find_files, hub_rows

PIECE = 1 << 16
"""Characters of plain text that are read at a time."""
COLUMNS = ("text", "messages", "conversations")
"""Columns that hold the document when none is named."""
PATIENCE = 10_000
"""Documents that are read in vain before a source is given up: a stream may have no end."""

# Why a document is not used.
EMPTY = "empty"
NO_COLUMN = "without the column"
SHORT = "too short"
NO_ANSWER = "without an assistant turn"
CUT_OFF = "with the assistant turn beyond max_length"
REFUSED = "refused by the chat template"


@dataclass
class Tally:
    """Counts what was read of one source, and what became of it."""

    title: str = "the calibration text"
    """What the source is called in messages."""
    read: int = 0
    """Documents that were looked at; a plain text file is one."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents, and the only sample of a running text, that were not used, by the reason."""
    samples: int = 0
    """Token sequences that were made."""
    example: str | None = None
    """What was wrong with the first document that was skipped, where that is more than the reason."""

    def skip(self, reason: str, example: str | None = None) -> None:
        """Count a document that is not used. Raises CalibrationError when none of very many is."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.example = self.example or example
        if not self.samples and sum(self.skipped.values()) >= PATIENCE:
            raise self.nothing()

    def nothing(self) -> CalibrationError:
        """The error to raise when a source gives no sample."""
        if set(self.skipped) <= {EMPTY}:
            return CalibrationError(f"{self.title} gives no tokens")
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        hint = self.example or ("lower min_length or use longer texts" if SHORT in self.skipped else None)
        return CalibrationError(f"{self.title} gives no sample: of {self.read} documents {reasons}", hint=hint)


class Passage(NamedTuple):
    """A piece of text: a document of its own, or the next part of a running text."""

    content: str | Conversation
    stream: str | None = None
    """Name of the running text that this is a part of; None for a document."""
    place: str | None = None
    """Where a document stands, for messages."""


def passages(source: Source, held_out: bool = False, tally: Tally | None = None) -> Iterator[Passage]:
    """The text, lazily, blank documents left out. `held_out` takes the other part of the built-in text; other sources have one part.

    Raises CalibrationError on anything unreadable.
    """
    tally = Tally() if tally is None else tally
    if isinstance(source, BuiltinSource):
        name = "held_out.txt" if held_out else "calibration.txt"
        with (resources.files("layercut") / "data" / name).open(encoding="utf-8") as file:
            yield from _running(file, name, tally)
    elif isinstance(source, TextSource):
        for path in find_files(source.path):
            yield from _file(path, source, tally)
    else:
        yield from _documents(hub_rows(source), source, tally)


def _file(path: Path, source: Columned, tally: Tally) -> Iterator[Passage]:
    """The passages of one file, read as its suffix says."""
    suffix = path.suffix.lower()
    if suffix not in (".txt", *ROWS):
        known = ", ".join([".txt", *ROWS])
        raise CalibrationError(f"unknown kind of text file '{suffix}'", where=path, hint=f"known are {known}")
    if suffix == ".txt" and source.columns:
        raise CalibrationError(f"a .txt file has no column '{source.columns[0]}'", where=path)
    held = False
    try:
        if suffix == ".txt":
            with path.open(encoding="utf-8-sig") as file:
                for passage in _running(file, str(path), tally):
                    held = held or bool(str(passage.content).strip())
                    yield passage
        else:
            for passage in _documents(ROWS[suffix](path, source.columns or COLUMNS), source, tally):
                held = True
                yield passage
    except UnicodeDecodeError as error:
        raise CalibrationError(f"not UTF-8 text: {error.reason}", where=path, hint="save it as UTF-8") from None
    except OSError as error:
        raise CalibrationError(error.strerror or str(error), where=path) from None
    if not held:
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


def _documents(rows: Iterable[Row], source: Columned, tally: Tally) -> Iterator[Passage]:
    """One document a row. Null and blank ones are skipped, and so are rows without the column, unless the first is one."""
    columns = source.columns
    for number, row in enumerate(rows):
        columns = columns or next(((name,) for name in COLUMNS if name in row.values), COLUMNS[:1])
        missing = next((column for column in columns if column not in row.values), None)
        if missing is not None and number == 0:
            raise _no_column(missing, row)
        tally.read += 1
        if missing is not None:
            tally.skip(NO_COLUMN)
            continue
        values = [row.values[column] for column in columns]
        if any(value is None or value == [] or (isinstance(value, str) and not value.strip()) for value in values):
            tally.skip(EMPTY)
            continue
        yield Passage(_content(row, columns), None, row.place)


def _content(row: Row, columns: tuple[str, ...]) -> str | Conversation:
    """The text or the conversation of a row."""
    value = row.values[columns[0]]
    if len(columns) == 2:
        return exchange(value, row.values[columns[1]], columns, row.place)
    if isinstance(value, str):
        return value
    if is_conversation(value):
        return messages(value, row.place)
    wanted = "text or messages" if isinstance(value, list | tuple) else "text"
    raise CalibrationError(f"column '{columns[0]}' holds {type(value).__name__}, not {wanted}", where=row.place)


def _no_column(column: str, row: Row) -> CalibrationError:
    columns = ", ".join(f"'{key}'" for key in row.values) or "none"
    hint = did_you_mean(column, [key for key in row.values if isinstance(key, str)])
    if len(row.values) == 1 and ";" in columns:
        hint = "columns stand between commas, not ';'"
    elif hint is None and row.values and column == COLUMNS[0]:
        hint = "name the one to read: column: …"
    return CalibrationError(f"no column '{column}' (available: {columns})", where=row.place, hint=hint)
