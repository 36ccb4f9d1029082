"""Where a checkpoint comes from: a folder, a GGUF file, or the Hub. The only module that talks to the Hub for models."""

from __future__ import annotations

import dataclasses
import errno
import glob
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from layercut.caches import cache_folder
from layercut.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    adapter_beside,
    no_weights,
    open_checkpoint,
    read_text,
    weight_files,
    weights_disagree,
)
from layercut.companions import ADAPTER, left_out_reason
from layercut.errors import CheckpointError
from layercut.pickled import PICKLED, PICKLED_INDEX, holds_pickled, open_pickled, weight_names

T = TypeVar("T")


class _Unreachable(CheckpointError):
    """The Hub does not answer, or may not be asked."""


def resolve(reference: str, *, cache: Path | None = None) -> Checkpoint:
    """Open the model that a recipe names: a folder, a `.gguf` file, or a Hub id (`org/name`, `name`, either with `@revision`).

    Pickled weights and `.gguf` files are converted once, into `cache` or else the user's cache folder.
    What is in the local Hub cache is not asked for again, not even for a newer commit of a branch. Of a repository only the weights that
    its index names, config.json and the files that go along are downloaded. Raises CheckpointError for everything that can go wrong.
    """
    if not reference or "\0" in reference:
        raise CheckpointError(f"{reference!r} names no model", hint="give a folder, a .gguf file, or a Hub id such as org/name")
    cache = cache_folder() if cache is None else cache
    path = Path(os.path.expanduser(reference))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=reference) from None
    if is_folder:
        return _open_folder(path, cache, reference)
    if path.suffix.lower() == ".gguf":
        if not is_file:
            raise CheckpointError("no such file", where=reference)
        from layercut.gguf import convert

        return open_checkpoint(convert(path, cache), reference=reference)
    if is_file:
        raise CheckpointError("a file, not a folder", where=reference, hint="give the folder that holds config.json, or a .gguf file")
    repo, at, revision = reference.partition("@")
    if repo.startswith((".", "/", "~")) or "\\" in repo or repo.count("/") > 1 or repo.endswith("/"):
        raise CheckpointError("no such folder", where=reference)
    if at and not revision:
        raise CheckpointError("no revision after '@'", where=reference)
    return _Hub(reference, repo, revision or None).open(cache)


def _open_folder(folder: Path, cache: Path, reference: str, revision: str | None = None) -> Checkpoint:
    """Open a folder of safetensors, or what its pickled weights were converted into."""
    if holds_pickled(_there(folder)):
        return open_pickled(folder, cache, reference=reference, revision=revision)
    return open_checkpoint(folder, reference=reference, revision=revision)


class _Hub:
    """One repository at one revision."""

    def __init__(self, reference: str, repo: str, revision: str | None) -> None:
        self.reference, self.repo, self.revision = reference, repo, revision

    def open(self, cache: Path) -> Checkpoint:
        """From the cache when it is known to hold all, else from the Hub, else from a cache that holds the weights."""
        cached = self._cached()
        names = None if cached is None else _listing(cached)
        if cached is None or names is None or not self._holds_all(cached, names):
            try:
                cached, names = self._download()
            except _Unreachable:
                if cached is None or not _holds_weights(cached):
                    raise
        checkpoint = _open_folder(cached, cache, self.reference, cached.name)
        left_out = {what: reason for what, reason in _absent(cached, names)} | dict(checkpoint.left_out)
        return dataclasses.replace(checkpoint, left_out=tuple(sorted(left_out.items())))

    def _cached(self) -> Path | None:
        """The snapshot in the local cache, whole or not."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        def look() -> Path | None:
            try:
                return Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True, allow_patterns=[CONFIG]))
            except IncompleteSnapshotError as error:
                return Path(error.snapshot_path)
            except LocalEntryNotFoundError:
                return None

        return self._ask(look)

    def _holds_all(self, snapshot: Path, names: Sequence[str]) -> bool:
        index = _index_of(names)
        if index is not None and not (snapshot / index).exists():
            return False
        return all((snapshot / name).exists() for name in self._wanted(snapshot, names))

    def _download(self) -> tuple[Path, list[str]]:
        """The snapshot with everything that is needed, and the names of all files of the repository."""
        from huggingface_hub import HfApi, snapshot_download

        # By the name of the branch first, so that the cache remembers its commit; then by commit, so that all files are of one.
        first = Path(self._ask(lambda: snapshot_download(self.repo, revision=self.revision, allow_patterns=[CONFIG, INDEX])))
        names = _listing(first)
        if names is None:
            info = self._ask(lambda: HfApi().model_info(self.repo, revision=first.name))
            names = sorted(file.rfilename for file in info.siblings or ())
        if _index_of(names) == PICKLED_INDEX:
            self._ask(lambda: snapshot_download(self.repo, revision=first.name, allow_patterns=[PICKLED_INDEX]))
        wanted = [glob.escape(name) for name in self._wanted(first, names)]
        return Path(self._ask(lambda: snapshot_download(self.repo, revision=first.name, allow_patterns=wanted))), names

    def _wanted(self, snapshot: Path, names: Sequence[str]) -> list[str]:
        """The files of the repository that are needed: weights, config.json, index, and what goes along."""
        present = set(names)
        if CONFIG not in present:
            raise CheckpointError(f"no {CONFIG} in the repository", where=self.reference, hint="is it a transformers model?")
        if ADAPTER in present:
            adapter_beside(self.reference)
        index = _index_of(names)
        weights = {SINGLE}
        if holds_pickled(names):
            weights = _pickled(snapshot, names, self.reference)
        elif index is not None:
            weights = _indexed(snapshot)
            if SINGLE in present and SINGLE not in weights:
                weights_disagree(self.reference)
        elif SINGLE not in present:
            no_weights(present, self.reference)
        missing = sorted(weights - present)
        if missing:
            raise CheckpointError(f"the repository lacks {missing[0]!r}, which its index names", where=self.reference)
        along = {name for name in present if left_out_reason(name) is None}
        return sorted(weights | along | {CONFIG} | ({index} if index is not None else set()))

    def _ask(self, call: Callable[[], T]) -> T:
        """Call the Hub's client; whatever it raises becomes one line."""
        try:
            return call()
        except Exception as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> CheckpointError:
        """What the user should know and do. The order goes from the narrow class to the wide one."""
        from huggingface_hub import errors

        no_folder = "no such folder, and"
        if isinstance(error, errors.HFValidationError):
            return CheckpointError(f"{no_folder} not a Hub id", where=self.reference, hint="a Hub id looks like org/name")
        if isinstance(error, errors.GatedRepoError):
            page = f"https://huggingface.co/{self.repo}"
            return CheckpointError("a gated model", where=self.reference, hint=f"ask for access at {page}, then: hf auth login")
        if isinstance(error, errors.RevisionNotFoundError):
            return CheckpointError(f"no revision {self.revision!r}", where=self.reference, hint="give a branch, a tag, or a commit")
        if isinstance(error, errors.RepositoryNotFoundError):
            message = f"{no_folder} no such model on the Hub, or a private one"
            return CheckpointError(message, where=self.reference, hint="check the name; for a private model: hf auth login")
        if errors.OfflineModeIsEnabled in (type(error), type(error.__cause__)):
            message = f"{no_folder} not in the local Hub cache, and HF_HUB_OFFLINE forbids to ask the Hub"
            return _Unreachable(message, where=self.reference, hint="unset HF_HUB_OFFLINE to download it, or give a folder")
        if isinstance(error, errors.HfHubHTTPError):
            return self._refused(error.response.status_code)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = "no room on the disk for the download"
            return CheckpointError(message, where=self.reference, hint="free some, or set HF_HOME to a folder on a larger disk")
        if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx"):
            message = f"{no_folder} not in the local Hub cache, and the Hub cannot be reached"
            return _Unreachable(message, where=self.reference, hint="check the network, or give a folder")
        line = " ".join(str(error).split())[:300] or type(error).__name__
        return CheckpointError(f"the download failed: {line}", where=self.reference)

    def _refused(self, status: int) -> CheckpointError:
        if status in (401, 403):
            return CheckpointError(f"the Hub refuses access ({status})", where=self.reference, hint="log in with: hf auth login")
        return _Unreachable(f"the Hub answers {status}", where=self.reference, hint="try again later")


def _there(folder: Path) -> list[str]:
    """Which of the files that decide where the weights are a folder holds."""
    return [name for name in (CONFIG, SINGLE, INDEX, PICKLED, PICKLED_INDEX) if os.path.exists(folder / name)]  # noqa: PTH110 - never raises


def _index_of(names: Iterable[str]) -> str | None:
    """The index that says which of the files are the weights, or None when there is none."""
    present = set(names)
    index = PICKLED_INDEX if holds_pickled(present) else INDEX
    return index if index in present else None


def _pickled(snapshot: Path, names: Sequence[str], where: str) -> set[str]:
    """Pickled weight files that the index names, or the only one."""
    path = snapshot / PICKLED_INDEX
    return set(weight_names(names, read_text(path, snapshot) if PICKLED_INDEX in names else None, where))


def _indexed(snapshot: Path) -> set[str]:
    """Weight files that the index names."""
    path = snapshot / INDEX
    return set(weight_files(read_text(path, snapshot), path).values())


def _holds_weights(snapshot: Path) -> bool:
    if not (snapshot / CONFIG).exists():
        return False
    names = _there(snapshot)
    weights = {SINGLE}
    if holds_pickled(names):
        weights = _pickled(snapshot, names, snapshot.name)
    elif INDEX in names:
        weights = _indexed(snapshot)
    return all((snapshot / name).exists() for name in weights)


def _listing(snapshot: Path) -> list[str] | None:
    """Names of all files of the commit, when the cache has noted them (huggingface_hub 2.x, `trees/<commit>.json`)."""
    try:
        note = json.loads((snapshot.parent.parent / "trees" / f"{snapshot.name}.json").read_text(encoding="utf-8"))
        return sorted(note["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _absent(snapshot: Path, names: Sequence[str] | None) -> list[tuple[str, str]]:
    """Files of the repository that are not in the snapshot, and why."""
    unasked = "not in the local cache, and the Hub could not be asked"
    if names is None:
        return [("files of the repository", unasked)]
    return [(name, left_out_reason(name) or unasked) for name in names if not (snapshot / name).exists()]
