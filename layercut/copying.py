"""Copies byte ranges from file to file, inside the kernel where that is possible; knows nothing of tensors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from layercut.errors import CheckpointError, OutputError
from layercut.ways import ANY, BUFFER, UNSUPPORTED, WHOLE, Way, advise, by_clone

# Bytes asked of the kernel at once: large enough to cost nothing, small enough for the disk to begin early, and for progress and Ctrl-C.
STEP = 64 << 20
# A direct write is waited for: fewer bytes than this are left to the page cache, which writes many at once.
DIRECT = 1 << 20


class Range(NamedTuple):
    """Bytes `begin` to `end` (half-open) of a file."""

    path: Path
    begin: int
    end: int


def coalesce(ranges: Iterable[Range]) -> Iterator[Range]:
    """The same bytes in the same order, with neighbours joined: what lies together, often a whole slice, is then one copy."""
    joined: Range | None = None
    for part in ranges:
        if joined is not None and (part.path, part.begin) == (joined.path, joined.end):
            joined = joined._replace(end=part.end)
            continue
        if joined is not None:
            yield joined
        joined = part
    if joined is not None:
        yield joined


def copy_range(
    source: int,
    target: int,
    source_offset: int,
    target_offset: int,
    length: int,
    advance: Callable[[int], object] | None = None,
    durable: bool = True,
) -> None:
    """Copy `length` bytes between two file descriptors, from `source_offset` to `target_offset`.

    Whole blocks of the target are shared where the file system can, or, with `durable`, written to the disk straight from the pages of
    the source. All else, and what these refuse, goes by copy_file_range, then sendfile, then pread and pwrite; with `durable` the disk
    begins at once, for an fsync that comes. `advance` is called with the number of bytes after every step. The position of `target` is
    undefined afterwards.

    Raises CheckpointError when the source ends early, and OSError (no space, input/output error) as the system gave it.
    """
    block = os.fstatvfs(target).f_bsize
    usable = [way for way in WHOLE if block > 0 and _worth(way, (source_offset - target_offset) % block, length, durable)] + list(ANY)
    done = 0
    while done < length:
        step = _step(target_offset + done, length - done, block if usable[0] in WHOLE else 1)
        whole = block > 0 and (target_offset + done) % block == step % block == 0
        way = next(way for way in usable if whole or way not in WHOLE)
        try:
            count = way(source, target, source_offset + done, target_offset + done, step)
        except OSError as error:
            if way is ANY[-1] or error.errno not in UNSUPPORTED:
                raise
            count = 0
        if count == 0:
            # Not this way, or the end of the source, or a file system whose kernel copy gives nothing: only pread tells them apart.
            if way is ANY[-1]:
                break
            usable.remove(way)
            continue
        if durable and way not in WHOLE:
            # What is dirty goes to the disk while the next bytes are copied, not all of it in the fsync at the end.
            advise(target, target_offset + done, count, "POSIX_FADV_DONTNEED")
        done += count
        if advance is not None:
            advance(count)
    if done < length:
        raise CheckpointError(f"ended early: {length - done} bytes are missing from byte {source_offset + done} on")


def _worth(way: Way, out_of_step: int, length: int, durable: bool) -> bool:
    """Whether a way for whole blocks can be of use: no block is shared that stands elsewhere in its source."""
    return out_of_step == 0 if way is by_clone else durable and length >= DIRECT


def _step(offset: int, rest: int, block: int) -> int:
    """Bytes of the next step: up to the end of the block of the target that `offset` lies in, then whole blocks, then what remains."""
    if offset % block:
        return min(-offset % block, rest)
    return min(STEP - STEP % block, rest - rest % block) or rest


class SourceFiles:
    """Files to copy from, each opened once, for reading only, by any number of threads. They must stay as they are until the end."""

    def __init__(self, stack: ExitStack, durable: bool = True) -> None:
        self._stack = stack
        self._durable = durable
        self._opening = Lock()
        self._open: dict[Path, tuple[int, os.stat_result]] = {}

    def copy(self, part: Range, target: int, offset: int, advance: Callable[[int], object] | None = None) -> None:
        """Copy one range to `offset` of the descriptor `target`. Raises CheckpointError or OSError, naming the source file."""
        source = self._descriptor(part.path)
        try:
            copy_range(source, target, part.begin, offset, part.end - part.begin, advance, self._durable)
        except CheckpointError as error:
            raise CheckpointError(error.message, where=part.path, hint="plan again") from None
        except OSError as error:
            # The system does not say which of the two files is at fault.
            raise OSError(error.errno, f"{error.strerror} (copying from {part.path})") from error

    def read(self, part: Range) -> bytearray:
        """The bytes of one range, in memory that may be written to. Raises CheckpointError, naming the source file."""
        source, size = self._descriptor(part.path), part.end - part.begin
        data, done = bytearray(size), 0
        while done < size:
            try:
                piece = os.pread(source, min(BUFFER, size - done), part.begin + done)
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=part.path) from error
            if not piece:
                message = f"ended early: {size - done} bytes are missing from byte {part.begin + done} on"
                raise CheckpointError(message, where=part.path, hint="plan again")
            data[done : done + len(piece)] = piece
            done += len(piece)
        return data

    def check_unchanged(self) -> None:
        """Raises CheckpointError when a file was written to since it was opened."""
        for path, (source, seen) in self._open.items():
            now = os.fstat(source)
            if (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
                raise CheckpointError("was changed while it was copied", where=path, hint="run again when nothing writes to it")

    def _descriptor(self, path: Path) -> int:
        with self._opening:
            if path not in self._open:
                try:
                    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
                self._stack.callback(os.close, source)
                self._open[path] = (source, os.fstat(source))
            return self._open[path][0]


@contextmanager
def new_file(path: Path, shown: Path, durable: bool = True) -> Iterator[int]:
    """Descriptor of a file that did not exist; afterwards it is on the disk if `durable`, with the same mode whatever the umask.

    Raises OutputError for everything that goes wrong inside, naming the file as `shown`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(target, 0o644)
            yield target
            if durable:
                os.fsync(target)
        finally:
            os.close(target)
    except OSError as error:
        raise explained(error, shown) from error


def write_bytes(target: int, data: bytes) -> None:
    """Write all of `data` at the position of the descriptor."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]


def sync(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def explained(error: OSError, where: Path | str) -> OutputError:
    """What the system said, as one line about the place that was written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OutputError(f"cannot be written: {error.strerror or error}", where=where, hint="free some space and run again" if full else None)
