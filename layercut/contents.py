"""The contents of an output: every byte of every tensor against the sources that its report names. Writes nothing, asks no network.

The report holds no folders. A source is found again by its reference (a folder, a file, or what the Hub cache holds of a commit), and
counts only while its structure has the digest that the report states.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from layercut.architecture import Member, find_stack
from layercut.arithmetic import made_pieces
from layercut.checkpoint import Checkpoint
from layercut.copying import Range, SourceFiles
from layercut.ends import find_ends
from layercut.errors import CheckpointError, LayercutError
from layercut.fetching import holes, spans_of
from layercut.fits import fault_of, path_of
from layercut.header import quoted
from layercut.hubfaults import UnreachableError
from layercut.layout import Cast, Layouter
from layercut.plan import TensorCopy, TensorMade
from layercut.recipe import DTYPES, Recipe
from layercut.report import Report, ReportSource
from layercut.source import find_local, resolve
from layercut.stack import models_of
from layercut.start import end_scalings

# Bytes that are compared at once.
PIECE = 4 << 20
# A single file: what is compared goes by names, not by files.
WHOLE = 1 << 63

Entry = TensorCopy | TensorMade


class DiffersError(Exception):
    """The output is not what its report says."""


class NotCheckedError(Exception):
    """There is nothing to compare with, for the reason given."""


class Content(NamedTuple):
    """What the tensors of an output should hold."""

    entries: tuple[Entry, ...]
    members: Mapping[str, Member]
    maps: Mapping[str, Path]
    """Where the maps are that are folded into layers, by sha256; what is gone is left out."""

    @property
    def lost(self) -> list[str]:
        """Tensors that cannot be computed again, because a map for them is gone."""
        made = [entry for entry in self.entries if isinstance(entry, TensorMade)]
        return [entry.name for entry in made if any(one.sha256 not in self.maps for one in entry.maps)]

    def origin(self, entry: Entry) -> str:
        """Where a tensor comes from, in words."""
        if isinstance(entry, TensorMade):
            return "what its sources give"
        tensors = self.members[entry.model].checkpoint.tensors.values()
        name = next(t.name for t in tensors if (t.file, t.begin, t.end) == (entry.file, entry.begin, entry.end))
        return f"{quoted(name)} of {quoted(entry.model)}"


def check_contents(output: Checkpoint, report: Report, *, progress: bool = False) -> str:
    """Compare all tensors; computed ones are computed again. Memory is bounded by pieces of a few megabytes.

    Returns what was compared, in one line. Raises DiffersError, naming the first tensor that is not what it should be, and
    NotCheckedError when a source is gone or no longer the same.
    """
    recipe = recipe_of(report)
    depth = find_stack(output, recipe.stack_of(report.layers[-1].model) if report.layers else None, recipe.architecture).depth
    if len(report.layers) != depth:
        raise DiffersError(f"the report lists {len(report.layers)} layers, config.json states {depth}")
    content = expected(report)
    for alias, member in content.members.items():
        lacking = holes(member.checkpoint.folder, spans_of(content.entries, alias))
        if lacking:
            reference = report.sources[alias].reference
            raise NotCheckedError(f"of source {quoted(alias)} ({quoted(reference)}) not all is in the local cache: {', '.join(lacking)}")
    wanted = {entry.name: entry for entry in content.entries}
    odd = min(wanted.keys() ^ output.tensors.keys(), default=None)
    if odd is not None:
        raise DiffersError(f"{quoted(odd)} is {'missing' if odd in wanted else 'of no layer that the report lists'}")
    for name, entry in wanted.items():
        found = output.tensors[name]
        if (found.dtype, found.shape) != (entry.dtype, entry.shape):
            kinds = [f"{kind.dtype} {list(kind.shape)}" for kind in (found, entry)]
            raise DiffersError(f"{quoted(name)} is {kinds[0]}, and should be {kinds[1]}")
    differing = list(_compare(output, content, progress))
    if differing:
        entry, at = differing[0]
        more = f" ({len(differing)} tensors differ)" if len(differing) > 1 else ""
        raise DiffersError(f"{quoted(entry.name)} is not {content.origin(entry)}: they differ from byte {at} on{more}")
    made = sum(isinstance(entry, TensorMade) for entry in content.entries) - len(content.lost)
    again = f", {made} of them computed again" if made else ""
    lost = f"; not compared: {', '.join(map(quoted, content.lost))}, the map for which is not in layercut's cache" if content.lost else ""
    return f"{len(wanted) - len(content.lost)} tensors are byte for byte those of the sources{again}{lost}"


def expected(report: Report) -> Content:
    """What an output of this report, which lists a layer, holds. Raises NotCheckedError and DiffersError."""
    recipe = recipe_of(report)
    used = dict.fromkeys(model for layer in report.layers for model in models_of(layer))
    members = {alias: _member(alias, report.sources[alias], recipe) for alias in [*used, *({report.donor} - used.keys())]}
    first, last = report.layers[0].model, report.layers[-1].model
    cast = Cast(*(None if name is None else DTYPES[name] for name in (recipe.dtype, recipe.out_dtype)))
    givers = {alias: members[alias] for alias in used}
    layout = Layouter(givers, report.layers, cast).lay_out(find_ends(members, report.donor, first, last), WHOLE, end_scalings(recipe))
    folds = [fold for layer in report.layers for fold in layer.folds]
    maps = {fold.sha256: path for fold in folds if fault_of(path := path_of(fold.sha256), fold.sha256, fold.size) is None}
    return Content(tuple(tensor for file in layout.files for tensor in file.tensors), members, maps)


def recipe_of(report: Report) -> Recipe:
    """The recipe that a report holds. Raises DiffersError when it is none: anyone may have written it."""
    try:
        return Recipe.model_validate(report.recipe)
    except ValidationError as error:
        raise DiffersError(f"the recipe in the report is none: {error.errors()[0]['msg']}") from None


def _member(alias: str, source: ReportSource, recipe: Recipe) -> Member:
    """A source, when it can be found and is still what it was."""
    try:
        checkpoint = _find(source)
        if checkpoint.digest != source.digest:
            raise CheckpointError("is no longer what it was: config or structure are others")
        member = Member(checkpoint, find_stack(checkpoint, recipe.stack_of(alias), recipe.architecture))
    except (LayercutError, OSError) as error:
        said = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else _without_place(error)
        raise NotCheckedError(f"source {quoted(alias)} ({quoted(source.reference)}) {said}") from None
    if member.stack.depth != source.depth:
        raise DiffersError(f"the report gives {quoted(alias)} {source.depth} layers, it has {member.stack.depth}")
    return member


def _without_place(error: LayercutError) -> str:
    return error.message if error.where is None else f"cannot be opened: {error.message}"


def _find(source: ReportSource) -> Checkpoint:
    """Open a source by its reference, or by its commit in the local Hub cache. Nothing is downloaded."""
    path = Path(os.path.expanduser(source.reference))  # noqa: PTH111 - Path.expanduser raises where there is no such user
    if source.revision is None and os.path.exists(path):  # noqa: PTH110 - Path.exists raises on names that are none
        return resolve(source.reference)
    if source.revision is None:
        raise CheckpointError("is gone")
    try:
        return find_local(source.reference, source.revision)
    except UnreachableError:
        raise CheckpointError("is not in the local Hub cache") from None


def _compare(output: Checkpoint, content: Content, progress: bool) -> Iterator[tuple[Entry, int]]:
    """The tensors that differ, each with the first byte in which it does."""
    from tqdm import tqdm

    total = sum(entry.nbytes for entry in content.entries)
    folders = {alias: member.checkpoint.folder for alias, member in content.members.items()} | dict(content.maps)
    lost = content.lost
    hidden = None if progress else True  # None: hidden where stderr is no terminal
    with ExitStack() as stack, tqdm(total=total, unit="B", unit_scale=True, desc="comparing", disable=hidden) as bar:
        mine, theirs = SourceFiles(stack), SourceFiles(stack)
        for entry in content.entries:
            if entry.name in lost:
                continue
            tensor = output.tensors[entry.name]
            position = 0
            for wanted in _pieces(entry, folders, theirs):
                place = tensor.begin + position
                found = mine.read(Range(output.folder / tensor.file, place, place + len(wanted)))
                if found != wanted:
                    yield entry, position + next(at for at, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other)
                    break
                position += len(wanted)
            bar.update(entry.nbytes)


def _pieces(entry: Entry, folders: Mapping[str, Path], opened: SourceFiles) -> Iterator[bytes | bytearray]:
    """The bytes that a tensor should have."""
    if isinstance(entry, TensorMade):
        yield from made_pieces(entry, folders, opened)
        return
    for begin in range(entry.begin, entry.end, PIECE):
        yield opened.read(Range(folders[entry.model] / entry.file, begin, min(begin + PIECE, entry.end)))
