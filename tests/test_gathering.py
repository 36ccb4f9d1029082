"""Gathering: whatever the strips, the dtype and the sizes of pieces, the bytes are those that slicing gives."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from layercut import gathering
from layercut.checkpoint import open_checkpoint
from layercut.copying import Range, SourceFiles
from layercut.errors import CheckpointError
from layercut.gathering import FEW, PIECE, gathered_pieces
from layercut.plan import Gather, Strip

START = 5
"""Bytes of a file before its table."""


class Counting(SourceFiles):
    """Notes what is read."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack)
        self.asked: list[tuple[str, int, int]] = []

    def read(self, part: Range) -> bytearray:
        self.asked.append((part.path.name, part.begin, part.end))
        return super().read(part)


def table(folder: Path, name: str, rows: int, stride: int, seed: int = 0) -> NDArray[numpy.uint8]:
    """A file with a table of random bytes between others."""
    found = numpy.random.default_rng(seed).integers(0, 256, (rows, stride), dtype=numpy.uint8)
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"#" * START + found.tobytes() + b"#")
    return found


def strip(model: str, file: str, first: int, width: int, stride: int) -> Strip:
    return Strip(model=model, file=file, begin=START + first, stride=stride, width=width)


def pieces(gather: Gather, size: int, folders: dict[str, Path]) -> list[bytes]:
    with ExitStack() as stack:
        return [bytes(piece) for piece in gathered_pieces(gather, size, folders, SourceFiles(stack))]


@st.composite
def asked(draw: st.DrawFn) -> dict[str, Any]:
    """Rows, the columns that every strip takes of which of two tables, the part that is wanted, and the sizes of pieces."""
    rows, strides = draw(st.integers(1, 12)), draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    strips = []
    for _ in range(draw(st.integers(1, 5))):
        which = draw(st.integers(0, 1))
        first = draw(st.integers(0, strides[which] - 1))
        strips.append((which, first, draw(st.integers(1, strides[which] - first))))
    size = rows * sum(width for _, _, width in strips)
    at = draw(st.integers(0, size))
    wanted = {"rows": rows, "strides": strides, "strips": strips, "at": at, "size": draw(st.integers(0, size - at))}
    return {**wanted, "piece": draw(st.integers(1, 40)), "few": draw(st.sampled_from([1, 2, 100]))}


@given(asked())
def test_any_part_of_any_strips(tmp_path_factory: pytest.TempPathFactory, asked: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("gather")
    tables = [
        table(folder / name, f"{name}.bin", asked["rows"], stride, seed)
        for seed, (name, stride) in enumerate(zip("ab", asked["strides"], strict=True))
    ]
    strips = tuple(
        strip("ab"[which], f"{'ab'[which]}.bin", first, width, asked["strides"][which]) for which, first, width in asked["strips"]
    )
    expected = numpy.hstack([tables[which][:, first : first + width] for which, first, width in asked["strips"]]).tobytes()
    gather = Gather(dtype="U8", rows=asked["rows"], strips=strips, at=asked["at"])
    assert gather.width * asked["rows"] == len(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering, "PIECE", asked["piece"])
        patch.setattr(gathering, "FEW", asked["few"])
        found = pieces(gather, asked["size"], {name: folder / name for name in "ab"})
    assert b"".join(found) == expected[asked["at"] : asked["at"] + asked["size"]]
    assert all(0 < len(piece) <= asked["piece"] for piece in found) and len({len(piece) for piece in found[:-1]}) < 2


DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_dtype_against_the_library(dtype: str, axis: int, tmp_path: Path) -> None:
    """Layers 2, 0 and 1 again, 1 of a tensor with four parts along an axis, as `safe_open` and torch slice it."""
    order, part = (2, 0, 1, 1), 3
    shape = [2, 5, 4]
    shape[axis] = 4 * part
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(axis)).to(getattr(torch, dtype))
    save_file({"before": torch.zeros(3), "table": values.contiguous()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    entry = open_checkpoint(tmp_path).tensors["table"]
    stride = (entry.end - entry.begin) // int(numpy.prod(shape[:axis], dtype=int))
    strips = [Strip(model="m", file=entry.file, begin=entry.begin + at * stride // 4, stride=stride, width=stride // 4) for at in order]
    gather = Gather(dtype=entry.dtype, rows=int(numpy.prod(shape[:axis], dtype=int)), strips=tuple(strips))
    found = b"".join(pieces(gather, gather.width * gather.rows, {"m": tmp_path}))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        whole = file.get_tensor("table")
    wanted = torch.cat([whole.narrow(axis, at * part, part) for at in order], axis).contiguous()
    assert found == wanted.view(torch.uint8).numpy().tobytes()


def test_few_long_rows_are_read_without_what_lies_between(tmp_path: Path) -> None:
    found = table(tmp_path, "t", FEW, 100)
    gather = Gather(dtype="U8", rows=FEW, strips=(strip("m", "t", 10, 5, 100), strip("m", "t", 90, 10, 100)))
    with ExitStack() as stack:
        opened = Counting(stack)
        data = b"".join(gathered_pieces(gather, gather.width * FEW, {"m": tmp_path}, opened))
    assert data == numpy.hstack([found[:, 10:15], found[:, 90:]]).tobytes()
    assert opened.asked == [
        ("t", START + row * 100 + at, START + row * 100 + end) for row in range(FEW) for at, end in ((10, 15), (90, 100))
    ]


def test_many_short_rows_are_read_at_once(tmp_path: Path) -> None:
    """One read for each strip, which ends where the last of its parts ends."""
    rows = FEW + 1
    found = table(tmp_path, "t", rows, 100)
    gather = Gather(dtype="U8", rows=rows, strips=(strip("m", "t", 10, 5, 100), strip("m", "t", 90, 10, 100)))
    with ExitStack() as stack:
        opened = Counting(stack)
        data = b"".join(gathered_pieces(gather, gather.width * rows, {"m": tmp_path}, opened))
    assert data == numpy.hstack([found[:, 10:15], found[:, 90:]]).tobytes()
    last = START + (rows - 1) * 100
    assert opened.asked == [("t", START + 10, last + 15), ("t", START + 90, last + 100)]


def test_a_large_table_comes_in_pieces(tmp_path: Path) -> None:
    rows, stride = 5000, 1800
    found = table(tmp_path, "t", rows, stride)
    gather = Gather(dtype="U8", rows=rows, strips=(strip("m", "t", 0, 600, stride), strip("m", "t", 1200, 600, stride)))
    whole = numpy.hstack([found[:, :600], found[:, 1200:]]).tobytes()
    done = pieces(gather, len(whole), {"m": tmp_path})
    step = PIECE // stride * 1200
    assert [len(piece) for piece in done] == [step, step, len(whole) - 2 * step]
    assert b"".join(done) == whole


def test_no_read_is_larger_than_a_piece(tmp_path: Path) -> None:
    """Also where little of each row is wanted: one layer of many."""
    rows, stride = 5000, 1800
    found = table(tmp_path, "t", rows, stride)
    gather = Gather(dtype="U8", rows=rows, strips=(strip("m", "t", 8, 16, stride),))
    with ExitStack() as stack:
        opened = Counting(stack)
        assert b"".join(gathered_pieces(gather, 16 * rows, {"m": tmp_path}, opened)) == found[:, 8:24].tobytes()
    assert len(opened.asked) == 3 and max(end - begin for _, begin, end in opened.asked) <= PIECE


def test_long_rows_come_in_pieces_too(tmp_path: Path) -> None:
    """A table of one row, as one of the first axis is."""
    found = table(tmp_path, "t", 1, 3 * PIECE // 2)
    gather = Gather(dtype="U8", rows=1, strips=(strip("m", "t", 0, PIECE + 8, 3 * PIECE // 2), strip("m", "t", 8, 8, 3 * PIECE // 2)))
    done = pieces(gather, gather.width, {"m": tmp_path})
    assert [len(piece) for piece in done] == [PIECE, 16]
    assert b"".join(done) == found[0, : PIECE + 8].tobytes() + found[0, 8:16].tobytes()


def test_nothing_is_no_piece(tmp_path: Path) -> None:
    gather = Gather(dtype="U8", rows=3, strips=(strip("m", "absent", 0, 4, 4),))
    assert pieces(gather, 0, {"m": tmp_path}) == []


@pytest.mark.parametrize(("rows", "missing", "at"), [(2, 3, 9), (20, 3, 81)])
def test_a_source_that_ends_early(rows: int, missing: int, at: int, tmp_path: Path) -> None:
    table(tmp_path, "t", rows, 4)
    gather = Gather(dtype="U8", rows=rows, strips=(Strip(model="m", file="t", begin=START + 4, stride=4, width=4),))
    with pytest.raises(CheckpointError) as caught:
        pieces(gather, gather.width * rows, {"m": tmp_path})
    size = START + 4 * rows + 1
    assert str(caught.value) == f"{tmp_path}/t: ended early: {missing} bytes are missing from byte {size} on; plan again"


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    gather = Gather(dtype="U8", rows=1, strips=(strip("m", "t", 0, 4, 4),))
    with pytest.raises(CheckpointError) as caught:
        pieces(gather, 4, {"m": tmp_path})
    assert str(caught.value).startswith(f"{tmp_path}/t: cannot be ")
