"""The place of an output: what must hold there, and the hidden folder beside it in which an output is made. Knows nothing of plans."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from layercut.checkpoint import Checkpoint
from layercut.copying import sync
from layercut.errors import OutputError
from layercut.header import quoted
from layercut.sizes import shown_size

# Room that is asked for beyond the bytes themselves: the report, folders, and what the file system keeps for its own use.
SLACK = 32 << 20

# A file system without locks is no reason to refuse (Lustre mounted without flock); only a lock that is held is.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Place(NamedTuple):
    """Where the output goes, and the names beside it that are used on the way."""

    shown: Path
    """As the user wrote it, for messages."""
    target: Path
    """The same, absolute and without symbolic links."""
    durable: bool = True
    """Whether the disk is waited for, so that a power cut finds what a kill finds."""

    @property
    def staging(self) -> Path:
        return self.target.parent / f".{self.target.name}.layercut-partial"

    @property
    def content(self) -> Path:
        """The future output folder. What helps to write it (lock and journal) lies beside it in `staging`, never in it."""
        return self.staging / "content"

    @property
    def lock(self) -> Path:
        return self.staging / "lock"

    @property
    def journal(self) -> Path:
        """Says what of the content is on the disk. Staging that has one is what a later run goes on from."""
        return self.staging / "journal"

    @property
    def old(self) -> Path:
        """Where a folder that is overwritten waits until the new one has its name."""
        return self.target.parent / f".{self.target.name}.layercut-old"

    @property
    def trash(self) -> Path:
        """Where it is removed: of what lies here nothing comes back, for it may be half a folder."""
        return self.target.parent / f".{self.target.name}.layercut-trash"


# Checks, before anything is written


def check_place(place: Place, sources: Mapping[str, Checkpoint]) -> None:
    """The output must be a folder of its own: away from the sources, the current directory, the home, and mount points."""
    shown, target = place.shown, place.target
    for alias, checkpoint in sources.items():
        folder = Path(os.path.realpath(checkpoint.folder))
        if _inside(target, folder) or _inside(folder, target):
            raise OutputError(f"{shown} and the source {folder} lie in each other", hint="choose a folder outside the sources")
        for name in (*checkpoint.files, *(name for name, _ in checkpoint.companions)):
            if _inside(Path(os.path.realpath(folder / name)), target):
                raise OutputError(f"{shown} holds {name} of the source {quoted(alias)}", hint="choose another folder")
    # expanduser of os.path leaves "~" where no home is known; the one of Path raises.
    for kept, what in ((Path.cwd(), "the current directory"), (Path(os.path.realpath(os.path.expanduser("~"))), "the home folder")):  # noqa: PTH111
        if _inside(kept, target):
            raise OutputError(f"{shown} is {what} or holds it", hint="choose another folder")
    if os.path.ismount(target):
        raise OutputError(f"{shown} is a mount point and cannot be put in place at once", hint="choose a folder inside it")
    parent = _existing(target.parent)
    if not parent.is_dir():
        raise OutputError(f"{parent} is a file, {shown} cannot lie in it", hint="choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{parent} is not writable", hint="choose another folder")


def check_vacant(place: Place, overwrite: bool) -> None:
    """Nothing may stand at the output but an empty folder, or with `overwrite` any folder."""
    if not os.path.lexists(place.target):
        return
    try:
        if not place.target.is_dir():
            raise OutputError(f"{place.shown} is a file", hint="choose another folder")
        holds = any(place.target.iterdir())
    except OSError as error:
        raise OutputError(f"{place.shown} cannot be looked into: {error.strerror}", hint="choose another folder") from error
    if holds and not overwrite:
        raise OutputError(f"{place.shown}/ is not empty", hint="choose another folder or pass --overwrite")


def check_space(place: Place, needed: int, kept: Mapping[str, int] = MappingProxyType({})) -> None:
    """The file system must have `needed` bytes and some more; what an earlier run left there will be freed and counts.

    Not so the files of the content that are `kept`: of these only what lies behind the bytes that are given for each.
    """
    parent = _existing(place.target.parent)
    free = shutil.disk_usage(parent).free
    for folder, _, names in os.walk(place.content):
        for name in names:
            path = Path(folder, name)
            state = path.lstat()
            used, stays = state.st_blocks * 512, kept.get(os.path.relpath(path, place.content), 0)
            free += used if not stays else max(0, used - stays) if stays < state.st_size else 0
    if needed + SLACK > free:
        raise OutputError(
            f"needs {shown_size(needed + SLACK)}, {shown_size(free)} free on {parent}", hint="free some space or choose another folder"
        )


def _existing(path: Path) -> Path:
    """The nearest path upwards that exists."""
    return next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), path)


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies in it. By identity, not by name: names differ over bind mounts and letter case."""
    return folder.exists() and any(above.exists() and above.samefile(folder) for above in (path, *path.parents))


# Staging: a hidden folder beside the output, held by one run at a time


@contextmanager
def staged(place: Place) -> Iterator[None]:
    """A staging folder that no other run touches. What is in it afterwards and cannot be resumed goes, with parents made in vain."""
    made = [folder for folder in reversed(place.target.parents) if not folder.exists()]
    try:
        for folder in made:
            folder.mkdir()
            if place.durable:
                sync(folder.parent)
        lock = _take_lock(place)
        try:
            yield
        finally:
            try:
                if not resumable(place):
                    _remove(place)
            finally:
                os.close(lock)
    except BaseException:
        with suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()
        raise


def resumable(place: Place) -> bool:
    """Whether there is work that a later run can go on from."""
    return place.journal.is_file() and place.content.is_dir()


def throw_away(place: Place) -> None:
    """Remove the work in the staging, of which this run holds the lock. Without its journal nobody takes it for more than litter."""
    place.journal.unlink(missing_ok=True)
    if os.path.lexists(place.content):
        shutil.rmtree(place.content)


def _remove(place: Place) -> None:
    """Remove the staging, of which this run holds the lock."""
    shutil.rmtree(place.trash, ignore_errors=True)
    shutil.rmtree(place.content, ignore_errors=True)
    place.journal.unlink(missing_ok=True)
    # The lock goes last, so that a run which starts meanwhile either waits its turn or finds nothing.
    place.lock.unlink(missing_ok=True)
    with suppress(OSError):
        place.staging.rmdir()


def _take_lock(place: Place) -> int:
    """Descriptor of the lock file, locked; it must be closed. Raises OutputError when another run holds it."""
    for _ in range(100):
        with suppress(FileExistsError):
            place.staging.mkdir()
        if place.staging.is_symlink() or not place.staging.is_dir():
            raise OutputError(f"{place.staging} is in the way", hint="remove it")
        try:
            lock = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(lock)
                if isinstance(error, BlockingIOError):
                    break
                raise
        # The run that held the lock may have finished and removed the file after it was opened here.
        try:
            if os.path.samestat(os.fstat(lock), os.lstat(place.lock)):
                return lock
        except FileNotFoundError:
            pass
        except OSError:
            os.close(lock)
            raise
        os.close(lock)
    raise OutputError(f"another layercut is writing {place.shown}", hint="wait for it or choose another folder")


def recover(place: Place) -> None:
    """Undo the first half of an overwrite that was killed between its two renames."""
    if place.old.is_dir() and not os.path.lexists(place.target):
        place.old.rename(place.target)


def publish(place: Place, overwrite: bool) -> None:
    """Give the content its name. An older folder steps aside first, comes back when this fails, and goes when it is done."""
    replaces = overwrite and place.target.is_dir() and any(place.target.iterdir())
    if replaces:
        _discard(place)
    try:
        if replaces:
            place.target.rename(place.old)
        # Without permission to replace, a folder that was filled in the meantime makes this fail.
        place.content.rename(place.target)
    except BaseException:
        if replaces:
            recover(place)
        raise
    settle(place, replaces)


def settle(place: Place, replaced: bool) -> None:
    """Put the new name on the disk; the folder that was replaced goes."""
    if place.durable:
        sync(place.target.parent)
    if replaced:
        try:
            _discard(place)
        except OSError as error:
            message = f"{place.shown} is complete, but the folder that it replaces could not be removed: {error.strerror}"
            left = place.old if os.path.lexists(place.old) else place.trash
            raise OutputError(message, hint=f"remove {left}") from error


def _discard(place: Place) -> None:
    """Remove the folder that was replaced. A run that is killed on the way leaves nothing that `recover` takes for the whole."""
    if os.path.lexists(place.trash):
        shutil.rmtree(place.trash)
    if os.path.lexists(place.old):
        place.old.rename(place.trash)
        if place.durable:
            sync(place.target.parent)
        shutil.rmtree(place.trash)
