"""Fits: files that hold one fitted linear map each, named by their content and kept in layercut's cache. Knows nothing of models."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from layercut.caches import cache_folder
from layercut.copying import Range
from layercut.errors import OutputError
from layercut.header import encode_header

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "fits"
NAME = "map"
DTYPE, WIDTH = "F32", 4
MAX_BYTES = 16 << 30
"""Bytes of all fits at most; those that were not asked for longest go first."""
PIECE = 1 << 20


def path_of(digest: str) -> Path:
    """Where the map of this sha256 is kept."""
    return cache_folder() / FOLDER / f"{digest}.safetensors"


def span_of(path: Path, size: int) -> Range:
    """The bytes of a map of size x size elements in its file."""
    start = len(_header(size))
    return Range(path, start, start + WIDTH * size * size)


def keep_map(data: bytes, size: int) -> str:
    """Write a map (size x size float32, row after row) whole or not at all, and give the sha256 of its file. Raises OutputError."""
    whole = _header(size) + data
    digest = hashlib.sha256(whole).hexdigest()
    path = path_of(digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(whole)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _evict(path)
    except OSError as error:
        hint = "set LAYERCUT_CACHE to a folder that can be written to"
        raise OutputError(f"the fitted map cannot be kept: {error.strerror or error}", where=path, hint=hint) from None
    return digest


def map_of(digest: str, size: int) -> Tensor:
    """A map from the cache, (size, size) of float32. Raises OutputError when it is not there."""
    import torch

    path = path_of(digest)
    fault = fault_of(path, digest, size)
    if fault is not None:
        raise OutputError(f"the map that was fitted {fault}", where=path, hint="run again")
    span = span_of(path, size)
    return torch.frombuffer(bytearray(path.read_bytes()[span.begin : span.end]), dtype=torch.float32).reshape(size, size)


def fault_of(path: Path, digest: str, size: int) -> str | None:
    """What keeps a file from being the map of this sha256 and size; None when it is that. Reads it whole, a piece at a time."""
    found, count = hashlib.sha256(), 0
    start = _header(size)
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # to open a pipe would wait for its other end
            return "is no regular file"
        if state.st_size != len(start) + WIDTH * size * size:
            return "has another length than the plan says"
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                if count == 0 and not piece.startswith(start[:PIECE]):
                    return "is not the file that was fitted"
                found.update(piece)
                count += len(piece)
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    with contextlib.suppress(OSError):
        os.utime(path)  # the first to go are those that were not asked for
    return None if found.hexdigest() == digest else "was changed since the map was fitted"


def _header(size: int) -> bytes:
    return encode_header([(NAME, DTYPE, (size, size))], {})


def _evict(newest: Path) -> None:
    """Remove the fits that were not used for longest, until the rest is small enough; what a killed process left goes too."""
    found = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(OSError):
            state = path.stat()
            found.append((path == newest, state.st_mtime_ns, path.name, state.st_size))
    room = MAX_BYTES
    for last, _, name, size in sorted(found, reverse=True):
        room -= size
        if room < 0 and not last:
            with contextlib.suppress(OSError):
                (newest.parent / name).unlink()
