from __future__ import annotations

import os
from pathlib import Path

import pytest

from layercut.errors import CheckpointError, RecipeError
from layercut.smallfile import read_small


def test_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    path.write_bytes(b"")
    assert read_small(path, 0) == b""
    (tmp_path / "link").symlink_to("x")
    assert read_small(tmp_path / "link", 0) == b""


def test_a_longer_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(CheckpointError) as caught:
        read_small(path, 5)
    assert str(caught.value) == f"{path}: is longer than the 5 bytes that are read of such a file"


def test_a_file_that_hides_its_length_is_read_as_far_as_the_limit() -> None:
    """Files of /proc have none."""
    path = Path("/proc/self/environ")
    if not path.exists():
        pytest.skip("no /proc here")
    with pytest.raises(RecipeError, match="is longer than the 1 bytes"):
        read_small(path, 1, RecipeError)


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RecipeError) as caught:
            read_small(path, 5, RecipeError)
        assert str(caught.value) == f"{path}: not a regular file"


def test_the_system_says_what_is_wrong_with_the_rest(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_small(tmp_path, 5)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "none", 5)
