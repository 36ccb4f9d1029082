"""Writes the files of a plan, records what is on the disk, and goes on in the middle of a file. Checks nothing."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from math import lcm
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from layercut.arithmetic import write_made
from layercut.checkpoint import CONFIG, INDEX, Checkpoint
from layercut.copying import Range, SourceFiles, coalesce, new_file, sync, write_bytes
from layercut.errors import OutputError
from layercut.hands import Job, together
from layercut.header import ITEM_BITS
from layercut.journal import Entry, Journal, continued_file
from layercut.plan import Grown, OutputFile, Plan, TensorCopy, TensorMade
from layercut.report import file_digest
from layercut.staging import Place

# A longer file is put on the disk, and recorded, at multiples of this, but only when PAUSE has passed: so a crash costs a second or
# two of work on any disk, and a fast one does not wait at each of them. In bytes and seconds.
MARK = 128 << 20
PAUSE = 1.0
# Weight files written at the same time: while one waits for its disk or copies in memory, another keeps the disk busy. Outputs of less
# than SMALL bytes are written one file after the other.
HANDS = 4
SMALL = 256 << 20

Step = Range | TensorMade


class Piece(NamedTuple):
    """Some bytes of a file, and where in it they begin and end."""

    step: Step
    offset: int
    end: int


class Writer(NamedTuple):
    """What is written where, and what is there already."""

    plan: Plan
    sources: Mapping[str, Checkpoint]
    headers: Mapping[str, bytes]
    """Header of every weight file."""
    place: Place
    journal: Journal
    kept: Mapping[str, Entry]
    """What an earlier run left of the files."""

    def write_all(self, advance: Callable[[int], object]) -> None:
        """All files but the report: config.json, the weights, others, and the index last; each is on the disk before it is recorded.

        Large weight files are written HANDS at a time, tensors are computed one at a time. `advance` is called with the number of bytes
        after every step, and for what is kept, by one thread at a time. Raises OutputError, and CheckpointError when a source cannot be
        read or was changed.
        """
        actions = self.plan.actions
        folders = {alias: checkpoint.folder for alias, checkpoint in self.sources.items()}
        folders |= {digest: Path(path) for digest, path in self.plan.maps.items()}
        advancing, computing = Lock(), Lock()
        with ExitStack() as stack:
            opened = SourceFiles(stack, self.place.durable)

            def write(name: str, start: bytes, steps: Iterable[Step] = (), check: Callable[[], None] = lambda: None) -> None:
                def on(count: int) -> None:
                    check()
                    with advancing:
                        advance(count)

                def put(piece: Piece, target: int) -> None:
                    if isinstance(piece.step, Range):
                        opened.copy(piece.step, target, piece.offset, on)
                    else:
                        with computing:
                            self._compute(piece.step, folders, opened, target, piece.offset, on)

                self._write(name, start, steps, put, on)

            def job(file: OutputFile) -> Job:
                return lambda check: write(file.name, self.headers[file.name], steps_of(file.tensors, folders), check)

            write(CONFIG, actions.config.encode())
            hands = min(HANDS, os.cpu_count() or 1) if self.plan.weight_bytes >= SMALL else 1
            together([job(file) for file in actions.files], hands)
            for companion in actions.companions:
                write(companion.name, b"", [Range(folders[companion.model] / companion.name, 0, companion.size)])
            for name, text in sorted(actions.texts.items()):
                write(name, text.encode())
            if actions.index is not None:
                write(INDEX, actions.index.encode())
            opened.check_unchanged()

    def _write(
        self, name: str, start: bytes, steps: Iterable[Step], put: Callable[[Piece, int], None], advance: Callable[[int], object]
    ) -> None:
        """Put one file on the disk, or what is missing of it, and record it."""
        path, shown = self.place.content / name, self.place.shown / name
        kept = self.kept.get(name)
        if kept is not None and kept.digest is not None:
            advance(kept.size)
            return
        position = len(start) if kept is None else kept.size
        durable = self.place.durable
        with new_file(path, shown, durable) if kept is None else continued_file(path, shown, kept.size, durable) as target:
            if kept is None:
                write_bytes(target, start)
            advance(position)
            recorded, since = position, time.monotonic()
            for piece in pieces(steps, len(start), position):
                put(piece, target)
                position = piece.end
                if position // MARK > recorded // MARK and time.monotonic() >= since + PAUSE:
                    if durable:
                        os.fsync(target)
                        self._sync(path)
                    self.journal.record(name, position)
                    recorded, since = position, time.monotonic()
        if durable:
            self._sync(path)
        self.journal.record(name, position, hashlib.sha256(start).hexdigest() if name in self.headers else file_digest(path).sha256)

    def _compute(
        self, made: TensorMade, folders: Mapping[str, Path], opened: SourceFiles, target: int, offset: int, advance: Callable[[int], object]
    ) -> None:
        try:
            write_made(made, folders, opened, target, offset, advance)
        except OutputError:
            # Not the disk but the numbers: the same command would end here again, so there is nothing to go on from.
            self.place.journal.unlink(missing_ok=True)
            raise

    def _sync(self, path: Path) -> None:
        """Put the name of a file on the disk."""
        for folder in path.parents:
            sync(folder)
            if folder == self.place.staging:
                return


def steps_of(tensors: Iterable[TensorCopy | TensorMade], folders: Mapping[str, Path]) -> Iterator[Step]:
    """Tensors in the order of their bytes, with copies that lie together in the source joined."""
    copies: list[Range] = []
    for tensor in tensors:
        if isinstance(tensor, TensorMade):
            yield from coalesce(copies)
            copies.clear()
            yield tensor
        else:
            copies.append(Range(folders[tensor.model] / tensor.file, tensor.begin, tensor.end))
    yield from coalesce(copies)


def pieces(steps: Iterable[Step], offset: int, resume: int) -> Iterator[Piece]:
    """The steps, of which the first begins at `offset` of the file, without what lies in its first `resume` bytes.

    They are cut at multiples of MARK in the file, where progress is recorded. These are multiples of any block, so whole blocks stay whole.
    What maps go into is not cut: each of its bytes depends on all of the tensor.
    """
    for step in steps:
        size = step.nbytes if isinstance(step, TensorMade) else step.end - step.begin
        width = _least(step.dtype) if isinstance(step, TensorMade) else 1
        done = min(size, max(0, resume - offset))
        done -= done % width
        if isinstance(step, TensorMade) and step.maps:
            if done < size:
                yield Piece(step, offset, offset + size)
            offset += size
            continue
        while done < size:
            room = MARK - (offset + done) % MARK
            count = min(size - done, max(room - room % width, width))
            yield Piece(_cut(step, done, done + count), offset + done, offset + done + count)
            done += count
        offset += size


def _least(dtype: str) -> int:
    """Bytes that hold whole elements: of one element, or of several where one is no whole byte."""
    return lcm(8, ITEM_BITS[dtype]) // 8


def _cut(step: Step, first: int, last: int) -> Step:
    """The bytes `first` to `last` of a step, as a step of its own. Arithmetic is elementwise, so this gives the same bytes."""
    if isinstance(step, Range):
        return step._replace(begin=step.begin + first, end=step.begin + last)
    if (first, last) == (0, step.nbytes):
        return step
    begin, end = 8 * first // ITEM_BITS[step.dtype], 8 * last // ITEM_BITS[step.dtype]
    if step.gather is not None:
        at = step.gather.at + begin * ITEM_BITS[step.gather.dtype] // 8
        return step.model_copy(update={"shape": (end - begin,), "gather": step.gather.model_copy(update={"at": at})})
    amend = None if step.amend is None else step.amend.model_copy(update={"at": step.amend.at + begin})
    if isinstance(amend, Grown):
        return step.model_copy(update={"shape": (end - begin,), "amend": amend})
    parts = []
    for part in step.parts:
        each = ITEM_BITS[part.dtype] // 8
        parts.append(part.model_copy(update={"begin": part.begin + begin * each, "end": part.begin + end * each}))
    return step.model_copy(update={"shape": (end - begin,), "parts": tuple(parts), "amend": amend})
