"""Ways to copy bytes from file to file, each one step at a time: from sharing blocks down to reading and writing. Knows no file names.

Every way takes two descriptors, an offset in each and a number of bytes, and returns how many it copied, 0 at the end of the source. It
raises OSError as the system gave it; one of UNSUPPORTED says "not this way", all others "this went wrong".
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from contextlib import suppress

Way = Callable[[int, int, int, int, int], int]

# Bytes held in memory when the kernel cannot copy by itself.
BUFFER = 1 << 20
# Bytes of a source mapped at a time: enough for a disk to be busy, few enough for several files at once to count as little memory.
WINDOW = 2 << 20

# The kernel or file system says "not this way": another file system, a FUSE or network mount, an old kernel, a target opened for
# appending, a seccomp filter, sendfile that only knows sockets (macOS), a device that wants other alignment, a file that cannot be mapped.
UNSUPPORTED = frozenset(
    {
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOTTY,
        errno.ENODEV,
        errno.EBADF,
        errno.EPERM,
        errno.ENOTSOCK,
        errno.ETXTBSY,
        errno.EOVERFLOW,
        errno.EFAULT,
    }
)

# FICLONERANGE of linux/fs.h as numbered on x86 and Arm, and the struct file_clone_range that it reads.
_CLONE_RANGE, _CLONE_ARGUMENT = 0x4020940D, struct.Struct("=qQQQ")


def by_clone(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """Share whole blocks (reflinks): no byte moves. Linux only."""
    fcntl.ioctl(target, _CLONE_RANGE, _CLONE_ARGUMENT.pack(source, source_offset, count, target_offset))
    return count


def by_direct_write(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """Whole blocks go to the disk out of the pages that hold the source in memory, past the page cache of the target. Linux only.

    No byte is copied in memory, none of the target's pages is taken, and an fsync has nothing left to wait for. Disks want memory and
    file to be aligned, most to 512 bytes, some memory to 4 only: whether they are is for the kernel to say.
    """
    if not hasattr(os, "O_DIRECT"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    count = min(count, WINDOW)
    lead = source_offset % mmap.ALLOCATIONGRANULARITY
    try:
        window = mmap.mmap(source, lead + count, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=source_offset - lead)
    except ValueError as error:  # the source has become shorter
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT)) from error
    advise(source, source_offset, 2 * count, "POSIX_FADV_WILLNEED")  # the next step is read while this one is written
    flags = fcntl.fcntl(target, fcntl.F_GETFL)
    with window:
        fcntl.fcntl(target, fcntl.F_SETFL, flags | os.O_DIRECT)
        try:
            with memoryview(window) as pages, pages[lead:] as part:
                return os.pwrite(target, part, target_offset)
        finally:
            fcntl.fcntl(target, fcntl.F_SETFL, flags)


def by_copy_file_range(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """copy_file_range(2): from page cache to page cache, or by the server of a network file system. Linux only."""
    if not hasattr(os, "copy_file_range"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return os.copy_file_range(source, target, count, offset_src=source_offset, offset_dst=target_offset)


def by_sendfile(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """sendfile(2), which writes at the position of the target."""
    if not hasattr(os, "sendfile"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    os.lseek(target, target_offset, os.SEEK_SET)
    return os.sendfile(target, source, source_offset, count)


def by_read_and_write(source: int, target: int, source_offset: int, target_offset: int, count: int) -> int:
    """Through memory, at most BUFFER bytes."""
    chunk = os.pread(source, min(BUFFER, count), source_offset)
    write_at(target, chunk, target_offset)
    return len(chunk)


def write_at(target: int, data: bytes | bytearray, offset: int) -> None:
    """Write all of `data` at `offset`, whatever the position of the descriptor."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(target, rest, offset)
        rest, offset = rest[count:], offset + count


def advise(descriptor: int, offset: int, count: int, advice: str) -> None:
    """Tell the kernel, where it listens, what becomes of some bytes of a file. A hint, no more."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, count, getattr(os, advice))


WHOLE: tuple[Way, ...] = (by_clone, by_direct_write)
"""Ways for whole blocks of the target only."""
ANY: tuple[Way, ...] = (by_copy_file_range, by_sendfile, by_read_and_write)
"""Ways for any bytes; the last works everywhere."""
