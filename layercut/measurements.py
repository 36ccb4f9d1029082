"""Measurements that were made before, on the disk: the same models, tokens and settings need no second pass.

An entry is one JSON file named by a sha256 over everything that the numbers depend on. It holds tables only, of every metric that was
measured so far; floats are written so that they read back the same. What cannot be read, or does not fit, counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layercut.checkpoint import Checkpoint
from layercut.plan import Measurement, Table

FOLDER = "measurements"
MAX_ENTRY = 32 << 20
"""Bytes of an entry at most; larger ones are neither written nor read."""
MAX_BYTES = 256 << 20
"""Bytes of all entries at most; the oldest go first."""


class Measurements:
    """The measurements below a cache folder. No failure of the disk stops a run: it measures again."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER

    def find(self, key: str, depths: Mapping[str, int]) -> Measurement | None:
        """What was measured under this key, between models of these depths."""
        path = self._folder / f"{key}.json"
        try:
            with path.open("rb") as file:
                data = file.read(MAX_ENTRY + 1)
            found = None if len(data) > MAX_ENTRY else Measurement.model_validate_json(data)
        except (OSError, ValidationError, ValueError, RecursionError):
            return None
        if found is None or found.samples < 1 or not all(_fits(table, depths) for table in found.tables):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the oldest are those that were not asked for
        return found

    def keep(self, key: str, measurement: Measurement) -> None:
        """Write an entry, whole or not at all, in the place of one that is there."""
        data = measurement.model_dump_json().encode()
        if len(data) > MAX_ENTRY:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=".writing-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(name).replace(self._folder / f"{key}.json")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self._evict()

    def _evict(self) -> None:
        """Remove the entries that were not used for longest, until the rest is small enough; what a killed process left goes too."""
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, path.name, stat.st_size))
        room = MAX_BYTES
        for _, name, size in sorted(found, reverse=True):
            room -= size
            if room < 0:
                with contextlib.suppress(OSError):
                    (self._folder / name).unlink()


def key_of(models: Mapping[str, Checkpoint], sequences: Iterable[Sequence[int]], settings: Mapping[str, Any]) -> str:
    """The name of an entry: over the models with their weights, the tokens of every sample, and all settings that change a number.

    Weights are told apart without reading them: by the commit of a Hub model; by place, size, inode and times of the files of a folder.
    """
    tokens = hashlib.sha256()
    for ids in sequences:
        tokens.update(len(ids).to_bytes(8, "little") + array("q", ids).tobytes())
    parts = [[[alias, model.digest, _weights(model)] for alias, model in models.items()], tokens.hexdigest(), dict(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def with_tables(old: Measurement | None, new: Measurement) -> Measurement:
    """The newer measurement with the tables of the older one that it lacks."""
    if old is None:
        return new
    have = {table.metric for table in new.tables}
    return new.model_copy(update={"tables": (*(table for table in old.tables if table.metric not in have), *new.tables)})


def only(measurement: Measurement, labels: Sequence[str]) -> Measurement:
    """The measurement with the tables of these metrics, in this order."""
    tables = tuple(table for label in labels for table in measurement.tables if table.metric == label)
    return measurement.model_copy(update={"tables": tables})


def missing(measurement: Measurement | None, labels: Collection[str]) -> list[str]:
    """The metrics that were not measured yet."""
    have = set() if measurement is None else {table.metric for table in measurement.tables}
    return [label for label in labels if label not in have]


def _fits(table: Table, depths: Mapping[str, int]) -> bool:
    """Whether a table has the shape that these models give."""
    rows, columns = depths.get(table.a, -2) + 1, depths.get(table.b, -2) + 1
    return all(len(matrix) == rows and all(len(row) == columns for row in matrix) for matrix in (table.mean, table.stderr))


def _weights(model: Checkpoint) -> list[Any]:
    found: list[Any] = [model.revision]
    for name in model.files:
        path = model.folder / name
        stat = path.stat()
        found.append([name, str(path.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])
    return found
