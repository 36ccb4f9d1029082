"""Small files that are read whole: regular ones, of a length that honest ones have. Knows no format."""

from __future__ import annotations

import stat
from pathlib import Path

from layercut.errors import CheckpointError, LayercutError


def read_small(path: Path, limit: int, kind: type[LayercutError] = CheckpointError) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises OSError as the system gave it, and `kind` for what is longer, and for what is no regular file: a pipe may have nobody to
    write to it, a device may have no end.
    """
    found = path.stat()
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode):  # the system has the words for a folder
        with path.open("rb") as file:
            data = file.read(limit + 1) if found.st_size <= limit else b""
        if len(data) <= limit and found.st_size <= limit:
            return data
        raise kind(f"is longer than the {limit} bytes that are read of such a file", where=path)
    raise kind("not a regular file", where=path)
