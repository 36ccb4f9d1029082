"""Fetches what a plan reads from models on the Hub: whole weight files, or only the bytes that are needed where most are not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from layercut.caches import cache_folder, hub_cache
from layercut.checkpoint import CONFIG, INDEX, Checkpoint
from layercut.companions import left_out_reason
from layercut.errors import CheckpointError
from layercut.hubmodel import HubModel, header_span
from layercut.mirror import Listed, Mirror, Span, joined, total
from layercut.plan import Plan, Source, TensorCopy, TensorMade
from layercut.sizes import shown_size
from layercut.source import resolve_commit

SHARE = 0.5
"""A file of which more than this is missing and needed is fetched as a whole, so that other programs find it too."""
GAP = 1 << 15
"""Bytes between two ranges that are fetched along, to save a request."""
WASTE = 1.1
"""Bytes that are fetched so, at most, for each that is needed."""


class Parcel(NamedTuple):
    """What is still to be fetched of one model."""

    reference: str
    """The model as the user named it."""
    weights: Collection[str]
    """Names of its weight files."""
    mirror: Mirror
    listing: Mapping[str, Listed]
    whole: tuple[str, ...]
    """Files that are fetched as a whole."""
    parts: dict[str, list[Span]]
    """Ranges of weight files."""

    def described(self) -> str:
        """What it is of which model, and how much."""
        shards = [name for name in self.whole if name in self.weights]
        others = [name for name in self.whole if name not in self.weights]
        told = []
        if shards:
            told.append(f"{len(shards)} of {len(self.weights)} weight files ({self._size(shards)})")
        if self.parts:
            told.append(f"parts of {len(self.parts)} ({shown_size(sum(map(total, self.parts.values())))})")
        if others:
            told.append(f"{len(others)} other file{'s' * (len(others) > 1)} ({self._size(others)})")
        return f"{self.mirror.repo}@{self.mirror.commit[:12]}: {', '.join(told)}"

    def _size(self, names: Iterable[str]) -> str:
        return shown_size(sum(self.listing[name].size for name in names))


def fetch(plan: Plan, *, whole: Collection[str] = (), progress: bool = True) -> Plan:
    """Make local what the plan reads, and all of the models that are to be `whole`; the plan, with the folders where it is now.

    Says on stderr what is fetched and how much it is, before it is. Sources that are folders stay as they are. Raises CheckpointError,
    offline with the names of the files that are missing.
    """
    sources = dict(plan.sources)
    parcels = []
    for alias, source in plan.sources.items():
        if source.revision is not None and not _is_here(plan, alias, alias in whole):
            checkpoint = resolve_commit(source.reference, source.revision, progress=progress)
            sources[alias] = source.model_copy(update={"folder": str(checkpoint.folder)})
            if (checkpoint.digest, {name: file.size for name, file in checkpoint.files.items()}) != (source.digest, source.files):
                raise CheckpointError("the commit on the Hub is not what the plan was made of", where=source.reference, hint="plan again")
            parcels += _parcels(plan, alias, sources[alias], alias in whole)
    fetched = plan.model_copy(update={"sources": sources})
    if parcels:
        _announce(parcels)
        _check_room(parcels)
        for parcel in parcels:
            _fetch(parcel, progress)
    return fetched


def outstanding(plan: Plan, *, whole: Collection[str] = ()) -> list[str]:
    """What `fetch` would fetch on this machine, in words, a line for each model. Asks nobody."""
    parcels = [parcel for alias, source in plan.sources.items() for parcel in _parcels(plan, alias, source, alias in whole)]
    return [parcel.described() for parcel in parcels]


def fetch_whole(checkpoint: Checkpoint, *, progress: bool = True) -> Checkpoint:
    """The same checkpoint with all of its files on the disk, so that it can be loaded."""
    mirror = Mirror.at(checkpoint.folder)
    listing = None if mirror is None else mirror.listing()
    if mirror is None or listing is None:
        return checkpoint
    names = {CONFIG, INDEX, *checkpoint.files, *(name for name, _ in checkpoint.companions)}
    files = {name: listing[name] for name in sorted(names & listing.keys())}
    missing = tuple(name for name, file in files.items() if not mirror.is_whole(name, file.size))
    if missing:
        parcel = Parcel(checkpoint.reference, checkpoint.files, mirror, listing, missing, {})
        _announce([parcel])
        _check_room([parcel])
        _fetch(parcel, progress)
    return checkpoint


def spans_of(tensors: Iterable[TensorCopy | TensorMade], alias: str) -> dict[str, list[Span]]:
    """The bytes of a model that tensors are made of, by weight file."""
    found: dict[str, list[Span]] = {}
    for tensor in tensors:
        for part in tensor.parts if isinstance(tensor, TensorMade) else (tensor,):
            if part.model == alias:
                found.setdefault(part.file, []).append(Span(part.begin, part.end))
        gather = tensor.gather if isinstance(tensor, TensorMade) else None
        for strip in gather.strips if gather is not None else ():
            if gather is not None and strip.model == alias:
                found.setdefault(strip.file, []).append(Span(strip.begin, strip.begin + (gather.rows - 1) * strip.stride + strip.width))
    return {name: joined(spans) for name, spans in sorted(found.items())}


def holes(folder: Path, spans: Mapping[str, Sequence[Span]]) -> list[str]:
    """Weight files of a folder in which not all of these bytes are: in a mirror they may be holes."""
    mirror = Mirror.at(folder)
    if mirror is None:
        return []
    listing = mirror.listing() or {}
    return [name for name, wanted in spans.items() if name not in listing or mirror.missing(name, listing[name], wanted)]


def check_here(plan: Plan) -> None:
    """Every byte that the plan reads is on the disk. Raises CheckpointError."""
    for alias, source in plan.sources.items():
        lacking = holes(Path(source.folder), _needed(plan, alias))
        if lacking:
            message = f"not all that the plan reads is here: {', '.join(lacking)}"
            raise CheckpointError(message, where=source.reference, hint="run the same command again, to fetch it")


def _needed(plan: Plan, alias: str) -> dict[str, list[Span]]:
    """The bytes that the plan reads from a source, headers aside, by weight file."""
    found = spans_of((tensor for file in plan.actions.files for tensor in file.tensors), alias)
    return {name: found.get(name, []) for name in sorted({*plan.sources[alias].files, *found})}


def _is_here(plan: Plan, alias: str, whole: bool) -> bool:
    """Whether all that is needed of a source is where the plan says. Asks nobody."""
    source = plan.sources[alias]
    folder = Path(source.folder)
    mirror = Mirror.at(folder)
    if mirror is None:
        companions = [companion.name for companion in plan.actions.companions if companion.model == alias]
        return all((folder / name).exists() for name in (CONFIG, *source.files, *companions))
    listing = mirror.listing()
    return listing is not None and all(name in listing for name in source.files) and not _parcels(plan, alias, source, whole)


def _parcels(plan: Plan, alias: str, source: Source, whole: bool) -> list[Parcel]:
    """What is still to be fetched of a source that stands in a mirror: one parcel, or none."""
    mirror = Mirror.at(Path(source.folder))
    listing = None if mirror is None else mirror.listing()
    if mirror is None or listing is None:
        return []
    files = {CONFIG, INDEX, *(companion.name for companion in plan.actions.companions if companion.model == alias)}
    if whole:
        files |= {*source.files, *(name for name in listing if left_out_reason(name) is None)}
    missing = [name for name in sorted(files & listing.keys()) if not mirror.is_whole(name, listing[name].size)]
    parts: dict[str, list[Span]] = {}
    for name, spans in _needed(plan, alias).items():
        if name in missing or name not in listing:
            continue
        file = listing[name]
        lacking = mirror.missing(name, file, [*spans, header_span(mirror, name, file)])
        if total(lacking) > SHARE * file.size:
            missing.append(name)
        elif lacking:
            near = joined(lacking, GAP)
            parts[name] = near if total(near) <= WASTE * total(lacking) else lacking
    return [Parcel(source.reference, source.files, mirror, listing, tuple(sorted(missing)), parts)] if missing or parts else []


def _fetch(parcel: Parcel, progress: bool) -> None:
    model = HubModel(parcel.reference, parcel.mirror.repo, parcel.mirror.commit, progress)
    with parcel.mirror.locked():
        model.fetch(parcel.mirror, {name: parcel.listing[name] for name in parcel.whole})
        with _meter(sum(total(spans) for spans in parcel.parts.values()), progress) as advance:
            for name, spans in parcel.parts.items():
                model.fetch_spans(parcel.mirror, name, parcel.listing[name], spans, advance)


def _announce(parcels: Sequence[Parcel]) -> None:
    """Say what is fetched, before it is."""
    for parcel in parcels:
        print(f"fetching {parcel.described()}", file=sys.stderr)


def _check_room(parcels: Sequence[Parcel]) -> None:
    """There is room for it where it goes. Raises CheckpointError."""
    wholes = sum(parcel.listing[name].size for parcel in parcels for name in parcel.whole)
    parts = sum(total(spans) for parcel in parcels for spans in parcel.parts.values())
    for folder, bytes_, variable in ((hub_cache(), wholes, "HF_HOME"), (cache_folder(), parts, "LAYERCUT_CACHE")):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if bytes_ > free:
            message = f"the download takes {shown_size(bytes_)} in {folder}, where {shown_size(free)} are free"
            raise CheckpointError(message, where=parcels[0].reference, hint=f"set {variable} to a folder on a larger disk")


@contextmanager
def _meter(count: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """A bar on stderr when that is a terminal; gives the function that moves it on."""
    if not (progress and count):
        yield lambda moved: None
        return
    from tqdm import tqdm

    with tqdm(total=count, unit="B", unit_scale=True, desc="fetching", disable=None) as bar:
        yield bar.update
