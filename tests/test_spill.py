"""The spill: what is put comes back, from memory or from a file that nobody sees."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layercut import spill as module
from layercut.errors import OutputError
from layercut.spill import Spill, raw_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [0, 10**9], ids=["file", "memory"])
def test_what_is_put_comes_back(tmp_path: Path, dtype: torch.dtype, room: int) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    with Spill(room, tmp_path) as spill:
        spill.put("a", tensor)
        spill.put("empty", tensor[:0])
        found = spill.get("a")
        assert torch.equal(found, tensor) and found.dtype == dtype
        assert spill.get("empty").shape == (0, 3, 4)
        size = tensor.numel() * tensor.element_size()
        assert (spill.in_memory, spill.in_file) == ((0, size) if room == 0 else (size, 0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.booleans()), max_size=30), st.integers(0, 300))
def test_it_is_a_mapping_whatever_stands_where(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]], room: int
) -> None:
    """Against a dict: puts of any size over each other, and pops."""
    expected: dict[int, torch.Tensor] = {}
    with Spill(room, tmp_path_factory.getbasetemp() / "spill") as spill:
        for number, (key, size, pop) in enumerate(steps):
            if pop and key in expected:
                assert torch.equal(spill.pop(key), expected.pop(key))
                with pytest.raises(KeyError):
                    spill.get(key)
            else:
                expected[key] = torch.full((size,), float(number))
                spill.put(key, expected[key])
            assert spill.in_memory <= room
        for key, tensor in expected.items():
            assert torch.equal(spill.get(key), tensor)


def test_the_first_ones_stand_in_memory(tmp_path: Path) -> None:
    with Spill(100, tmp_path) as spill:
        for number in range(4):
            spill.put(number, torch.zeros(10))
        assert (spill.in_memory, spill.in_file) == (80, 80)


def test_a_state_that_is_written_again_takes_its_own_place(tmp_path: Path) -> None:
    with Spill(0, tmp_path) as spill:
        for number in range(10):
            spill.put("state", torch.full((5,), float(number)))
        assert spill.in_file == 20
        assert spill.get("state").tolist() == [9.0] * 5


def test_a_view_does_not_keep_what_it_looks_at(tmp_path: Path) -> None:
    with Spill(1000, tmp_path) as spill:
        spill.put("a", torch.zeros(1000)[:10])
        assert spill.get("a").untyped_storage().nbytes() == 40


def test_slices_are_written_as_they_read(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    with Spill(0, tmp_path) as spill:
        spill.put("a", tensor)
        assert torch.equal(spill.get("a"), tensor)


def test_tensors_of_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        tensor = torch.ones(3, dtype=torch.bfloat16) * 2
    with Spill(0, tmp_path) as spill:
        spill.put("a", tensor)
        assert spill.get("a").tolist() == [2.0] * 3


def test_nobody_sees_the_file(tmp_path: Path) -> None:
    with Spill(0, tmp_path / "deep" / "er") as spill:
        spill.put("a", torch.zeros(1000))
        assert list((tmp_path / "deep" / "er").iterdir()) == []
    assert list((tmp_path / "deep" / "er").iterdir()) == []


def test_no_file_is_made_while_there_is_room(tmp_path: Path) -> None:
    with Spill(10**6, tmp_path / "folder") as spill:
        spill.put("a", torch.zeros(1000))
    assert not (tmp_path / "folder").exists()


class Usage(NamedTuple):
    free: int


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: Usage(500))
    hint = "use fewer samples or tokens, or set LAYERCUT_CACHE to a folder on a larger disk"
    with Spill(40, tmp_path, expected=600) as spill:
        spill.put("a", torch.zeros(10))
        with pytest.raises(OutputError) as caught:
            spill.put("b", torch.zeros(10))
    assert str(caught.value) == f"{tmp_path}: states take 560 bytes on disk, where 500 are free; {hint}"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        Spill(0, tmp_path / "file" / "x") as spill,
        pytest.raises(OutputError, match="states cannot be kept on disk: Not a directory; set LAYERCUT"),
    ):
        spill.put("a", torch.zeros(1))


def test_a_full_disk(tmp_path: Path) -> None:
    class Full:
        def seek(self, place: int) -> None:
            pass

        def write(self, data: memoryview) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            pass

    with Spill(0, tmp_path) as spill:
        spill._file = Full()  # type: ignore[assignment]
        with pytest.raises(OutputError, match="states cannot be kept on disk: No space left on device"):
            spill.put("a", torch.zeros(1))


def test_raw_bytes() -> None:
    assert bytes(raw_bytes(torch.tensor([1, 256], dtype=torch.int16))) == b"\x01\x00\x00\x01"
    assert bytes(raw_bytes(torch.zeros(0))) == b""
    room = torch.zeros(2, dtype=torch.uint8)
    raw_bytes(room)[:] = b"\x05\x06"
    assert room.tolist() == [5, 6]
