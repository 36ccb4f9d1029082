"""A model on the Hub at one commit: what it consists of, what of it is here, and how the rest is fetched. Opens it from what is here."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

from layercut.caches import cache_folder, is_offline
from layercut.checkpoint import (
    CONFIG,
    INDEX,
    MAX_JSON,
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
from layercut.header import MAX_HEADER
from layercut.hubfaults import NoRangesError, UnreachableError
from layercut.hubreader import HubReader
from layercut.mirror import COMMIT, Listed, Mirror, Span, keep_commit, known_commit
from layercut.pickled import PICKLED, PICKLED_INDEX, holds_pickled, open_pickled, weight_names

FIRST = 1 << 15
"""Bytes of a weight file that are asked for first: most headers are shorter."""
UNASKED = "not in the local cache, and the Hub could not be asked"


class HubModel:
    """One repository at one revision."""

    def __init__(self, reference: str, repo: str, revision: str, progress: bool) -> None:
        self.reference, self.repo, self.revision = reference, repo, revision
        self.asks = not is_offline()
        """Whether the Hub may be asked, and answered so far."""
        self._reader = HubReader(reference, repo, progress=progress)

    def open(self, whole: bool) -> Checkpoint:
        """The checkpoint, with as much on the disk as is asked for, at least config.json, the index and the headers."""
        self._check_name()
        mirror = Mirror(self.repo, self._commit())
        with mirror.locked():
            listing = self._listing(mirror)
            if listing is None:
                return self._unlisted(mirror)
            self.fetch(mirror, {name: listing[name] for name in _first(listing, self.reference)})
            weights = _weights(mirror.folder, listing, self.reference)
            wanted = self._wanted(mirror, listing, weights)
            if whole or holds_pickled(listing):
                self.fetch(mirror, wanted)
            here = all(mirror.is_whole(name, file.size) for name, file in wanted.items())
            if not here:
                self._fetch_headers(mirror, {name: listing[name] for name in sorted(weights)})
        checkpoint = self._opened(mirror, mirror.snapshot if here else mirror.folder, listing, wanted)
        left_out = {name: left_out_reason(name) or UNASKED for name in listing if name not in wanted} | dict(checkpoint.left_out)
        return dataclasses.replace(checkpoint, left_out=tuple(sorted(left_out.items())))

    def _opened(self, mirror: Mirror, folder: Path, listing: Mapping[str, Listed], wanted: Collection[str]) -> Checkpoint:
        """The checkpoint in the Hub cache or in the mirror. Pickled weights are all here by now, and opened as what they are made into."""
        if holds_pickled(listing):
            return open_folder(folder, self.reference, mirror.commit)
        beside = [(name, file.size) for name, file in listing.items() if name in wanted or left_out_reason(name) is not None]
        checkpoint = open_checkpoint(folder, reference=self.reference, revision=mirror.commit, beside=beside)
        return dataclasses.replace(checkpoint, fetch=partial(self._fetch_one, mirror, listing))

    def fetch(self, mirror: Mirror, files: Mapping[str, Listed]) -> None:
        """Whole files, into the Hub cache. Raises CheckpointError that names all that is missing."""
        missing = {name: file for name, file in files.items() if not mirror.is_whole(name, file.size)}
        if not missing:
            return
        if not self.asks:
            raise self._lacking(missing)
        try:
            self._reader.download(mirror, missing)
        except UnreachableError as error:
            raise self._lacking([name for name, file in missing.items() if not mirror.is_whole(name, file.size)], error) from None
        for name, file in missing.items():
            mirror.is_whole(name, file.size)

    def fetch_spans(self, mirror: Mirror, name: str, file: Listed, spans: Iterable[Span], advance: Callable[[int], object]) -> None:
        """Bytes of a weight file, into the mirror. Raises CheckpointError."""
        for span in mirror.missing(name, file, spans):
            if not self.asks:
                raise self._lacking([name])
            try:
                self._reader.read(mirror, name, file, span, advance)
            except NoRangesError:
                self.fetch(mirror, {name: file})
                return
            except UnreachableError as error:
                raise self._lacking([name], error) from None

    def _fetch_one(self, mirror: Mirror, listing: Mapping[str, Listed], name: str) -> None:
        if name in listing:
            with mirror.locked():
                self.fetch(mirror, {name: listing[name]})

    def _fetch_headers(self, mirror: Mirror, weights: Mapping[str, Listed]) -> None:
        """The header of every weight file."""
        lacking = [name for name, file in weights.items() if mirror.missing(name, file, [header_span(mirror, name, file)])]
        if lacking and not self.asks:
            raise self._lacking(lacking)
        for name in lacking:
            file = weights[name]
            self.fetch_spans(mirror, name, file, [Span(0, min(FIRST, file.size))], _nothing)
            self.fetch_spans(mirror, name, file, [header_span(mirror, name, file)], _nothing)

    def _check_name(self) -> None:
        if not self._reader.is_name():
            raise CheckpointError("no such folder, and not a Hub id", where=self.reference, hint="a Hub id looks like org/name")

    def _commit(self) -> str:
        """The commit, asked for once; without an answer the one that was last seen."""
        if COMMIT.fullmatch(self.revision):
            return self.revision
        known = known_commit(self.repo, self.revision)
        why = None
        if self.asks:
            try:
                commit, name = self._reader.find(self.revision)
                if name.casefold() != self.repo.casefold():
                    print(f"{self.reference}: the repository is called {name} now", file=sys.stderr)
                keep_commit(self.repo, self.revision, commit)
                return commit
            except UnreachableError as error:
                self.asks, why = False, error
        if known is None:
            raise self._unknown(why)
        if why is not None:
            print(f"{self.reference}: {why.message}; the commit in the local cache is taken, {known}", file=sys.stderr)
        return known

    def _listing(self, mirror: Mirror) -> dict[str, Listed] | None:
        """All files of the commit; None when they are not known here and the Hub cannot be asked."""
        listing = mirror.listing()
        if listing is None and self.asks:
            try:
                listing = self._reader.listing(mirror.commit)
                mirror.keep_listing(listing)
            except UnreachableError as error:
                self.asks = False
                if not _holds_weights(mirror.snapshot):
                    raise self._unknown(error) from None
        return listing

    def _unlisted(self, mirror: Mirror) -> Checkpoint:
        """What another program left in the Hub cache, when it holds the weights."""
        if not _holds_weights(mirror.snapshot):
            raise self._unknown(None)
        checkpoint = open_folder(mirror.snapshot, self.reference, mirror.commit)
        left_out = dict(checkpoint.left_out) | {"files of the repository": UNASKED}
        return dataclasses.replace(checkpoint, left_out=tuple(sorted(left_out.items())))

    def _wanted(self, mirror: Mirror, listing: Mapping[str, Listed], weights: Iterable[str]) -> dict[str, Listed]:
        """What makes up the model: weights, config.json, the index, and what goes along, if it is here or can be asked for."""
        needed = {*weights, *_first(listing, self.reference)}
        along = [
            name for name, file in listing.items() if left_out_reason(name) is None and (self.asks or mirror.is_whole(name, file.size))
        ]
        return {name: listing[name] for name in sorted({*needed, *along})}

    def _lacking(self, names: Iterable[str], error: CheckpointError | None = None) -> CheckpointError:
        """Says exactly what is missing."""
        listed = ", ".join(sorted(names))
        if error is None:
            hint = "HF_HUB_OFFLINE forbids to ask the Hub: unset it, or leave out --offline" if is_offline() else None
            return UnreachableError(f"not in the local cache: {listed}", where=self.reference, hint=hint)
        return UnreachableError(f"{error.message}, and not in the local cache: {listed}", where=self.reference, hint=error.hint)

    def _unknown(self, error: CheckpointError | None) -> CheckpointError:
        """Nothing of it is here."""
        message = "no such folder, and not in the local Hub cache"
        if error is not None:
            return UnreachableError(f"{message}, and {error.message}", where=self.reference, hint=error.hint)
        if not is_offline():
            return UnreachableError(message, where=self.reference)
        hint = "unset it to download the model, or leave out --offline, or give a folder"
        return UnreachableError(f"{message}, and HF_HUB_OFFLINE forbids to ask the Hub", where=self.reference, hint=hint)


def header_span(mirror: Mirror, name: str, file: Listed) -> Span:
    """The bytes of the header, as far as they are known: the first ones, as long as these are not here."""
    first = Span(0, min(FIRST, file.size))
    if mirror.missing(name, file, [Span(0, 8)]):
        return first
    with (mirror.folder / name).open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    return Span(0, min(file.size, 8 + length)) if length <= MAX_HEADER else first


def _nothing(count: int) -> None:
    """No bar."""


def open_folder(folder: Path, reference: str, revision: str | None = None) -> Checkpoint:
    """Open a folder of safetensors, or what its pickled weights were converted into."""
    if holds_pickled(there_in(folder)):
        return open_pickled(folder, cache_folder(), reference=reference, revision=revision)
    return open_checkpoint(folder, reference=reference, revision=revision)


def _first(listing: Mapping[str, Listed], where: str) -> list[str]:
    """The files that say what the others are. Raises CheckpointError when they are not there, or too long."""
    if CONFIG not in listing:
        raise CheckpointError(f"no {CONFIG} in the repository", where=where, hint="is it a transformers model?")
    if ADAPTER in listing:
        adapter_beside(where)
    index = _index_of(listing)
    names = [CONFIG] if index is None else [CONFIG, index]
    for name in names:
        if listing[name].size > MAX_JSON:
            raise CheckpointError(f"{name} is {listing[name].size} bytes, over the {MAX_JSON} that layercut reads", where=where)
    return names


def _weights(folder: Path, names: Iterable[str], where: str) -> set[str]:
    """The weight files of a repository, by its index in the folder. Raises CheckpointError."""
    present = set(names)
    index = _index_of(present)
    weights = {SINGLE}
    if holds_pickled(present):
        weights = _pickled(folder, sorted(present), where)
    elif index is not None:
        weights = _indexed(folder)
        if SINGLE in present and SINGLE not in weights:
            weights_disagree(where)
    elif SINGLE not in present:
        no_weights(present, where)
    missing = sorted(weights - present)
    if missing:
        raise CheckpointError(f"the repository lacks {missing[0]!r}, which its index names", where=where)
    return weights


def there_in(folder: Path) -> list[str]:
    """Which of the files that decide where the weights are a folder holds."""
    return [name for name in (CONFIG, SINGLE, INDEX, PICKLED, PICKLED_INDEX) if os.path.exists(folder / name)]  # noqa: PTH110 - never raises


def _index_of(names: Iterable[str]) -> str | None:
    """The index that says which of the files are the weights, or None when there is none."""
    present = set(names)
    index = PICKLED_INDEX if holds_pickled(present) else INDEX
    return index if index in present else None


def _pickled(snapshot: Path, names: list[str], where: str) -> set[str]:
    """Pickled weight files that the index names, or the only one."""
    path = snapshot / PICKLED_INDEX
    return set(weight_names(names, read_text(path, snapshot) if PICKLED_INDEX in names else None, where))


def _indexed(snapshot: Path) -> set[str]:
    """Weight files that the index names."""
    path = snapshot / INDEX
    return set(weight_files(read_text(path, snapshot), path).values())


def _holds_weights(snapshot: Path) -> bool:
    names = there_in(snapshot)
    if CONFIG not in names:
        return False
    weights = {SINGLE}
    if holds_pickled(names):
        weights = _pickled(snapshot, names, snapshot.name)
    elif INDEX in names:
        weights = _indexed(snapshot)
    return all((snapshot / name).exists() for name in weights)
