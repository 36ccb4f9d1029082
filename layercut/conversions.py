"""Checkpoint folders that were made from other formats once, and are kept. Knows no format."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from layercut.errors import CheckpointError

BLOCK = 1 << 22
STAGING = ".converting-"


def converted(root: Path, title: str, files: Mapping[str, Path], make: Callable[[Path, Path], Path], where: Path) -> Path:
    """The folder below `root` that `make` made from `files`; made when it is not there yet.

    The folder is named after `title` and the sha256 of the files. Files whose place, size, inode and times are known are not read
    again. `make(staging, folder)` works in a folder beside the final one and returns what is to be renamed to it, so that a folder
    is complete or does not exist. Raises CheckpointError, also when `files` change meanwhile.
    """
    try:
        stamp = _stamp(files)
        note = root / "known" / stamp
        known = _recall(root, note)
        if known is not None:
            return known
        folder = root / f"{title[:100]}-{content(files)[:16]}"
        if not folder.is_dir():
            _make(folder, make)
            if _stamp(files) != stamp:
                shutil.rmtree(folder)
                raise CheckpointError("changed while it was read", where=where)
        _remember(folder, note)
        return folder
    except OSError as error:
        raise CheckpointError(f"cannot be converted: {error.strerror or error}", where=error.filename or where) from None


def announce(name: str, folder: Path) -> None:
    """Tell the user, once, what takes so long and where it goes."""
    print(f"converting {name} to safetensors once, into {folder}", file=sys.stderr)


def content(files: Mapping[str, Path]) -> str:
    """sha256 of one file, or over the names and digests of several."""
    digests = {name: _sha256(path) for name, path in sorted(files.items())}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _stamp(files: Mapping[str, Path]) -> str:
    """Tells files from other versions of themselves without reading them."""
    parts = []
    for name, path in sorted(files.items()):
        found = path.stat()
        parts.append([name, str(path.resolve()), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _recall(root: Path, note: Path) -> Path | None:
    """The folder that was made from these files before, if it is still there."""
    if not note.is_file():
        return None
    name = note.read_text(encoding="utf-8")
    folder = root / name
    return folder if name and folder.parent == root and folder.is_dir() else None


def _remember(folder: Path, note: Path) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=note.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(folder.name)
    Path(name).replace(note)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _make(folder: Path, make: Callable[[Path, Path], Path]) -> None:
    """Convert beside `folder`, and rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging, lock = _staging(folder.parent)
    try:
        target = make(staging, folder)
        with contextlib.suppress(OSError):  # another process was first, with the same bytes
            target.rename(folder)
        if not folder.is_dir():
            raise CheckpointError("the converted model cannot be put in its place", where=folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def _staging(root: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock. What a killed conversion left, which nobody holds, goes."""
    with contextlib.closing(_Held(root)):  # or a folder that is made there now, and not locked yet, would go too
        for left in sorted(root.glob(f"{STAGING}*")):
            with contextlib.suppress(OSError), contextlib.closing(_Held(left, wait=False)):
                shutil.rmtree(left)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=root))
        return staging, _Held(staging).descriptor


class _Held:
    """A folder that this process holds until `close`. Where a file system has no locks, nothing is held."""

    def __init__(self, folder: Path, *, wait: bool = True) -> None:
        self.descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                self.close()
                raise

    def close(self) -> None:
        os.close(self.descriptor)
