"""fits.py: files of maps are named by their content, read back as they were, and nothing else is taken for them."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from layercut import fits
from layercut.errors import LayercutError, OutputError
from layercut.fits import fault_of, keep_map, map_of, path_of, span_of

DATA = struct.pack("<4f", 1, 2, 3, 4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path))
    return tmp_path


def test_a_map_is_named_by_its_content_and_reads_back(cache: Path) -> None:
    digest = keep_map(DATA, 2)
    path = path_of(digest)
    assert path == cache / "fits" / f"{digest}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    span = span_of(path, 2)
    assert path.read_bytes()[span.begin : span.end] == DATA and span.end == path.stat().st_size
    assert map_of(digest, 2).tolist() == [[1, 2], [3, 4]]
    assert fault_of(path, digest, 2) is None
    assert keep_map(DATA, 2) == digest != keep_map(DATA[::-1], 2)


def test_other_programs_can_read_it() -> None:
    from safetensors.torch import load_file

    assert load_file(path_of(keep_map(DATA, 2)))["map"].tolist() == [[1, 2], [3, 4]]


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"map"', b'"mop"'))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "has another length than the plan says"),
        (lambda path: path.write_bytes(b""), "has another length than the plan says"),
        (flipped, "was changed since the map was fitted"),
        (other_header, "is not the file that was fitted"),
        (lambda path: (path.unlink(), path.mkdir()), "is no regular file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no regular file"),
    ],
)
def test_a_file_that_is_not_the_map(change: Callable[[Path], object], said: str) -> None:
    digest = keep_map(DATA, 2)
    change(path_of(digest))
    assert fault_of(path_of(digest), digest, 2) == said
    with pytest.raises(OutputError) as caught:
        map_of(digest, 2)
    assert str(caught.value) == f"{path_of(digest)}: the map that was fitted {said}; run again"


def test_a_map_of_another_size_is_another_one() -> None:
    digest = keep_map(DATA, 2)
    assert fault_of(path_of(digest), digest, 3) == "has another length than the plan says"
    assert fault_of(Path("a\0b"), digest, 2) == "cannot be read: embedded null byte"


def test_a_cache_that_cannot_be_written_to(cache: Path) -> None:
    (cache / "fits").write_text("")
    with pytest.raises(LayercutError, match=r"the fitted map cannot be kept: .*; set LAYERCUT_CACHE to a folder that can be written to$"):
        keep_map(DATA, 2)


def test_the_maps_that_were_not_asked_for_longest_go(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [keep_map(struct.pack("<4f", number, 0, 0, 0), 2) for number in range(3)]
    for age, digest in enumerate(digests):
        os.utime(path_of(digest), (1000 + age, 1000 + age))
    assert fault_of(path_of(digests[0]), digests[0], 2) is None  # asked for: now it is the newest
    monkeypatch.setattr(fits, "MAX_BYTES", 2 * path_of(digests[0]).stat().st_size)
    last = keep_map(DATA, 2)
    assert [path_of(digest).exists() for digest in (*digests, last)] == [True, False, False, True]
    monkeypatch.setattr(fits, "MAX_BYTES", 1)
    newest = keep_map(DATA[::-1], 2)
    assert [path.stem for path in path_of(newest).parent.iterdir()] == [newest], "what was just fitted always stays"


def test_what_a_killed_process_left_goes_when_room_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "fits").mkdir()
    (cache / "fits" / ".writing-x").write_bytes(bytes(100))
    os.utime(cache / "fits" / ".writing-x", (0, 0))
    monkeypatch.setattr(fits, "MAX_BYTES", 150)
    digest = keep_map(DATA, 2)
    assert [path.stem for path in (cache / "fits").iterdir()] == [digest]
