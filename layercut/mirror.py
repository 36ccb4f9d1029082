"""Mirrors: folders of layercut's cache, each for one commit of a repository on the Hub, with as much of its files as was needed.

A file is whole, as a link into the Hub cache, or has some byte ranges only: then it has its full size, the rest of it are holes, and a
note outside the folder says which bytes are there. The note is written after the bytes. Nothing here asks the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

from layercut.caches import cache_folder, hub_cache
from layercut.companions import MIRRORS, is_plain
from layercut.errors import CheckpointError
from layercut.header import MAX_ELEMENTS, quoted

COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
MAX_LISTING = 200_000_000
"""Bytes of a listing that are read at most."""


class Span(NamedTuple):
    """Bytes `begin` to `end` (half-open) of a file."""

    begin: int
    end: int


class Listed(NamedTuple):
    """What the Hub says of a file: its size, and the sha256 of a large file or else the id that git gives it."""

    size: int
    digest: str

    @property
    def large(self) -> bool:
        return len(self.digest) == 64


def joined(spans: Iterable[Span], gap: int = 0) -> list[Span]:
    """The same bytes in order, what touches or lies at most `gap` apart made one; empty ones go."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if begin == end:
            continue
        if found and begin <= found[-1].end + gap:
            found[-1] = Span(found[-1].begin, max(end, found[-1].end))
        else:
            found.append(Span(begin, end))
    return found


def without(spans: Iterable[Span], there: Iterable[Span]) -> list[Span]:
    """What of `spans` is not in `there`."""
    left: list[Span] = []
    have = joined(there)
    for begin, end in joined(spans):
        at = begin
        for other in have:
            if other.end <= at or other.begin >= end:
                continue
            if other.begin > at:
                left.append(Span(at, other.begin))
            at = min(other.end, end)
        if at < end:
            left.append(Span(at, end))
    return left


def total(spans: Iterable[Span]) -> int:
    """Bytes of all spans."""
    return sum(end - begin for begin, end in spans)


class Mirror:
    """The mirror of one commit."""

    def __init__(self, repo: str, commit: str) -> None:
        name = f"models--{repo.replace('/', '--')}"
        self.repo, self.commit = repo, commit
        self._home = cache_folder().absolute() / MIRRORS / name
        self._shared = hub_cache().absolute() / name
        self.folder = self._home / "snapshots" / commit
        self.snapshot = self._shared / "snapshots" / commit
        """The folder of the Hub cache that holds the whole files of the commit."""

    @classmethod
    def at(cls, folder: Path) -> Mirror | None:
        """The mirror that stands at a folder, or None when it is any other folder."""
        real = Path(os.path.realpath(folder))
        home = real.parent.parent
        ours = home.parent == Path(os.path.realpath(cache_folder() / MIRRORS)) and real.parent.name == "snapshots"
        if not (ours and home.name.startswith("models--") and COMMIT.fullmatch(real.name)):
            return None
        return cls(home.name.removeprefix("models--").replace("--", "/"), real.name)

    # listing

    def listing(self) -> dict[str, Listed] | None:
        """All files of the commit, as noted here or by the Hub cache (`trees/<commit>.json`); None when neither knows."""
        unusable = (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError)
        for home in (self._home, self._shared):
            with contextlib.suppress(*unusable):
                path = home / "trees" / f"{self.commit}.json"
                if path.stat().st_size <= MAX_LISTING:
                    files = json.loads(path.read_text(encoding="utf-8"))["files"]
                    return checked_listing((name, file["size"], file.get("lfs_sha256") or file["blob_id"]) for name, file in files.items())
        return None

    def keep_listing(self, files: Mapping[str, Listed]) -> None:
        """Note all files of the commit."""
        told: dict[str, Any] = {}
        for name, file in sorted(files.items()):
            told[name] = {"size": file.size, "blob_id": "" if file.large else file.digest}
            if file.large:
                told[name]["lfs_sha256"] = file.digest
        _replace(self._home / "trees" / f"{self.commit}.json", json.dumps({"format_version": 1, "files": told}, indent=1))

    # files

    def is_whole(self, name: str, size: int) -> bool:
        """Whether a file is here, or in the Hub cache, with all its bytes. What is in the Hub cache is here from then on."""
        path = self.folder / name
        if path.is_symlink() and _size(path) == size:
            return True
        if _size(self.snapshot / name) != size:
            return False
        self._link(name)
        return True

    def present(self, name: str, file: Listed) -> list[Span]:
        """The bytes of a file that are here."""
        if self.is_whole(name, file.size):
            return [Span(0, file.size)]
        try:
            note = json.loads(self._note(name).read_text(encoding="utf-8"))
            spans = [Span(int(begin), int(end)) for begin, end in note["spans"]]
            digest = note["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        path = self.folder / name
        sound = digest == file.digest and not path.is_symlink() and _size(path) == file.size
        return joined(spans) if sound and all(0 <= span.begin <= span.end <= file.size for span in spans) else []

    def missing(self, name: str, file: Listed, wanted: Iterable[Span]) -> list[Span]:
        """What of the bytes of a file is not here."""
        return without(wanted, self.present(name, file))

    @contextlib.contextmanager
    def writing(self, name: str, file: Listed) -> Iterator[BinaryIO]:
        """The file, of full size, to write bytes into. `keep` notes what was written."""
        path = self.folder / name
        if not self.present(name, file):
            self._note(name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "w+b") as opened:  # noqa: PTH123 - the mode is chosen
            opened.truncate(file.size)
            yield opened

    def keep(self, name: str, file: Listed, opened: BinaryIO, span: Span) -> None:
        """Note that the bytes of a span are there, once they are on the disk."""
        opened.flush()
        os.fsync(opened.fileno())
        spans = joined([*self.present(name, file), span])
        _replace(self._note(name), json.dumps({"size": file.size, "digest": file.digest, "spans": spans}))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """No other process writes to the mirror meanwhile. Where a file system has no locks, nothing is held."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                flock(descriptor, LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _note(self, name: str) -> Path:
        return self._home / "parts" / self.commit / f"{name}.json"

    def _link(self, name: str) -> None:
        """A link to the file in the Hub cache, in place of what was here."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".link-", dir=self._home) as staging:
            (Path(staging) / "link").symlink_to(self.snapshot / name)
            (Path(staging) / "link").replace(path)
        self._note(name).unlink(missing_ok=True)


def known_commit(repo: str, revision: str) -> str | None:
    """The commit that a branch or tag was last seen at, by layercut or by whoever filled the Hub cache."""
    found: list[tuple[float, str]] = []
    for path in (_ref(repo, revision), hub_cache() / f"models--{repo.replace('/', '--')}" / "refs" / revision):
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8").strip()
            if COMMIT.fullmatch(text):
                found.append((path.stat().st_mtime, text))
    return max(found)[1] if found else None


def keep_commit(repo: str, revision: str, commit: str) -> None:
    """Note the commit of a branch or tag."""
    _replace(_ref(repo, revision), commit)


def checked_listing(files: Iterable[tuple[Any, Any, Any]]) -> dict[str, Listed]:
    """Name, size and digest of files as a listing. Names that lead elsewhere are none of it. Raises CheckpointError for nonsense."""
    found: dict[str, Listed] = {}
    for name, size, digest in files:
        if type(size) is not int or not 0 <= size < MAX_ELEMENTS or not DIGEST.fullmatch(str(digest)):
            raise CheckpointError(f"the Hub lists {quoted(name)} with the size {quoted(size)} and the digest {quoted(digest)}")
        if is_plain(name):
            found[name] = Listed(size, digest)
    return dict(sorted(found.items()))


def _ref(repo: str, revision: str) -> Path:
    return cache_folder() / MIRRORS / f"models--{repo.replace('/', '--')}" / "refs" / quote(revision, safe="")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return None


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)
