"""Writes a plan to disk: checks everything, copies and computes in a folder beside the output, then gives it its name. Decides nothing."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from layercut.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint
from layercut.copying import Range, explained, sync
from layercut.errors import CheckpointError, LayercutError, OutputError
from layercut.header import encode_header
from layercut.journal import NOTHING, Entry, Expected, Found, Identity, Journal, clear, read_journal, survey
from layercut.plan import Plan
from layercut.report import REPORT, Report, WrittenFile, file_digest, make_report, read_report, write_report
from layercut.sharing import sharing_filesystem, whole_blocks
from layercut.staging import Place, check_place, check_space, check_vacant, publish, recover, resumable, settle, staged, throw_away
from layercut.vetting import check_plan, open_sources
from layercut.writer import Writer, pieces, steps_of

__all__ = ["Place", "check_vacant", "execute", "published"]

KEPT = "what was written is kept, run the same command again to go on (or --restart)"


def execute(
    plan: Plan,
    output: Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    durable: bool = True,
    progress: bool = True,
    started: float | None = None,
) -> Report:
    """Write the folder that `plan` describes to `output`, layercut.json included, and return its report.

    Nothing is written before every check has passed, and `output` gets its name only when complete. An error or interrupt after the
    checks keeps what was written, and says so; the next call with the same plan goes on from there, unless `restart` throws it away.
    Without `durable` the disk is not waited for: the promises then hold after a kill, not after a power cut. `started` (seconds since the
    epoch) is when the work began, for the report. Raises OutputError when the output cannot be written, and CheckpointError when a
    source is not what the plan says.
    """
    began = time.time()
    try:
        place = Place(output, Path(os.path.realpath(output)), durable)
        sources = open_sources(plan)
        check_plan(plan, sources)
        check_place(place, sources)
        if restart or not published(place):
            check_vacant(place, overwrite)
        before = _seen(plan, sources)
        identity = Identity(plan.digest, hashlib.sha256(json.dumps(sorted(before)).encode()).hexdigest())
        with staged(place):
            recover(place)
            if not restart and published(place, identity):
                settle(place, overwrite)
                return read_report(place.target)
            check_vacant(place, overwrite)
            found = _found(plan, headers := _headers(plan), place, identity, restart)
            with _kept_on_error(plan, sources, place, before), closing(_journal(place, identity, found)) as journal:
                with _meter(_total(plan, headers), progress) as advance:
                    Writer(plan, sources, headers, place, journal, found.entries).write_all(advance)
                _check_unchanged(before, plan, sources)
                report = _reported(plan, headers, place, _Clock(began, started or began))
                journal.record(REPORT, len(report.to_json().encode()), file_digest(place.content / REPORT).sha256)
                publish(place, overwrite)
                return report
    except OSError as error:
        raise explained(error, error.filename or output) from error


def published(place: Place, identity: Identity | None = None) -> bool:
    """Whether a run (of this identity, if given) gave the output its name and was killed before it had tidied up."""
    found = read_journal(place.journal)
    last, report = found.entries.get(REPORT), place.target / REPORT
    if last is None or last.digest is None or os.path.lexists(place.content) or identity not in (None, found.identity):
        return False
    return os.access(report, os.R_OK) and report.is_file() and file_digest(report).sha256 == last.digest


class _Clock(NamedTuple):
    """When the writing began, and when the whole work did; in seconds since the epoch."""

    began: float
    started: float

    def timings(self) -> dict[str, float | str]:
        now = time.time()
        stamp = datetime.fromtimestamp(self.started, timezone.utc).isoformat(timespec="seconds")
        return {"started": stamp, "seconds": round(now - self.started, 3), "write_seconds": round(now - self.began, 3)}


def _reported(plan: Plan, headers: Mapping[str, bytes], place: Place, clock: _Clock) -> Report:
    """Look at what was written, and put the report beside it."""
    written, parameters = _check_content(plan, headers, place)
    report = make_report(plan, files=written, parameters=parameters, timings=clock.timings())
    write_report(place.content, report, place.durable)
    if place.durable:
        sync(place.content)
    return report


def _headers(plan: Plan) -> dict[str, bytes]:
    """Header of every weight file of the output."""
    return {
        file.name: encode_header([(t.name, t.dtype, t.shape) for t in file.tensors], file.metadata, file.header_size)
        for file in plan.actions.files
    }


def _shared(plan: Plan, headers: Mapping[str, bytes], place: Place, kept: Mapping[str, int]) -> int:
    """Bytes of what is not kept that take no room, because the filesystem lets them share blocks with their sources."""
    folders = {alias: Path(source.folder) for alias, source in plan.sources.items()}
    blocks: dict[Path, int] = {}
    for alias, folder in folders.items():
        names = [folder / name for name in plan.sources[alias].files]
        filesystem = sharing_filesystem(place.target, names)
        blocks |= dict.fromkeys(names, filesystem.block) if filesystem is not None else {}
    shared = 0
    for file in plan.actions.files if blocks else ():
        for piece in pieces(steps_of(file.tensors, folders), len(headers[file.name]), kept.get(file.name, 0)):
            if isinstance(piece.step, Range) and piece.step.path in blocks:
                shared += whole_blocks(piece.step.begin, piece.step.end, piece.offset, blocks[piece.step.path])
    return shared


def _total(plan: Plan, headers: Mapping[str, bytes]) -> int:
    """Bytes of all files but the report."""
    actions = plan.actions
    texts = sum(len(text.encode()) for text in (actions.config, actions.index or "", *actions.texts.values()))
    return texts + sum(map(len, headers.values())) + plan.weight_bytes + sum(companion.size for companion in actions.companions)


# What an earlier run left


class _Seen(NamedTuple):
    """A source file as it was found: while none of this changes, neither do its bytes."""

    model: str
    path: str
    real: str
    size: int
    time: int
    inode: int


def _seen(plan: Plan, sources: Mapping[str, Checkpoint]) -> list[_Seen]:
    """Every file that may be read. Raises CheckpointError when one is gone."""
    found = []
    for alias, checkpoint in sources.items():
        for name in (*checkpoint.files, *(companion.name for companion in plan.actions.companions if companion.model == alias)):
            path = checkpoint.folder / name
            try:
                state = path.stat()
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
            found.append(_Seen(alias, str(path), os.path.realpath(path), state.st_size, state.st_mtime_ns, state.st_ino))
    return found


def _check_unchanged(before: Sequence[_Seen], plan: Plan, sources: Mapping[str, Checkpoint]) -> None:
    """What an earlier run copied, and what this one did, must be of the same bytes to the end."""
    for was, now in zip(before, _seen(plan, sources), strict=True):
        if was != now:
            raise CheckpointError("was changed while it was copied", where=was.path, hint="run again when nothing writes to it")


def _found(plan: Plan, headers: Mapping[str, bytes], place: Place, identity: Identity, restart: bool) -> Found:
    """What of the staging can be kept. There must be room for the rest; what cannot be kept is thrown away. Raises OutputError."""
    found = read_journal(place.journal)
    unlike = identity.unlike(found.identity)
    if unlike is None and not restart:
        kept = survey(place.content, found.entries, _expected(plan, headers))
        found = found._replace(entries=kept)
    else:
        found = NOTHING
    sizes = {name: entry.size for name, entry in found.entries.items()}
    check_space(place, _total(plan, headers) - sum(sizes.values()) - _shared(plan, headers, place, sizes), sizes)
    if found.identity is None:
        if unlike is not None and not restart and place.content.is_dir() and any(place.content.iterdir()):
            print(f"{place.staging}: what an earlier run wrote is thrown away: {unlike}", file=sys.stderr)
        throw_away(place)
    return found


def _expected(plan: Plan, headers: Mapping[str, bytes]) -> dict[str, Expected]:
    """Every file of the output but the report."""
    actions = plan.actions
    texts = {CONFIG: actions.config, **actions.texts, **({} if actions.index is None else {INDEX: actions.index})}
    found = {name: Expected(len(text.encode())) for name, text in texts.items()}
    found |= {companion.name: Expected(companion.size) for companion in actions.companions}
    for file in actions.files:
        found[file.name] = Expected(len(headers[file.name]) + sum(tensor.nbytes for tensor in file.tensors), headers[file.name])
    return found


def _journal(place: Place, identity: Identity, found: Found) -> Journal:
    """The journal, and a content folder that holds what is kept and nothing else."""
    listed = {name for name, entry in read_journal(place.journal).entries.items() if entry != Entry(0)}
    journal = Journal(place.journal, identity, found, place.durable)
    try:
        for name in sorted(listed - found.entries.keys()):
            journal.record(name, 0)  # before it is written again: half of it might pass for the whole
        place.content.mkdir(exist_ok=True)
        clear(place.content, found.entries.keys())
    except BaseException:
        journal.close()
        raise
    return journal


@contextmanager
def _kept_on_error(plan: Plan, sources: Mapping[str, Checkpoint], place: Place, before: Sequence[_Seen]) -> Iterator[None]:
    """Says in the error that the same command goes on from what was written. Where it could not, that goes."""
    try:
        yield
    except (LayercutError, OSError, KeyboardInterrupt) as error:
        with suppress(CheckpointError):  # a source that is gone may come back
            if _seen(plan, sources) != before:
                place.journal.unlink(missing_ok=True)
        if not resumable(place):
            raise
        if isinstance(error, KeyboardInterrupt):
            error.args = (KEPT,)
            raise
        told = explained(error, error.filename or place.shown) if isinstance(error, OSError) else error
        told.hint = KEPT if told.hint is None else f"{told.hint.removesuffix(' and run again')}; {KEPT}"
        told.args = (str(told),)
        raise told from (error.__cause__ if told is error else error)


def _check_content(plan: Plan, headers: Mapping[str, bytes], place: Place) -> tuple[dict[str, WrittenFile], int]:
    """Read back what was written: every file as the report lists it, and the number of elements of all tensors."""
    actions = plan.actions
    try:
        checkpoint = open_checkpoint(place.content)
    except CheckpointError as error:
        raise OutputError(f"what was written cannot be read back: {error}", where=place.shown) from error
    files = {CONFIG: file_digest(place.content / CONFIG)}
    for file in actions.files:
        found, header = checkpoint.files.get(file.name), headers[file.name]
        size = len(header) + sum(tensor.nbytes for tensor in file.tensors)
        if found is None or (found.size, found.digest) != (size, hashlib.sha256(header).hexdigest()):
            raise OutputError("is not what was written", where=place.shown / file.name, hint="check the disk and run again")
        files[file.name] = WrittenFile(bytes=size, header_sha256=found.digest)
    for name in (*(companion.name for companion in actions.companions), *sorted(actions.texts)):
        files[name] = file_digest(place.content / name)
    if actions.index is not None:
        files[INDEX] = file_digest(place.content / INDEX)
    return files, checkpoint.parameters


@contextmanager
def _meter(total: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """A bar on stderr when that is a terminal; gives the function that moves it on."""
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
        yield bar.update
