"""The journal of an output in the making: which of its bytes are on the disk for good. Knows nothing of plans.

The first line says what is being made, every other line what holds of one file from then on. A line is written after the bytes that it
speaks of are on the disk, so that it is true after a power cut too; a line that a crash cut short does not count. Where the disk is not
waited for, a line names the start of the machine that it was written in, and counts in no other.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from layercut.copying import explained, sync, write_bytes
from layercut.errors import OutputError
from layercut.report import file_digest
from layercut.version import __version__

FORMAT: Final = "layercut-journal/1"


class Identity(NamedTuple):
    """What is being made. Only bytes of equal identities may stand in one folder."""

    plan: str
    """Digest of the plan."""
    sources: str
    """Digest over place, size, time and inode of every source file: the digest of a plan does not know the values of weights."""
    layercut: str = __version__
    format: str = FORMAT

    def unlike(self, other: Identity | None) -> str | None:
        """Why bytes of `other` are no use here; None when they are."""
        if other is None:
            return "it has no journal that this version can read"
        if (self.format, self.layercut) != (other.format, other.layercut):
            return "it is of another version of layercut"
        if self.plan != other.plan:
            return "it is of another plan"
        return None if self.sources == other.sources else "its sources have changed since"


class Entry(NamedTuple):
    """What is on the disk of one file: the first `size` bytes, which are all of it when there is a digest."""

    size: int
    digest: str | None = None
    """sha256 of the bytes that the file is expected to begin with, where there are such (a header), else of the whole file."""


class Expected(NamedTuple):
    """What a file of the plan is when it is complete."""

    size: int
    start: bytes = b""
    """Its first bytes, by which it is known again. A file without them is small enough to be read again from end to end."""


class Found(NamedTuple):
    """What a journal says."""

    identity: Identity | None
    """None when there is no journal, or none that can be read."""
    entries: Mapping[str, Entry]
    """By name of the file."""
    end: int
    """Size in bytes of the lines that count."""


NOTHING = Found(None, MappingProxyType({}), 0)


def read_journal(path: Path) -> Found:
    """Read as far as the lines are whole. What cannot be read at all says nothing."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(opened, "rb") as file:
            first, *lines = file.read().split(b"\n")[:-1] or [b""]
    except OSError:
        return NOTHING
    identity = _identity(_line(first))
    if identity is None:
        return NOTHING
    entries, end, boot = {}, len(first) + 1, boot_id()
    for line in lines:
        data = _line(line)
        current = data.pop("boot", boot) == boot
        found = _entry(data)
        if found is None:
            break
        if current:
            entries[found[0]] = found[1]
        end += len(line) + 1
    return Found(identity, entries, end)


def boot_id() -> str:
    """Names this start of the machine; where the system does not say, it is another one each time."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.urandom(16).hex()


def _line(text: bytes) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _identity(data: dict[str, Any]) -> Identity | None:
    if data.keys() != set(Identity._fields) or not all(isinstance(value, str) for value in data.values()):
        return None
    return Identity(**data)


def _entry(data: dict[str, Any]) -> tuple[str, Entry] | None:
    name, size, digest = data.get("file"), data.get("bytes"), data.get("sha256")
    if not isinstance(name, str) or not isinstance(size, int) or size < 0 or not isinstance(digest, str | None):
        return None
    return name, Entry(size, digest)


class Journal:
    """A journal that is written to, by any number of threads. Every line is on the disk when its method returns, if `durable`."""

    def __init__(self, path: Path, identity: Identity, found: Found, durable: bool = True) -> None:
        """Go on with `found` where that is of `identity`, else begin. Raises OSError."""
        goes_on = found.identity == identity
        self._durable = durable
        self._writing = Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._file, found.end if goes_on else 0)
            if not goes_on:
                self._write(identity._asdict())
                sync(path.parent)
                sync(path.parent.parent)
        except BaseException:
            self.close()
            raise

    def record(self, name: str, size: int, digest: str | None = None) -> None:
        """The first `size` bytes of the file are on the disk; with a digest (see `Entry`), it is complete.

        That nothing of it is there, which takes back what was said before, is put on the disk in any case.
        """
        line: dict[str, str | int] = {"file": name, "bytes": size}
        if digest is not None:
            line["sha256"] = digest
        if (size or digest is not None) and not self._durable:
            line["boot"] = boot_id()
        self._write(line)

    def close(self) -> None:
        os.close(self._file)

    def _write(self, line: Mapping[str, str | int]) -> None:
        with self._writing:
            write_bytes(self._file, json.dumps(line, separators=(",", ":")).encode() + b"\n")
            if "boot" not in line:
                os.fsync(self._file)


def survey(content: Path, entries: Mapping[str, Entry], expected: Mapping[str, Expected]) -> dict[str, Entry]:
    """What can be kept, by name of the file: what the journal lists, the plan wants, and the disk still holds. Changes nothing.

    Raises OutputError when `content` is not a folder.
    """
    if content.is_symlink() or (content.exists() and not content.is_dir()):
        raise OutputError(f"{content} is in the way", hint="remove it")
    listed = {name: entry for name, entry in entries.items() if entry.size or entry.digest is not None}
    return {name: entry for name, entry in listed.items() if name in expected and _holds(content / name, entry, expected[name])}


def _holds(path: Path, entry: Entry, wanted: Expected) -> bool:
    """Whether the file is what the journal says, as far as that can be seen without reading weights."""
    if os.path.realpath(path) != str(path):  # a link was put in its place, or in that of its folder
        return False
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(opened, "rb") as file:
        state = os.fstat(opened)
        if not stat.S_ISREG(state.st_mode):
            return False
        if entry.digest is None:
            return len(wanted.start) <= entry.size <= min(state.st_size, wanted.size) and file.read(len(wanted.start)) == wanted.start
        if not entry.size == state.st_size == wanted.size:
            return False
        if wanted.start:
            return file.read(len(wanted.start)) == wanted.start
        return file_digest(path).sha256 == entry.digest


@contextmanager
def continued_file(path: Path, shown: Path, size: int, durable: bool = True) -> Iterator[int]:
    """Descriptor of a file of which the first `size` bytes are kept; otherwise as `new_file`."""
    try:
        target = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.ftruncate(target, size)
            os.fchmod(target, 0o644)
            yield target
            if durable:
                os.fsync(target)
        finally:
            os.close(target)
    except OSError as error:
        raise explained(error, shown) from error


def clear(content: Path, kept: Collection[str]) -> None:
    """Remove everything but the files that are kept; links are removed, not followed."""
    for place, folders, names in os.walk(content, topdown=False):
        for name in names:
            path = Path(place, name)
            if path.relative_to(content).as_posix() not in kept:
                path.unlink()
        for folder in folders:
            path = Path(place, folder)
            if path.is_symlink():
                path.unlink()
            else:
                with suppress(OSError):  # it holds what is kept
                    path.rmdir()
