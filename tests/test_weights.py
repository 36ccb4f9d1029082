"""Weights are read from their byte ranges when they are asked for, once each, and counted."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from conftest import Spec, write_checkpoint

from layercut.checkpoint import Checkpoint, open_checkpoint
from layercut.errors import CheckpointError
from layercut.weights import DTYPES, Weights

SPEC: Spec = {
    "a": ("F32", (2, 2), struct.pack("<4f", 1, 2, 3, 4)),
    "b": ("BF16", (3,), struct.pack("<3H", 0x3F80, 0x4000, 0xC000)),
    "c": ("I64", (), struct.pack("<q", -7)),
    "d": ("F16", (0, 4), b""),
    "e": ("BOOL", (2,), b"\x01\x00"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path / "m", SPEC, {"model_type": "llama"}, shards=2))


def test_values_shapes_and_dtypes(checkpoint: Checkpoint) -> None:
    weights = Weights(checkpoint)
    assert weights.load("a").tolist() == [[1, 2], [3, 4]]
    assert weights.load("b").tolist() == [1, 2, -2] and weights.load("b").dtype == torch.bfloat16
    assert weights.load("c").item() == -7 and weights.load("c").shape == ()
    assert weights.load("d").shape == (0, 4) and weights.load("d").dtype == torch.float16
    assert weights.load("e").tolist() == [True, False]


def test_bytes_are_counted_by_file(checkpoint: Checkpoint) -> None:
    weights = Weights(checkpoint)
    first, second = checkpoint.files
    assert weights.read == {first: 0, second: 0}
    weights.load("a")
    weights.load("e")
    assert weights.read == {first: 16, second: 2}


def test_lazy_tensors_are_read_when_they_are_indexed(checkpoint: Checkpoint) -> None:
    weights = Weights(checkpoint)
    lazy = weights.lazy(["a", "b"])
    assert sum(weights.read.values()) == 0
    assert lazy["a"][...].tolist() == [[1, 2], [3, 4]]
    assert lazy["b"][1:].tolist() == [2, -2]
    assert sum(weights.read.values()) == 22


def test_what_is_fetched_is_read_once(checkpoint: Checkpoint) -> None:
    with Weights(checkpoint) as weights:
        weights.fetch(["a", "b"])
        assert weights.load("a").tolist() == [[1, 2], [3, 4]]
        assert weights.lazy(["b"])["b"][...].tolist() == [1, 2, -2]
        assert sum(weights.read.values()) == 22
        weights.load("a")  # and again only when it is asked for again
        assert sum(weights.read.values()) == 38


def test_the_context_may_be_entered_again(checkpoint: Checkpoint) -> None:
    weights = Weights(checkpoint)
    for _ in range(2):
        with weights:
            weights.fetch(["a"])
            assert weights.load("a").tolist() == [[1, 2], [3, 4]]


def test_what_was_fetched_in_vain_is_dropped(checkpoint: Checkpoint) -> None:
    weights = Weights(checkpoint)
    with weights:
        weights.fetch(["a"])
    assert weights.load("a").tolist() == [[1, 2], [3, 4]]


def test_a_file_that_was_cut_meanwhile(checkpoint: Checkpoint) -> None:
    file = checkpoint.folder / checkpoint.tensors["e"].file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        Weights(checkpoint).load("e")
    assert str(caught.value) == f"{file}: ends inside tensor e; it changed while it was read"


@pytest.mark.parametrize("fetched", [False, True])
def test_a_file_that_is_gone(checkpoint: Checkpoint, fetched: bool) -> None:
    file = checkpoint.folder / checkpoint.tensors["a"].file
    file.unlink()
    with Weights(checkpoint) as weights:
        if fetched:
            weights.fetch(["a"])
        with pytest.raises(CheckpointError) as caught:
            weights.load("a")
    assert str(caught.value) == f"{file}: cannot be read: No such file or directory"


def test_dtypes_that_need_a_scale_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {"x": ("F8_E4M3", (2,), b"\x00\x01")}, {})
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor x is F8_E4M3, which only a quantiser can read$"):
        Weights(open_checkpoint(folder)).load("x")


def test_every_dtype_has_the_size_of_its_name() -> None:
    for name, dtype in DTYPES.items():
        bits = "".join(sign for sign in name if sign.isdigit())
        assert dtype.itemsize == (int(bits) // 8 if bits else 1)
