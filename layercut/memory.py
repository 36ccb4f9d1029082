"""Memory: how much there is, how much a model takes, and so whether it is held whole or streamed layer by layer."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from layercut.checkpoint import Checkpoint

CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""A limit as large as this is none: cgroups of version 1 spell 'no limit' as a huge number."""
SHARE = 0.9
"""Of what is free, as much is used: estimates are estimates."""


class Room(NamedTuple):
    """Memory that may be used, beyond what the process takes now."""

    size: int
    """Bytes."""
    reason: str
    """Where the number comes from."""
    asked: bool = False
    """Whether the user set it."""


def room_of(memory: int | None = None, free: Mapping[str, int] | None = None) -> Room:
    """What may be used: `memory` bytes in all when the user says so, else a share of what is free.

    `free` overrides what is measured, by where it was.
    """
    if memory is not None:
        return Room(max(0, memory - psutil.Process().memory_info().rss), f"{shown(memory)} as asked", asked=True)
    free = free_memory() if free is None else free
    place = min(free, key=lambda name: free[name])
    return Room(int(SHARE * free[place]), f"{shown(free[place])} free in {place}")


def free_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> dict[str, int]:
    """Free bytes of the machine, and of the cgroup that the process lives in when it is limited."""
    found = {"memory": int(psutil.virtual_memory().available)}
    for folder, limit, used in _groups(cgroups, own):
        most, taken = _number(folder / limit), _number(folder / used)
        if most is not None and taken is not None and most < UNLIMITED:
            # Files that were read stand in the cache of the group; the kernel drops them when it needs room.
            cached = _statistic(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
            found["the cgroup"] = min(found.get("the cgroup", UNLIMITED), max(0, most - taken + cached))
    return found


def _groups(cgroups: Path, own: Path) -> list[tuple[Path, str, str]]:
    """Folders of the cgroups of this process, from the outermost, with the files of limit and usage."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[tuple[Path, str, str]] = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        base = cgroups / "memory" if controllers else cgroups
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        parts = [part for part in path.split("/") if part and part != ".."]
        found += [(base.joinpath(*parts[:depth]), *names) for depth in range(len(parts) + 1)]
    return found


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, keys: tuple[str, ...]) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return max((int(values[key]) for key in keys if values.get(key, "").isdecimal()), default=0)


def whole_size(checkpoint: Checkpoint, itemsize: int | None) -> int:
    """Bytes of all tensors in a dtype of `itemsize` bytes an element; None for the dtypes that they are stored in."""
    return sum(
        tensor.nbytes if itemsize is None or "F" not in tensor.dtype else math.prod(tensor.shape) * itemsize
        for tensor in checkpoint.tensors.values()
    )


def shown(size: int) -> str:
    """A size for a person."""
    for unit, step in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} bytes"


def give_back() -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MB for itself, in the arenas of all threads."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
