"""Shards: how the tensors of an output, in their order, are spread over files. Knows nothing of models, and moves no bytes.

Where the filesystem shares blocks, a copy takes no room when it stands at the same place in its block as in its source; elsewhere it
goes to the disk without being copied in memory. So a file also ends before a long run of consecutive source bytes that would be out of
step, and the next header is padded to meet it. Order and bytes of the tensors stay what they are.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from layercut.header import ITEM_BITS, encode_header
from layercut.plan import OutputFile, TensorCopy, TensorMade

WEIGHTS = "model.safetensors"
HEADER_UNIT = 8
"""A header takes a multiple of these bytes, so that every dtype can be read in place."""

Entry = TensorCopy | TensorMade


class Grid(NamedTuple):
    """What copies from a model have to be in step with."""

    block: int
    """Bytes of a block: a copy is in step when it stands at the same place in its block as in its source."""
    large: int
    """Bytes of a run for which another file is begun; shorter ones are copied where they stand out of step."""

    @classmethod
    def shared(cls, block: int) -> Grid:
        """For a filesystem that shares blocks of this size: what is not in step takes room."""
        return cls(block, 8 << 20)

    @classmethod
    def direct(cls) -> Grid:
        """For any other, whose disk takes aligned memory as it is: what is not in step takes time, so files stay large.

        A block here is the alignment that most disks ask for, and that of the layers of almost every model: their widths are multiples
        of 256.
        """
        return cls(512, 256 << 20)


class Run(NamedTuple):
    """Tensors of one file that follow each other in a source file, too."""

    model: str
    begin: int
    """First byte in the source file."""
    at: int
    """First byte in the output file, counted from the end of its header."""
    nbytes: int


def shard(entries: Sequence[Entry], limit: int, metadata: dict[str, str], grids: Mapping[str, Grid]) -> Iterator[OutputFile]:
    """Fill files in order up to `limit` bytes of tensors; a larger tensor gets a file of its own.

    `grids` gives, for every model, what is worth being in step with; without any it changes nothing.
    """
    groups = list(_groups(entries, limit, grids))
    for number, group in enumerate(groups, 1):
        name = WEIGHTS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = _aligned(group)
        yield OutputFile(name=name, metadata=metadata, tensors=tuple(tensors), header_size=_header_size(tensors, metadata, grids))


def index_text(files: Sequence[OutputFile]) -> str | None:
    """Text of model.safetensors.index.json; None when there is one file."""
    if len(files) == 1:
        return None
    names = {tensor.name: file.name for file in files for tensor in file.tensors}
    size = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}, indent=2) + "\n"


def _groups(entries: Sequence[Entry], limit: int, grids: Mapping[str, Grid]) -> Iterator[list[Entry]]:
    """The tensors of each file, in natural order."""
    group: list[Entry] = []
    position = 0
    step: int | None = None  # where in a block the weights of this file have to begin; None while it does not matter
    for entry, ahead in zip(entries, _ahead(entries), strict=True):
        nbytes = entry.nbytes
        grid, begin = _grid(entry, ahead, grids)
        meets = _meets(begin, position, step, grid)
        if group and (position + nbytes > limit or meets is False):
            yield group
            group, position, step = [], 0, None
            meets = _meets(begin, 0, None, grid)
        if meets and grid is not None:
            step = (begin - position) % grid.block
        group.append(entry)
        position += nbytes
    if group:
        yield group


def _grid(entry: Entry, ahead: int, grids: Mapping[str, Grid]) -> tuple[Grid | None, int]:
    """What a tensor has to be in step with, None where nothing is gained by it, and where it begins in its source."""
    grid = grids.get(entry.model) if isinstance(entry, TensorCopy) else None
    return grid if grid is not None and ahead >= grid.large else None, entry.begin if isinstance(entry, TensorCopy) else 0


def _meets(begin: int, position: int, step: int | None, grid: Grid | None) -> bool | None:
    """Whether a tensor at `position` is in step with its source; None when it need not or cannot be, whatever is done."""
    if grid is None:
        return None
    here = (begin - position) % grid.block
    if here == step or (step is None and here % HEADER_UNIT == 0):
        return True
    return None if begin % HEADER_UNIT else False


def _ahead(entries: Sequence[Entry]) -> list[int]:
    """Bytes of the run that every entry is in, from that entry on."""
    ahead: list[int] = []
    after: Entry | None = None
    for entry in reversed(entries):
        ahead.append(entry.nbytes + (ahead[-1] if _joins(entry, after) else 0))
        after = entry
    return ahead[::-1]


def _joins(entry: Entry, after: Entry | None) -> bool:
    if isinstance(entry, TensorMade) or isinstance(after, TensorMade) or after is None:
        return False
    return entry.end == after.begin and (entry.model, entry.file) == (after.model, after.file)


def _aligned(group: list[Entry]) -> list[Entry]:
    """Natural order; where that would put a tensor at an address that its dtype cannot be read from, the widest dtypes come first."""
    position = 0
    for entry in group:
        if position % max(1, ITEM_BITS[entry.dtype] // 8):
            return sorted(group, key=lambda e: -ITEM_BITS[e.dtype])
        position += entry.nbytes
    return group


def _header_size(tensors: Sequence[Entry], metadata: Mapping[str, str], grids: Mapping[str, Grid]) -> int | None:
    """Bytes of the header that puts most of the file in step; None when that is not worth it."""
    met: dict[tuple[Grid, int], int] = defaultdict(int)
    for run in _runs(tensors):
        grid = grids.get(run.model)
        if grid is not None and (run.begin - run.at) % HEADER_UNIT == 0:
            met[grid, (run.begin - run.at) % grid.block] += max(0, run.nbytes - grid.block)
    if not met:
        return None
    grid, step = max(sorted(met), key=lambda place: met[place])
    if met[grid, step] < grid.large - grid.block:
        return None
    needed = len(encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors], metadata))
    return needed + (step - needed) % grid.block


def _runs(tensors: Sequence[Entry]) -> Iterator[Run]:
    """Copies that lie together in the source, joined."""
    position = 0
    before: Entry | None = None
    for tensor, ahead in zip(tensors, _ahead(tensors), strict=True):
        if isinstance(tensor, TensorCopy) and not (before is not None and _joins(before, tensor)):
            yield Run(tensor.model, tensor.begin, position, ahead)
        before = tensor
        position += tensor.nbytes
