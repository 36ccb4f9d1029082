"""writer.py: where the steps of a file are cut, so that a run can go on from there with the same bytes."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut import writer
from layercut.arithmetic import made_pieces
from layercut.copying import Range, SourceFiles
from layercut.header import ITEM_BITS
from layercut.plan import Band, Gather, Grown, Map, Part, Strip, TensorCopy, TensorMade
from layercut.writer import MARK, PAUSE, Piece, pieces, steps_of

A, B = Path("a"), Path("b")


def made(count, dtype="F32", *parts, name="t"):
    return TensorMade(
        name=name,
        dtype=dtype,
        shape=(2, count // 2) if count % 2 == 0 else (count,),
        parts=tuple(
            Part(model="m", file="f", begin=begin, end=begin + count * width, dtype=kind, weight=1.0) for begin, kind, width in parts
        ),
    )


def test_progress_is_recorded_often_enough():
    assert MARK <= 256_000_000
    assert PAUSE <= 2  # seconds
    assert MARK % (1 << 20) == 0  # a multiple of any block


def test_small_steps_stay_whole():
    steps = [Range(A, 10, 20), made(4), Range(B, 0, 0), Range(B, 5, 6)]
    assert list(pieces(steps, 100, 0)) == [Piece(steps[0], 100, 110), Piece(steps[1], 110, 126), Piece(steps[3], 126, 127)]


def test_copies_are_cut_at_multiples_in_the_file(monkeypatch):
    monkeypatch.setattr(writer, "MARK", 100)
    assert list(pieces([Range(A, 1000, 1250)], 30, 0)) == [
        Piece(Range(A, 1000, 1070), 30, 100),
        Piece(Range(A, 1070, 1170), 100, 200),
        Piece(Range(A, 1170, 1250), 200, 280),
    ]
    assert list(pieces([Range(A, 1000, 1250)], 30, 200)) == [Piece(Range(A, 1170, 1250), 200, 280)]
    assert list(pieces([Range(A, 1000, 1250)], 30, 280)) == []


def test_computed_tensors_are_cut_between_elements(monkeypatch):
    monkeypatch.setattr(writer, "MARK", 10)
    whole = made(6, "F32", (100, "BF16", 2), (500, "F64", 8))
    found = list(pieces([whole], 0, 0))
    assert [(piece.offset, piece.end) for piece in found] == [(0, 8), (8, 12), (12, 20), (20, 24)]
    assert [piece.step.shape for piece in found] == [(2,), (1,), (2,), (1,)]
    assert [[(part.begin, part.end) for part in piece.step.parts] for piece in found] == [
        [(100, 104), (500, 516)],
        [(104, 106), (516, 524)],
        [(106, 110), (524, 540)],
        [(110, 112), (540, 548)],
    ]
    assert list(pieces([whole], 0, 12)) == found[2:]
    assert [piece.offset for piece in pieces([whole], 0, 14)] == [12, 20]  # not in the middle of an element


@pytest.mark.parametrize(("dtype", "least"), [("F4", 1), ("F6_E3M2", 3), ("U8", 1), ("BF16", 2), ("C64", 8)])
@pytest.mark.parametrize("mark", [1, 4, 7, 50])
def test_gathered_tensors_are_cut_between_whole_bytes_and_elements(monkeypatch, tmp_path, dtype, least, mark):
    """Also where an element is no whole byte: four of six bits take three."""
    monkeypatch.setattr(writer, "MARK", mark)
    data = bytes(range(2 * 4 * 24))
    (tmp_path / "f").write_bytes(data)
    strips = tuple(Strip(model="m", file="f", begin=first, stride=96, width=24) for first in (24, 0, 72))
    elements = 2 * 72 * 8 // ITEM_BITS[dtype]
    whole = TensorMade(name="t", dtype=dtype, shape=(elements,), parts=(), gather=Gather(dtype=dtype, rows=2, strips=strips))
    found = list(pieces([whole], 5, 0))
    assert [piece.offset for piece in found] == [5, *(piece.end for piece in found[:-1])] and found[-1].end == 5 + 144
    assert all((piece.offset - 5) % least == 0 and piece.step.nbytes == piece.end - piece.offset for piece in found)
    assert len(found) > 1
    with ExitStack() as stack:
        written = b"".join(b"".join(made_pieces(piece.step, {"m": tmp_path}, SourceFiles(stack))) for piece in found)
    assert written == b"".join(data[row + at : row + at + 24] for row in (0, 96) for at in (24, 0, 72))
    assert list(pieces([whole], 5, found[1].offset)) == found[1:]


@pytest.mark.parametrize("amend", [Band(by=0.5, row=4, stop=3), Grown(by=0.25)])
def test_amended_tensors_are_cut_between_elements(monkeypatch, tmp_path, amend):
    monkeypatch.setattr(writer, "MARK", 10)
    (tmp_path / "f").write_bytes(struct.pack("<16f", *range(16)))
    parts = tuple(Part(model="m", file="f", begin=first, end=first + 32, dtype="F32", weight=1) for first in (0, 32))
    whole = TensorMade(name="t", dtype="F32", shape=(8,), parts=parts[: 2 if isinstance(amend, Grown) else 1], amend=amend)
    found = list(pieces([whole], 1, 0))
    assert len(found) > 3 and [piece.step.amend.at for piece in found] == [(piece.offset - 1) // 4 for piece in found]
    with ExitStack() as stack:
        opened = SourceFiles(stack)
        written = b"".join(b"".join(made_pieces(piece.step, {"m": tmp_path}, opened)) for piece in found)
        assert written == b"".join(made_pieces(whole, {"m": tmp_path}, opened))


def test_neighbours_are_joined_and_computed_tensors_stand_between():
    def copy(begin, model="m"):
        return TensorCopy(name=str(begin), dtype="U8", shape=(10,), model=model, file="f", begin=begin, end=begin + 10)

    tensor = made(4)
    found = list(steps_of([copy(0), copy(10), copy(30), tensor, copy(40), copy(50, "n")], {"m": A, "n": B}))
    assert found == [Range(A / "f", 0, 20), Range(A / "f", 30, 40), tensor, Range(A / "f", 40, 50), Range(B / "f", 50, 60)]


@st.composite
def files(draw):
    steps = []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            begin = draw(st.integers(0, 50))
            steps.append(Range(A, begin, begin + draw(st.integers(0, 80))))
        else:
            steps.append(made(draw(st.integers(0, 20)), "F32", (0, "BF16", 2)))
    return steps


def size_of(step):
    return step.nbytes if isinstance(step, TensorMade) else step.end - step.begin


@given(steps=files(), start=st.integers(0, 40), mark=st.integers(1, 50), resume=st.integers(0, 500))
def test_pieces_cover_the_rest_of_the_file_once(steps, start, mark, resume):
    total = start + sum(map(size_of, steps))
    resume = min(resume, total)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(writer, "MARK", mark)
        found, whole = list(pieces(steps, start, resume)), list(pieces(steps, start, 0))
    position = found[0].offset if found else total
    assert position <= max(resume, start) < position + 4 or not found
    for piece in found:
        assert piece.offset == position and piece.end - piece.offset == size_of(piece.step) > 0
        assert piece.end - piece.offset <= max(mark, 4)
        assert piece.end - 4 < (piece.offset // mark + 1) * mark
        position = piece.end
    assert position == total
    ends = [piece.end for piece in whole]
    for end in ends:  # recorded places: going on from there gives the rest of the same pieces
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(writer, "MARK", mark)
            assert list(pieces(steps, start, end)) == [piece for piece in whole if piece.offset >= end]


def test_a_tensor_that_maps_go_into_is_not_cut():
    """Each of its bytes depends on all of it: a run that stopped within it writes it again from its start."""
    folded = made(1 << 20).model_copy(update={"maps": (Map(sha256="0" * 64, size=2, columns=False),)})
    steps = [Range(A, 0, MARK - 8), folded, Range(B, 0, 4)]
    end = MARK - 8 + folded.nbytes
    whole = Piece(folded, MARK - 8, end)
    assert list(pieces(steps, 0, 0)) == [Piece(steps[0], 0, MARK - 8), whole, Piece(steps[2], end, end + 4)]
    assert list(pieces(steps, 0, MARK)) == [whole, Piece(steps[2], end, end + 4)]
    assert list(pieces(steps, 0, end)) == [Piece(steps[2], end, end + 4)]
    assert next(pieces(steps, 0, end - 1)) == whole
