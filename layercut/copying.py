"""Copies byte ranges from file to file, inside the kernel where that is possible; knows nothing of tensors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from layercut.errors import CheckpointError, OutputError

# Bytes asked of the kernel at once: large enough to cost nothing, small enough for the disk to begin early.
STEP = 64 << 20
# The same of whole blocks, which may be shared and then cost nothing; progress and Ctrl-C still get a turn where they are copied.
WHOLE_STEP = 64 << 20
# Bytes held in memory when the kernel cannot copy by itself.
BUFFER = 1 << 20

# The kernel or file system says "not this way" (as opposed to "this went wrong"): another file system, a FUSE or network
# mount, an old kernel, a target opened for appending, a seccomp filter, sendfile that only knows sockets (macOS).
_UNSUPPORTED = frozenset(
    {
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.EBADF,
        errno.EPERM,
        errno.ENOTSOCK,
        errno.ETXTBSY,
        errno.EOVERFLOW,
    }
)


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

    Tries copy_file_range (which shares blocks on file systems that can), then sendfile, then pread and pwrite. `advance`
    is called with the number of bytes after every step. The position of `target` is undefined afterwards. Where both offsets
    are at the same place in their block, whole blocks are asked for on their own, for only those can be shared. With `durable` the disk
    begins at once, for an fsync that comes.

    Raises CheckpointError when the source ends early, and OSError (no space, input/output error) as the system gave it.
    """
    block = os.fstatvfs(target).f_bsize
    alike = block > 0 and (source_offset - target_offset) % block == 0
    done = 0
    for way in (_by_copy_file_range, _by_sendfile, _by_read_and_write):
        while done < length:
            try:
                step = _step(source_offset + done, length - done, block) if alike else min(STEP, length - done)
                count = way(source, target, source_offset + done, target_offset + done, step)
            except OSError as error:
                if way is _by_read_and_write or error.errno not in _UNSUPPORTED:
                    raise
                break
            if count == 0:
                # The end of the source, or a file system whose kernel copy gives nothing: only pread tells them apart.
                break
            if durable:
                _begin_writing(target, target_offset + done, count)
            done += count
            if advance is not None:
                advance(count)
    if done < length:
        raise CheckpointError(f"ended early: {length - done} bytes are missing from byte {source_offset + done} on")


def _begin_writing(target: int, offset: int, count: int) -> None:
    """Have these bytes go to the disk while the next ones are copied, not all of them in the fsync at the end. A hint, no more."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(target, offset, count, os.POSIX_FADV_DONTNEED)  # it writes what is dirty, and drops what was not


def _step(offset: int, rest: int, block: int) -> int:
    """Bytes of the next step: up to the end of the block that `offset` lies in, then whole blocks, then what remains."""
    if offset % block:
        return min(-offset % block, rest)
    return min(WHOLE_STEP, rest - rest % block) or rest


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


def write_at(target: int, data: bytes | bytearray, offset: int) -> None:
    """Write all of `data` at `offset`, whatever the position of the descriptor."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(target, rest, offset)
        rest, offset = rest[count:], offset + count


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


def _by_copy_file_range(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """One step by copy_file_range(2), Linux only."""
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.copy_file_range(source, target, count, offset_src=source_offset, offset_dst=target_offset)


def _by_sendfile(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """One step by sendfile(2), which writes at the position of the target."""
    if not hasattr(os, "sendfile"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    os.lseek(target, target_offset, os.SEEK_SET)
    return os.sendfile(target, source, source_offset, count)


def _by_read_and_write(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """One step through memory, at most BUFFER bytes."""
    chunk = os.pread(source, min(BUFFER, count), source_offset)
    write_at(target, chunk, target_offset)
    return len(chunk)
