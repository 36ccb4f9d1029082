"""Block sharing: which filesystem files lie on, and whether it lets them share blocks. Knows nothing of tensors.

Where blocks can be shared (reflinks), a copy takes neither room nor time for whole blocks, but only when the range
stands at the same place in its block in both files. Linux only: of other systems nothing is known here.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

MOUNTS = Path("/proc/self/mountinfo")

KINDS = {"xfs": "XFS", "btrfs": "Btrfs", "bcachefs": "bcachefs"}
"""Filesystems that share blocks, as the mount table spells them and as people do."""

# XFS_IOC_FSGEOMETRY_V1 of xfs_fs.h, as numbered on x86 and Arm: it fills 112 bytes, and a flag at 92 says whether blocks can be shared.
_XFS_GEOMETRY, _XFS_GEOMETRY_BYTES, _XFS_FLAGS_AT, _XFS_REFLINK = 0x80705864, 112, 92, 1 << 20


class Filesystem(NamedTuple):
    """A filesystem that lets files share blocks."""

    kind: str
    """Name for people, for example XFS."""
    block: int
    """Bytes of a block."""

    def __str__(self) -> str:
        return f"{self.kind}, {self.block}"


Sharing = Callable[[Iterable[Path]], Filesystem | None]
"""The filesystem on which an output can share blocks with all of these files, or None: `sharing_filesystem` for one output."""


class Mount(NamedTuple):
    """One line of the mount table."""

    device: str
    """`major:minor` of the superblock. Unlike st_dev it is one for all subvolumes of a Btrfs, and for all bind mounts."""
    point: str
    kind: str


def sharing_filesystem(output: Path, sources: Iterable[Path]) -> Filesystem | None:
    """The filesystem on which a file at `output` can share blocks with all of `sources`, or None.

    `output` need not exist, nor the folders above it. Reads the mount table and the superblock, and writes nothing.
    """
    mounts = read_mounts()
    place = os.path.realpath(output)
    mount = mount_of(place, mounts)
    if mount is None or mount.kind not in KINDS:
        return None
    homes = {os.path.dirname(os.path.realpath(source)) for source in sources}  # noqa: PTH120 - as fast as a thousand files need it
    for home in homes:
        other = mount_of(home, mounts)
        if other is None or other.device != mount.device:
            return None
    with suppress(OSError):
        existing = next(str(folder) for folder in (Path(place), *Path(place).parents) if folder.exists())
        if mount.kind != "xfs" or _xfs_shares(existing):
            return Filesystem(KINDS[mount.kind], os.statvfs(existing).f_bsize)
    return None


def whole_blocks(begin: int, end: int, at: int, block: int) -> int:
    """Bytes of a range of a source that take no room when they are copied to `at`: its whole blocks, if they are in step."""
    if (begin - at) % block:
        return 0
    return max(0, end // block * block - -(-begin // block) * block)


def read_mounts() -> tuple[Mount, ...]:
    """The mounts that this process sees, later ones over earlier ones; empty where the system has no such table."""
    found = []
    with suppress(OSError), MOUNTS.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields, _, rest = line.partition(" - ")  # the optional fields before it have no fixed number
            _, _, device, _, point, *_ = fields.split(" ")
            found.append(Mount(device, re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point), rest.split(" ")[0]))
    return tuple(found)


def mount_of(path: str, mounts: Sequence[Mount]) -> Mount | None:
    """The mount that holds an absolute path without symbolic links: the one mounted deepest, and of several there the last."""
    holding = [mount for mount in mounts if f"{path}/".startswith(f"{mount.point.rstrip('/')}/")]
    return max(reversed(holding), key=lambda mount: len(mount.point), default=None)


def _xfs_shares(folder: str) -> bool:
    """Whether an XFS was made with shared blocks: the format has them since 2018, and only when it was asked for them."""
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        geometry = bytearray(_XFS_GEOMETRY_BYTES)
        fcntl.ioctl(opened, _XFS_GEOMETRY, geometry)
    finally:
        os.close(opened)
    return bool(int.from_bytes(geometry[_XFS_FLAGS_AT : _XFS_FLAGS_AT + 4], "little") & _XFS_REFLINK)
