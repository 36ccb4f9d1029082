"""Repositories of the loopback Hub: files, commits, branches, tags and pull requests, in memory. Knows nothing of HTTP."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

ATTRIBUTES = ".gitattributes"
LARGE = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.onnx", "*.h5", "*.msgpack", "*.parquet", "*.png", "*.zip", "*.gz")
"""What the `.gitattributes` of a new repository lists."""
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Blob:
    """The contents of a file, and whether they are kept in git or in large file storage."""

    data: bytes = field(repr=False)
    large: bool
    xet: str | None = None
    """Xet hash, where the file came or goes by Xet."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git(self) -> str:
        """The object id in git."""
        data = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git


@dataclass(frozen=True)
class Commit:
    """A state of all files."""

    id: str
    parent: str | None
    title: str
    message: str
    files: Mapping[str, Blob] = field(repr=False)


class RefusedError(Exception):
    """The repository cannot do this: an HTTP status, the Hub's error code, and a message."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(f"{status} {code} {message}")
        self.status, self.code, self.message = status, code, message


class Repository:
    """A model repository."""

    def __init__(self, name: str, files: Mapping[str, bytes] | None = None, *, private: bool = False, gated: bool = False) -> None:
        self.name, self.private, self.gated = name, private, gated
        self.approved: set[str] = set()
        """Users who may read a gated repository."""
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pulls: dict[int, str] = {}
        self.titles: dict[int, str] = {}
        self.status: dict[int, str] = {}
        self.objects: dict[str, Blob] = {}
        """Large files that were uploaded, in a commit or not, by sha256."""
        self.commit({ATTRIBUTES: b"".join(b"%s filter=lfs\n" % pattern.encode() for pattern in LARGE)}, "initial commit")
        if files is not None:
            self.commit(files, "files")

    # reading

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request or a commit id. Raises RefusedError."""
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        found = self.branches.get(revision.removeprefix("refs/heads/")) or self.tags.get(revision.removeprefix("refs/tags/"))
        if pull is not None:
            found = self.pulls.get(int(pull[1]))
        if found is None and COMMIT.fullmatch(revision):
            found = revision
        if found is None or found not in self.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[found]

    def history(self, revision: str) -> Iterator[Commit]:
        """The commits of a revision, newest first."""
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = None if commit.parent is None else self.commits[commit.parent]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Contents by name."""
        return {name: blob.data for name, blob in sorted(self.resolve(revision).files.items())}

    # writing

    def is_large(self, name: str, size: int, sample: bytes = b"") -> bool:
        """Whether a file goes to large file storage: by its name, its size, or because it is no text."""
        return any(fnmatch(name.split("/")[-1], pattern) for pattern in LARGE) or size > 10_000_000 or b"\0" in sample

    def blob(self, name: str, data: bytes) -> Blob:
        return Blob(data, self.is_large(name, len(data), data[:512]))

    def commit(
        self,
        changes: Mapping[str, bytes | Blob | None],
        title: str,
        *,
        revision: str = "main",
        parent: str | None = None,
        message: str = "",
    ) -> str:
        """Commit changed files (None: removed) to a branch or a pull request, and give the id. `parent`: what the head must be."""
        head = self.resolve(revision) if self.commits else None
        if parent is not None and head is not None and head.id != parent:
            raise RefusedError(412, "", f"A commit has happened since. Please refresh and try again. Expected {head.id}, got {parent}")
        files = dict(head.files) if head is not None else {}
        for name, change in changes.items():
            if change is None:
                if name not in files:
                    raise RefusedError(400, "", f"cannot delete {name}: it is not there")
                del files[name]
            else:
                files[name] = self.blob(name, change) if isinstance(change, bytes) else change
                if files[name].large:
                    self.objects[files[name].sha256] = files[name]
        before = None if head is None else head.id
        listing = [before, title, message, len(self.commits), sorted((name, blob.etag) for name, blob in files.items())]
        made = Commit(hashlib.sha1(repr(listing).encode()).hexdigest(), before, title, message, files)
        self.commits[made.id] = made
        self._move(revision, made.id)
        return made.id

    def _move(self, revision: str, commit: str) -> None:
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        if pull is not None:
            self.pulls[int(pull[1])] = commit
        elif COMMIT.fullmatch(revision) or revision in self.tags:
            raise RefusedError(400, "", f"{revision} is no branch")
        else:
            self.branches[revision.removeprefix("refs/heads/")] = commit

    def branch(self, name: str, start: str = "main") -> None:
        """Make a branch. Raises RefusedError when there is one."""
        if name in self.branches:
            raise RefusedError(409, "", f"Reference already exists: {name}")
        self.branches[name] = self.resolve(start).id

    def tag(self, name: str, revision: str = "main") -> None:
        """Make a tag. Raises RefusedError when there is one."""
        if name in self.tags:
            raise RefusedError(409, "", f"Tag already exists: {name}")
        self.tags[name] = self.resolve(revision).id

    def pull_request(self, title: str, revision: str = "main") -> int:
        """Open a pull request, and give its number."""
        number = len(self.pulls) + 1
        self.pulls[number], self.titles[number] = self.resolve(revision).id, title
        return number

    def merge(self, number: int) -> str:
        """Give `main` the files of a pull request."""
        commit = self.commits[self.pulls[number]]
        changes: dict[str, bytes | Blob | None] = {name: None for name in self.resolve("main").files if name not in commit.files}
        return self.commit({**changes, **commit.files}, self.titles[number])
