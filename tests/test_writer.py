"""writer.py: where the steps of a file are cut, so that a run can go on from there with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercut import writer
from layercut.copying import Range
from layercut.plan import Part, TensorCopy, TensorMade
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
