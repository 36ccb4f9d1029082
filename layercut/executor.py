"""Writes a plan to disk: checks everything, copies and computes in a folder beside the output, then gives it its name. Decides nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from layercut.arithmetic import DTYPES
from layercut.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint, weight_files
from layercut.companions import left_out_reason
from layercut.copying import Range, explained, sync
from layercut.errors import CheckpointError, LayercutError, OutputError
from layercut.fetching import check_here
from layercut.header import ITEM_BITS, encode_header, parse_json, quoted
from layercut.journal import NOTHING, Entry, Expected, Found, Identity, Journal, clear, read_journal, survey
from layercut.plan import Actions, Gather, OutputFile, Part, Plan, TensorCopy, TensorMade
from layercut.report import REPORT, Report, WrittenFile, file_digest, make_report, read_report, write_report
from layercut.sharing import sharing_filesystem, whole_blocks
from layercut.staging import Place, check_place, check_space, check_vacant, publish, recover, resumable, settle, staged, throw_away
from layercut.writer import Writer, pieces, steps_of

__all__ = ["Place", "check_plan", "check_vacant", "execute", "open_sources", "published"]

KEPT = "what was written is kept, run the same command again to go on (or --restart)"


def execute(
    plan: Plan, output: Path, *, overwrite: bool = False, restart: bool = False, progress: bool = True, started: float | None = None
) -> Report:
    """Write the folder that `plan` describes to `output`, layercut.json included, and return its report.

    `started` is the time (seconds since the epoch) at which the work began, for the report; now, when None. Nothing is written
    before every check has passed, and `output` gets its name only when complete. An error or interrupt after the checks keeps what
    was written, and says so; the next call with the same plan goes on from there, unless `restart` throws it away. Raises OutputError
    when the output cannot be written, and CheckpointError when a source is not what the plan says.
    """
    began = time.time()
    try:
        place = Place(output, Path(os.path.realpath(output)))
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
            headers = _headers(plan)
            found = _found(plan, headers, place, identity, restart)
            with _kept_on_error(plan, sources, place, before), closing(_journal(place, identity, found)) as journal:
                with _meter(_total(plan, headers), progress) as advance:
                    Writer(plan, sources, headers, place, journal, found.entries).write_all(advance)
                _check_unchanged(before, plan, sources)
                written, parameters = _check_content(plan, headers, place)
                timings = _timings(began, began if started is None else started)
                report = make_report(plan, files=written, parameters=parameters, timings=timings)
                write_report(place.content, report)
                sync(place.content)
                journal.record(REPORT, len(report.to_json().encode()), file_digest(place.content / REPORT).sha256)
                publish(place, overwrite)
    except OSError as error:
        raise explained(error, error.filename or output) from error
    return report


def published(place: Place, identity: Identity | None = None) -> bool:
    """Whether a run (of this identity, if given) gave the output its name and was killed before it had tidied up."""
    found = read_journal(place.journal)
    last, report = found.entries.get(REPORT), place.target / REPORT
    if last is None or last.digest is None or os.path.lexists(place.content) or identity not in (None, found.identity):
        return False
    return report.is_file() and file_digest(report).sha256 == last.digest


def _timings(began: float, started: float) -> dict[str, float | str]:
    now = time.time()
    stamp = datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")
    return {"started": stamp, "seconds": round(now - started, 3), "write_seconds": round(now - began, 3)}


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


# Checks, before anything is written


def open_sources(plan: Plan) -> dict[str, Checkpoint]:
    """All sources by alias. Raises CheckpointError when one is gone, damaged, not all here, or has another structure than the plan saw."""
    found: dict[str, Checkpoint] = {}
    for alias, source in plan.sources.items():
        found[alias] = open_checkpoint(Path(source.folder), reference=source.reference, revision=source.revision)
        sizes = {name: file.size for name, file in found[alias].files.items()}
        if (found[alias].digest, sizes) != (source.digest, source.files):
            raise CheckpointError("source changed since the plan was made", where=source.folder, hint="plan again")
    check_here(plan)
    return found


def check_plan(plan: Plan, sources: Mapping[str, Checkpoint]) -> None:
    """A plan may come from a file that anyone wrote: it must not read outside the sources, nor write outside the output.

    Raises OutputError, naming what is wrong.
    """
    actions = plan.actions
    if actions.pending:
        raise OutputError(f"this version plans but cannot execute: {'; '.join(quoted(what)[1:-1] for what in actions.pending)}")
    _require(plan.donor in sources, f"plan names the donor {quoted(plan.donor)}, which is no source of it")
    for layer in actions.layers:
        _require(layer.span > 0, f"plan lets layer {layer.index} of {quoted(layer.model)} stand for {layer.span} layers")
        last = layer.model, layer.index + layer.span - 1
        for model, index in ((layer.model, layer.index), last, *((share.model, share.index) for share in layer.shares)):
            known = model in sources and 0 <= index < plan.sources[model].depth
            _require(known, f"plan holds layer {index} of {quoted(model)}, which is not there")
    names = [CONFIG, *([] if actions.index is None else [INDEX]), REPORT]
    names += [file.name for file in actions.files] + [companion.name for companion in actions.companions]
    _check_names([*names, *actions.texts])
    for companion in actions.companions:
        carried = dict(sources[companion.model].companions) if companion.model in sources else {}
        _require(companion.name in carried, f"plan copies {quoted(companion.name)}, which is no file of {quoted(companion.model)}")
        if carried[companion.name] != companion.size:
            path = sources[companion.model].folder / companion.name
            raise CheckpointError("changed since the plan was made", where=path, hint="plan again")
    _check_texts(actions)
    homes = _check_files(actions.files, sources)
    _require(isinstance(parse_json(actions.config, Path(CONFIG), infinity=True), dict), "plan's config.json is not a JSON object")
    _require(actions.index is not None or len(actions.files) == 1, "plan writes several weight files without an index")
    if actions.index is not None:
        _require(weight_files(actions.index, Path(INDEX)) == homes, f"plan's {INDEX} does not list its tensors")


def _check_texts(actions: Actions) -> None:
    """Texts are files that a checkpoint may carry, so that whoever reads the output takes none for weights; all can be encoded."""
    for name in actions.texts:
        reason = left_out_reason(name)
        _require(reason is None, f"plan writes {quoted(name)} from text, which no checkpoint carries ({reason})")
    for name, text in ((CONFIG, actions.config), (INDEX, actions.index or ""), *actions.texts.items()):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            _require(False, f"plan's {quoted(name)} holds half of a surrogate pair at {error.start}, which is no character")


def _check_files(files: Sequence[OutputFile], sources: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Every tensor stands once and comes from where weights are. Gives the file of every tensor."""
    _require(bool(files), "plan writes no weights")
    homes: dict[str, str] = {}
    for file in files:
        _require(file.name.endswith(".safetensors"), f"plan writes weights to {quoted(file.name)}, which is not a .safetensors file")
        for tensor in file.tensors:
            _require(tensor.name not in homes, f"plan writes tensor {quoted(tensor.name)} twice")
            homes[tensor.name] = file.name
            if isinstance(tensor, TensorMade):
                _check_made(tensor, sources)
            else:
                _check_range(f"tensor {quoted(tensor.name)}", tensor, tensor.shape, sources)
    return homes


def _check_names(names: Sequence[str]) -> None:
    """Relative names that stay inside the folder, each once, none a folder of another."""
    seen: set[str] = set()
    for name in names:
        plain = all(part not in ("", ".", "..") for part in name.split("/")) and "\\" not in name and name.isprintable()
        _require(plain, f"plan writes to {quoted(name)}, which is not a plain name inside the output folder")
        _require(name not in seen, f"plan writes {quoted(name)} twice")
        seen.add(name)
    for name in names:
        above = next((str(folder) for folder in Path(name).parents if str(folder) in seen), None)
        _require(above is None, f"plan writes {quoted(above)} as a file and as a folder")


def _check_made(made: TensorMade, sources: Mapping[str, Checkpoint]) -> None:
    what = f"tensor {quoted(made.name)}"
    plain = made.gather is not None and made.gather.dtype == made.dtype and made.compute is None and not made.factors
    dtypes = () if plain else (made.dtype, *([] if made.compute is None else [made.compute]), *(part.dtype for part in made.parts))
    for dtype in dtypes:
        _require(dtype in DTYPES, f"plan computes {what} in {quoted(dtype)}; arithmetic is for {', '.join(DTYPES)}")
    _require(min(made.shape, default=0) >= 0, f"plan gives {what} the shape {list(made.shape)}")
    if made.gather is not None:
        _check_gather(what, made, made.gather, sources)
    _require(bool(made.parts) or made.gather is not None or not made.factors, f"plan multiplies {what}, which has no parts")
    for kind, numbers in (("weight", [part.weight for part in made.parts]), ("factor", made.factors)):
        odd = next((number for number in numbers if not math.isfinite(number)), None)
        _require(odd is None, f"plan computes {what} with the {kind} {odd}")
    for part in made.parts:
        _check_range(what, part, made.shape, sources)


def _check_gather(what: str, made: TensorMade, gather: Gather, sources: Mapping[str, Checkpoint]) -> None:
    """The strips are weights of sources, and as many bytes as the tensor has."""
    _require(gather.dtype in ITEM_BITS and not made.parts, f"plan gathers {what} in {quoted(gather.dtype)}, or beside other parts")
    for strip in gather.strips:
        source = sources.get(strip.model)
        file = None if source is None else source.files.get(strip.file)
        end = strip.begin + (gather.rows - 1) * strip.stride + strip.width
        inside = file is not None and file.data_start <= strip.begin and 0 < strip.width <= strip.stride and end <= file.size
        _require(inside, f"plan gathers {what} from bytes that are not weights of {quoted(strip.file)}")
    whole = math.prod(made.shape) * ITEM_BITS[gather.dtype] == 8 * gather.rows * gather.width and gather.at == 0
    _require(whole, f"plan gathers {gather.rows} rows of {gather.width} bytes for {what} of shape {list(made.shape)}")


def _check_range(what: str, part: TensorCopy | Part, shape: tuple[int, ...], sources: Mapping[str, Checkpoint]) -> None:
    """The bytes are weights of a source, and as many as the tensor has."""
    source = sources.get(part.model)
    file = None if source is None else source.files.get(part.file)
    verb = "copies" if isinstance(part, TensorCopy) else "reads"
    if file is None:
        raise OutputError(f"plan {verb} {what} from {quoted(part.file)}, which is no weight file of {quoted(part.model)}")
    inside = file.data_start <= part.begin <= part.end <= file.size
    _require(inside, f"plan {verb} {what} from bytes {part.begin} to {part.end}, which are not weights of {quoted(part.file)}")
    _require(part.dtype in ITEM_BITS, f"plan gives {what} the unknown dtype {quoted(part.dtype)}")
    whole = min(shape, default=0) >= 0 and math.prod(shape) * ITEM_BITS[part.dtype] == 8 * (part.end - part.begin)
    _require(whole, f"plan {verb} {part.end - part.begin} bytes for {what}, {part.dtype} of shape {list(shape)}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OutputError(message, hint="make the plan again with: layercut plan RECIPE -o FILE")


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
    journal = Journal(place.journal, identity, found)
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
