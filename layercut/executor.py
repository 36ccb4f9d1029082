"""Writes a plan to disk: checks everything, copies into a folder beside the output, then gives it its name. Decides nothing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import NamedTuple

from layercut.checkpoint import CONFIG, INDEX, Checkpoint, open_checkpoint, weight_files
from layercut.copying import Range, SourceFiles, coalesce, explained, new_file, sync, write_bytes
from layercut.errors import CheckpointError, OutputError
from layercut.header import ITEM_BITS, encode_header, parse_json, quoted
from layercut.plan import Plan, TensorCopy
from layercut.report import REPORT, Report, WrittenFile, file_digest, make_report, write_report

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

    @property
    def staging(self) -> Path:
        return self.target.parent / f".{self.target.name}.layercut-partial"

    @property
    def content(self) -> Path:
        """The future output folder. What helps to write it (the lock) lies beside it in `staging`, never in it."""
        return self.staging / "content"

    @property
    def lock(self) -> Path:
        return self.staging / "lock"

    @property
    def old(self) -> Path:
        """Where a folder that is overwritten waits until the new one has its name."""
        return self.target.parent / f".{self.target.name}.layercut-old"


def execute(plan: Plan, output: Path, *, overwrite: bool = False, progress: bool = True, started: float | None = None) -> Report:
    """Write the folder that `plan` describes to `output`, layercut.json included, and return its report.

    `started` is the time (seconds since the epoch) at which the work began, for the report; now, when None. Nothing is written
    before every check has passed, `output` gets its name only when complete, and on any error or interrupt the staging folder
    is removed. Raises OutputError when the output cannot be written, and CheckpointError when a source is not what the plan says.
    """
    began = time.time()
    try:
        place = Place(output, Path(os.path.realpath(output)))
        sources = open_sources(plan)
        check_plan(plan, sources)
        check_place(place, plan, sources)
        check_vacant(place, overwrite)
        headers = _headers(plan)
        total = _total(plan, headers)
        check_space(place, total)
        with _staged(place):
            _recover(place)
            check_vacant(place, overwrite)
            with _meter(total, progress) as advance:
                _write_content(plan, sources, headers, place, advance)
            written, parameters = _check_content(plan, headers, place)
            now = time.time()
            start = began if started is None else started
            stamp = datetime.fromtimestamp(start, timezone.utc).isoformat(timespec="seconds")
            timings: dict[str, float | str] = {"started": stamp, "seconds": round(now - start, 3), "write_seconds": round(now - began, 3)}
            report = make_report(plan, files=written, parameters=parameters, timings=timings)
            write_report(place.content, report)
            _publish(place, overwrite)
    except OSError as error:
        raise explained(error, error.filename or output) from error
    return report


def _headers(plan: Plan) -> dict[str, bytes]:
    """Header of every weight file of the output."""
    return {file.name: encode_header([(t.name, t.dtype, t.shape) for t in file.tensors], file.metadata) for file in plan.actions.files}


def _total(plan: Plan, headers: Mapping[str, bytes]) -> int:
    """Bytes of all files but the report."""
    texts = len(plan.actions.config.encode()) + len((plan.actions.index or "").encode())
    return texts + sum(map(len, headers.values())) + plan.weight_bytes + sum(companion.size for companion in plan.actions.companions)


# Checks, before anything is written


def open_sources(plan: Plan) -> dict[str, Checkpoint]:
    """All sources by alias. Raises CheckpointError when one is gone, damaged, or has another structure than the plan saw."""
    found: dict[str, Checkpoint] = {}
    for alias, source in plan.sources.items():
        found[alias] = open_checkpoint(Path(source.folder), reference=source.reference, revision=source.revision)
        sizes = {name: file.size for name, file in found[alias].files.items()}
        if (found[alias].digest, sizes) != (source.digest, source.files):
            raise CheckpointError("source changed since the plan was made", where=source.folder, hint="plan again")
    return found


def check_plan(plan: Plan, sources: Mapping[str, Checkpoint]) -> None:
    """A plan may come from a file that anyone wrote: it must not read outside the sources, nor write outside the output.

    Raises OutputError, naming what is wrong.
    """
    actions = plan.actions
    _require(plan.donor in sources, f"plan names the donor {quoted(plan.donor)}, which is no source of it")
    for layer in actions.layers:
        known = layer.model in sources and 0 <= layer.index < plan.sources[layer.model].depth
        _require(known, f"plan holds layer {layer.index} of {quoted(layer.model)}, which is not there")
    names = [CONFIG, *([] if actions.index is None else [INDEX]), REPORT]
    names += [file.name for file in actions.files] + [companion.name for companion in actions.companions]
    _check_names(names)
    for companion in actions.companions:
        carried = dict(sources[companion.model].companions) if companion.model in sources else {}
        _require(companion.name in carried, f"plan copies {quoted(companion.name)}, which is no file of {quoted(companion.model)}")
        if carried[companion.name] != companion.size:
            path = sources[companion.model].folder / companion.name
            raise CheckpointError("changed since the plan was made", where=path, hint="plan again")
    _require(bool(actions.files), "plan writes no weights")
    homes: dict[str, str] = {}
    for file in actions.files:
        _require(file.name.endswith(".safetensors"), f"plan writes weights to {quoted(file.name)}, which is not a .safetensors file")
        for tensor in file.tensors:
            _require(tensor.name not in homes, f"plan writes tensor {quoted(tensor.name)} twice")
            homes[tensor.name] = file.name
            _check_copy(tensor, sources)
    _require(isinstance(parse_json(actions.config, Path(CONFIG), infinity=True), dict), "plan's config.json is not a JSON object")
    _require(actions.index is not None or len(actions.files) == 1, "plan writes several weight files without an index")
    if actions.index is not None:
        _require(weight_files(actions.index, Path(INDEX)) == homes, f"plan's {INDEX} does not list its tensors")


def check_place(place: Place, plan: Plan, sources: Mapping[str, Checkpoint]) -> None:
    """The output must be a folder of its own: away from the sources, the current directory, the home, and mount points."""
    shown, target = place
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
    if not place.target.is_dir():
        raise OutputError(f"{place.shown} is a file", hint="choose another folder")
    if not overwrite and any(place.target.iterdir()):
        raise OutputError(f"{place.shown}/ is not empty", hint="choose another folder or pass --overwrite")


def check_space(place: Place, needed: int) -> None:
    """The file system must have `needed` bytes and some more; what a killed run left there will be freed and counts."""
    parent = _existing(place.target.parent)
    free = shutil.disk_usage(parent).free
    for folder, _, names in os.walk(place.staging):
        for name in names:
            free += os.lstat(os.path.join(folder, name)).st_blocks * 512  # noqa: PTH118
    if needed + SLACK > free:
        raise OutputError(f"needs {_size(needed + SLACK)}, {_size(free)} free on {parent}", hint="free some space or choose another folder")


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


def _check_copy(tensor: TensorCopy, sources: Mapping[str, Checkpoint]) -> None:
    source = sources.get(tensor.model)
    file = None if source is None else source.files.get(tensor.file)
    what = f"tensor {quoted(tensor.name)}"
    if file is None:
        raise OutputError(f"plan copies {what} from {quoted(tensor.file)}, which is no weight file of {quoted(tensor.model)}")
    inside = file.data_start <= tensor.begin <= tensor.end <= file.size
    _require(inside, f"plan copies {what} from bytes {tensor.begin} to {tensor.end}, which are not weights of {quoted(tensor.file)}")
    _require(tensor.dtype in ITEM_BITS, f"plan gives {what} the unknown dtype {quoted(tensor.dtype)}")
    whole = min(tensor.shape, default=0) >= 0 and prod(tensor.shape) * ITEM_BITS[tensor.dtype] == 8 * (tensor.end - tensor.begin)
    _require(whole, f"plan copies {tensor.end - tensor.begin} bytes for {what}, {tensor.dtype} of shape {list(tensor.shape)}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OutputError(message, hint="make the plan again with: layercut plan RECIPE -o FILE")


def _existing(path: Path) -> Path:
    """The nearest path upwards that exists."""
    return next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), path)


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path` is `folder` or lies in it. By identity, not by name: names differ over bind mounts and letter case."""
    return folder.exists() and any(above.exists() and above.samefile(folder) for above in (path, *path.parents))


def _size(count: int) -> str:
    """Bytes for people, in the units in which disks and models are sold."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


# Staging: a hidden folder beside the output, held by one run at a time


@contextmanager
def _staged(place: Place) -> Iterator[None]:
    """An empty content folder that no other run touches; afterwards nothing of the staging is left, nor of parents made in vain."""
    made = [folder for folder in reversed(place.target.parents) if not folder.exists()]
    try:
        for folder in made:
            folder.mkdir()
        lock = _take_lock(place)
        try:
            # An earlier run that was killed leaves its content. Here is the place to go on from it instead.
            if os.path.lexists(place.content):
                shutil.rmtree(place.content)
            place.content.mkdir()
            yield
        finally:
            shutil.rmtree(place.content, ignore_errors=True)
            # The lock goes last, so that a run which starts meanwhile either waits its turn or finds nothing.
            place.lock.unlink(missing_ok=True)
            with suppress(OSError):
                place.staging.rmdir()
            os.close(lock)
    except BaseException:
        with suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()
        raise


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
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.lstat(place.lock)):
                return lock
        os.close(lock)
    raise OutputError(f"another layercut is writing {place.shown}", hint="wait for it or choose another folder")


def _recover(place: Place) -> None:
    """Undo the first half of an overwrite that was killed between its two renames."""
    if place.old.is_dir() and not os.path.lexists(place.target):
        place.old.rename(place.target)


def _publish(place: Place, overwrite: bool) -> None:
    """Give the content its name. An older folder steps aside first, comes back when this fails, and goes when it is done."""
    replaces = overwrite and place.target.is_dir() and any(place.target.iterdir())
    if replaces and os.path.lexists(place.old):
        shutil.rmtree(place.old)
    try:
        if replaces:
            place.target.rename(place.old)
        # Without permission to replace, a folder that was filled in the meantime makes this fail.
        place.content.rename(place.target)
    except BaseException:
        if replaces:
            _recover(place)
        raise
    sync(place.target.parent)
    if replaces:
        try:
            shutil.rmtree(place.old)
        except OSError as error:
            message = f"{place.shown} is complete, but the folder that it replaces could not be removed: {error.strerror}"
            raise OutputError(message, hint=f"remove {place.old}") from error


# Writing


def _write_content(
    plan: Plan, sources: Mapping[str, Checkpoint], headers: Mapping[str, bytes], place: Place, advance: Callable[[int], object]
) -> None:
    """All files but the report, in plan order and the index last, each on the disk before the next begins."""
    actions = plan.actions
    with ExitStack() as stack:
        opened = SourceFiles(stack)

        def write(name: str, start: bytes, ranges: Iterable[Range] = ()) -> None:
            with new_file(place.content / name, place.shown / name) as target:
                write_bytes(target, start)
                advance(len(start))
                position = len(start)
                for part in coalesce(ranges):
                    opened.copy(part, target, position, advance)
                    position += part.end - part.begin

        write(CONFIG, actions.config.encode())
        for file in actions.files:
            places = (Range(sources[t.model].folder / t.file, t.begin, t.end) for t in file.tensors)
            write(file.name, headers[file.name], places)
        for companion in actions.companions:
            write(companion.name, b"", [Range(sources[companion.model].folder / companion.name, 0, companion.size)])
        if actions.index is not None:
            write(INDEX, actions.index.encode())
        opened.check_unchanged()
    for folder, _, _ in os.walk(place.content):
        sync(Path(folder))


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
        size = len(header) + sum(tensor.end - tensor.begin for tensor in file.tensors)
        if found is None or (found.size, found.digest) != (size, hashlib.sha256(header).hexdigest()):
            raise OutputError("is not what was written", where=place.shown / file.name, hint="check the disk and run again")
        files[file.name] = WrittenFile(bytes=size, header_sha256=found.digest)
    for companion in actions.companions:
        files[companion.name] = file_digest(place.content / companion.name)
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
