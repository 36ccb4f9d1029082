"""Rows: what files and datasets hold, one mapping after the other, lazily. Knows nothing of what stands in them."""

from __future__ import annotations

import csv
import glob
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layercut.calibration import HubSource
from layercut.errors import CalibrationError, first_line


class Row(NamedTuple):
    """One row."""

    place: str
    """File and line, or dataset and number: for messages."""
    values: Mapping[str, Any]
    """What it holds, by column."""


def find_files(pattern: str) -> list[Path]:
    """The file of this name, or else the files that match, in the order of their names. Raises CalibrationError when there is none."""
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


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Row]:
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
            yield Row(f"{path}:{number}", row)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield Row(f"{path}:{reader.line_num}", row)
        except csv.Error as error:
            hint = "long texts belong in .jsonl or .parquet" if "field limit" in str(error) else None
            raise CalibrationError(str(error), where=f"{path}:{reader.reader.line_num}", hint=hint) from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            wanted = [column for column in columns if column in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=256, columns=wanted or None):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"cannot be read as parquet: {first_line(error)}", where=path) from None


ROWS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
"""How a file is read, by its suffix; `columns` are those that are wanted, if they are there. Raises CalibrationError on what is damaged."""


def hub_rows(source: HubSource) -> Iterator[Row]:
    """Rows of a Hub dataset. Whatever `datasets` raises becomes one line: it has no base class of its own."""
    import datasets

    try:
        rows = iter(
            datasets.load_dataset(
                source.dataset,
                source.name,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
        )
    except Exception as error:
        raise _unreachable(source, error) from None
    for number in itertools.count(1):
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreachable(source, error) from None
        if row is None:
            return
        yield Row(f"{source.dataset}: row {number}", row)


def _unreachable(source: HubSource, error: Exception) -> CalibrationError:
    hint = "check the name, the split and the network, or use local files: {source: text, path: ...}"
    return CalibrationError(f"the dataset cannot be read: {first_line(error)}", where=source.dataset, hint=hint)
