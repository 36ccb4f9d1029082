"""Where a checkpoint comes from: a folder, a GGUF file, or the Hub, of which only what is needed is fetched."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from layercut.caches import cache_folder
from layercut.checkpoint import CONFIG, Checkpoint, open_checkpoint
from layercut.errors import CheckpointError, did_you_mean
from layercut.hubfaults import UnreachableError
from layercut.hubmodel import HubModel, open_folder
from layercut.mirror import Mirror

PAGE = re.compile(r"https?://[^/]+/([^/?#]+/[^/?#]+)")
"""The address of a repository on a Hub."""


def resolve(reference: str, *, whole: bool = False, progress: bool = True) -> Checkpoint:
    """Open the model that a recipe names: a folder, a `.gguf` file, or a Hub id (`org/name`, `name`, either with `@revision`).

    Pickled weights and `.gguf` files are converted once, into the user's cache folder. Of a repository only config.json, the index, the
    headers and what is asked for by `Checkpoint.path` are fetched, unless the model is to be `whole` (or its weights are pickled). A
    branch is asked for its commit once, here; what is in the Hub cache is not fetched. Raises CheckpointError for everything that can go
    wrong.
    """
    if not reference or "\0" in reference:
        raise CheckpointError(f"{reference!r} names no model", hint="give a folder, a .gguf file, or a Hub id such as org/name")
    path = Path(os.path.expanduser(reference))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", where=reference) from None
    if is_folder:
        return _open_given(path, reference)
    if path.suffix.lower() == ".gguf":
        if not is_file:
            raise CheckpointError("no such file", where=reference)
        from layercut.gguf import convert

        return open_checkpoint(convert(path, cache_folder()), reference=reference)
    if is_file:
        raise CheckpointError("a file, not a folder", where=reference, hint="give the folder that holds config.json, or a .gguf file")
    try:
        return _on_hub(reference, progress).open(whole)
    except UnreachableError as error:
        raise UnreachableError(error.message, where=error.where, hint=_near(path) or error.hint) from None


def _near(path: Path) -> str | None:
    """The model folder beside the one that is not there, whose name is much the same."""
    with suppress(OSError):
        return did_you_mean(path.name, (one.name for one in path.parent.iterdir() if (one / CONFIG).is_file()))
    return None


def resolve_commit(reference: str, commit: str, *, progress: bool = True) -> Checkpoint:
    """Open the model of a Hub id at the commit that a plan or report pins, whatever branch the id names."""
    return _on_hub(f"{reference.partition('@')[0]}@{commit}", progress).open(whole=False)


def find_local(reference: str, commit: str) -> Checkpoint:
    """What is here of a commit, all or parts of it. Nothing is fetched. Raises CheckpointError when it is not here."""
    repository = _on_hub(f"{reference.partition('@')[0]}@{commit}", progress=False)
    repository.asks = False
    return repository.open(whole=False)


def _open_given(path: Path, reference: str) -> Checkpoint:
    mirror = Mirror.at(path)
    if mirror is not None:
        message = "a folder of layercut's own cache, in which only parts of the weights may be"
        raise CheckpointError(message, where=reference, hint=f"name the model: {mirror.repo}@{mirror.commit}")
    return open_folder(path, reference)


def _on_hub(reference: str, progress: bool) -> HubModel:
    """The repository that a reference names, if it could name one."""
    repo, at, revision = reference.partition("@")
    if page := PAGE.match(reference):
        raise CheckpointError("an address, not a model", where=reference, hint=f"write the Hub id alone: {page[1]}")
    if repo.startswith((".", "/", "~")) or "\\" in repo or repo[1:3] == ":/" or repo.count("/") > 1 or repo.endswith("/"):
        raise CheckpointError("no such folder", where=reference, hint=_near(Path(reference)))
    if at and not revision:
        raise CheckpointError("no revision after '@'", where=reference)
    return HubModel(reference, repo, revision or "main", progress)
