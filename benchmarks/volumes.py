"""Filesystems that share blocks, each in a sparse file mounted for a while. Needs root, mkfs and loop devices; says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FORMATS = {"xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q")}


class NoVolumeError(Exception):
    """A volume cannot be had here; the message says why."""


@contextmanager
def volume(kind: str, folder: Path, size: int, *options: str) -> Iterator[Path]:
    """An empty filesystem of `size` bytes made with the `options`, mounted below `folder`; afterwards both are gone.

    Raises NoVolumeError with the reason when it cannot be had.
    """
    if os.geteuid() != 0:
        raise NoVolumeError("mounting takes root")
    for tool in (FORMATS[kind][0], "mount", "umount"):
        if shutil.which(tool) is None:
            raise NoVolumeError(f"{tool} is not installed")
    image, point = folder / f"{kind}.img", folder / kind
    point.mkdir(parents=True)
    try:
        with image.open("wb") as file:
            file.truncate(size)
        _call([*FORMATS[kind], *options, str(image)])
        _call(["mount", "-o", "loop", "-t", kind, str(image), str(point)])
        try:
            yield point
        finally:
            _call(["umount", str(point)])
    finally:
        image.unlink(missing_ok=True)
        point.rmdir()


def used(point: Path) -> int:
    """Bytes that a filesystem has given out, everything written and the room of removed files free again (XFS frees it later)."""
    found = [-3, -2, -1]
    while len(set(found[-3:])) > 1:
        subprocess.run(["sync", "--file-system", str(point)], check=True)
        time.sleep(0.5)
        state = os.statvfs(point)
        found.append((state.f_blocks - state.f_bfree) * state.f_frsize)
    return found[-1]


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoVolumeError(f"{command[0]} failed: {' '.join(done.stderr.split()) or done.returncode}")
