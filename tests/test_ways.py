"""ways.py: every way copies the bytes it says, or says that it cannot, and leaves the descriptors as they were."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from layercut import ways
from layercut.ways import ANY, BUFFER, UNSUPPORTED, WHOLE, WINDOW, Way, advise, by_clone, by_direct_write, by_read_and_write, write_at

BLOCK = 4096
CONTENT = random.Random(1).randbytes(WINDOW + 3 * BLOCK + 17)


class Pair:
    """A source with CONTENT, and an empty target."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        (folder / "source").write_bytes(CONTENT)
        self.path = folder / "target"
        self.source = os.open(folder / "source", os.O_RDONLY)
        self.target = os.open(self.path, os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, self.source)
        stack.callback(os.close, self.target)

    def copy(self, way: Way, begin: int, at: int, count: int) -> int:
        return way(self.source, self.target, begin, at, count)

    def direct(self, begin: int, at: int, count: int) -> int:
        """A direct write; skips the test where the file system knows none."""
        try:
            return self.copy(by_direct_write, begin, at, count)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                pytest.skip(f"no direct writes from byte {begin % BLOCK} of a block here: {error.strerror}")
            raise

    def flags(self) -> int:
        return fcntl.fcntl(self.target, fcntl.F_GETFL)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(tmp_path, stack)


def test_ways_for_whole_blocks_come_first_and_the_last_works_everywhere() -> None:
    assert (by_clone, by_direct_write) == WHOLE
    assert ANY[-1] is by_read_and_write


@pytest.mark.parametrize("way", ANY)
@pytest.mark.parametrize(("begin", "at", "count"), [(0, 0, BLOCK), (5, 9, 1000), (len(CONTENT) - 3, 1, 3), (7, 0, 0)])
def test_any_bytes(pair: Pair, way: Way, begin: int, at: int, count: int) -> None:
    assert pair.copy(way, begin, at, count) == count
    assert pair.path.read_bytes() == (b"\0" * at + CONTENT[begin : begin + count] if count else b"")


@pytest.mark.parametrize("way", ANY)
def test_the_end_of_the_source(pair: Pair, way: Way) -> None:
    assert pair.copy(way, len(CONTENT) - 5, 0, 100) == 5
    assert pair.copy(way, len(CONTENT), 5, 100) == 0
    assert pair.path.read_bytes() == CONTENT[-5:]


def test_memory_is_bounded_by_the_buffer(pair: Pair) -> None:
    assert pair.copy(by_read_and_write, 0, 0, len(CONTENT)) == BUFFER


@pytest.mark.parametrize("name", ["copy_file_range", "sendfile", "O_DIRECT"])
def test_systems_without_a_call(pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(os, name)
    way = {"copy_file_range": ANY[0], "sendfile": ANY[1], "O_DIRECT": by_direct_write}[name]
    with pytest.raises(OSError) as caught:
        pair.copy(way, 0, 0, BLOCK)
    assert caught.value.errno == errno.ENOSYS
    assert errno.ENOSYS in UNSUPPORTED


# Clones


def test_a_file_system_that_shares_nothing_says_so_or_shares(pair: Pair) -> None:
    try:
        assert pair.copy(by_clone, BLOCK, 0, 2 * BLOCK) == 2 * BLOCK
        assert pair.path.read_bytes() == CONTENT[BLOCK : 3 * BLOCK]
    except OSError as error:
        assert error.errno in UNSUPPORTED
        assert pair.path.read_bytes() == b""


def test_what_a_clone_asks_of_the_kernel(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """struct file_clone_range: the source's descriptor, its offset, the bytes, the target's offset, in the machine's order."""
    asked = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *call: asked.append(call))
    assert pair.copy(by_clone, 3 * BLOCK, BLOCK, 2 * BLOCK) == 2 * BLOCK
    [(target, number, argument)] = asked
    assert (target, number) == (pair.target, 0x4020940D)
    values = [int.from_bytes(argument[at : at + 8], sys.byteorder) for at in range(0, 32, 8)]
    assert values == [pair.source, 3 * BLOCK, 2 * BLOCK, BLOCK]


# Direct writes


@pytest.mark.parametrize(("begin", "at"), [(0, 0), (BLOCK, 0), (512, BLOCK), (8, 0), (3 * BLOCK, 5 * BLOCK)])
def test_whole_blocks_go_out_of_the_pages_of_the_source(pair: Pair, begin: int, at: int) -> None:
    before = pair.flags()
    os.truncate(pair.target, at)
    assert pair.direct(begin, at, 2 * BLOCK) == 2 * BLOCK
    assert pair.path.read_bytes() == b"\0" * at + CONTENT[begin : begin + 2 * BLOCK]
    assert pair.flags() == before


def test_a_direct_write_is_one_window_at_most(pair: Pair) -> None:
    assert pair.direct(BLOCK, 0, WINDOW + BLOCK) == WINDOW
    assert pair.path.read_bytes() == CONTENT[BLOCK : BLOCK + WINDOW]


def test_buffered_and_direct_writes_of_one_file_meet(pair: Pair) -> None:
    """As a file is written: a header, the rest of its block, whole blocks, the last bytes."""
    write_at(pair.target, CONTENT[:100], 0)
    pair.copy(by_read_and_write, 100, 100, BLOCK - 100)
    pair.direct(BLOCK, BLOCK, 2 * BLOCK)
    pair.copy(by_read_and_write, 3 * BLOCK, 3 * BLOCK, 77)
    assert pair.path.read_bytes() == CONTENT[: 3 * BLOCK + 77]
    os.fsync(pair.target)
    assert pair.path.read_bytes() == CONTENT[: 3 * BLOCK + 77]


def test_what_is_not_aligned_is_refused_and_nothing_written(pair: Pair) -> None:
    before = pair.flags()
    try:
        pair.copy(by_direct_write, 0, 1, 1000)
    except OSError as error:
        assert error.errno in UNSUPPORTED
        assert pair.path.read_bytes() == b""
    else:  # a file system that writes this through its cache
        assert pair.path.read_bytes() == b"\0" + CONTENT[:1000]
    assert pair.flags() == before


@pytest.mark.parametrize("begin", [len(CONTENT) // BLOCK * BLOCK, len(CONTENT) + 10 * BLOCK])
def test_a_source_that_has_become_shorter(pair: Pair, begin: int) -> None:
    with pytest.raises(OSError) as caught:
        pair.copy(by_direct_write, begin, 0, BLOCK)
    assert caught.value.errno in UNSUPPORTED, "the next way finds where the source ends"
    assert pair.path.read_bytes() == b""


def test_a_file_that_cannot_be_mapped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def unmappable(*args: object, **more: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", unmappable)
    with pytest.raises(OSError) as caught:
        pair.copy(by_direct_write, 0, 0, BLOCK)
    assert caught.value.errno in UNSUPPORTED


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_is_no_reason_for_another_way(pair: Pair, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def broken(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    before = pair.flags()
    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError) as caught:
        pair.copy(by_direct_write, 0, 0, BLOCK)
    assert caught.value.errno == code or caught.value.errno in UNSUPPORTED  # the latter where O_DIRECT itself is unknown
    assert code not in UNSUPPORTED
    assert pair.flags() == before


def test_nothing_stays_mapped_or_open(pair: Pair) -> None:
    for at in range(0, 4 * BLOCK, BLOCK):
        pair.direct(at, at, BLOCK)
    assert str(pair.path.parent / "source") not in Path("/proc/self/maps").read_text()
    assert len([fd for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.resolve() == pair.path.parent / "source"]) == 1


def test_the_next_step_is_read_ahead(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *call: asked.append(call))
    pair.direct(BLOCK, 0, 2 * BLOCK)
    assert asked == [(pair.source, BLOCK, 4 * BLOCK, os.POSIX_FADV_WILLNEED)]


# Hints and writing


def test_advice_that_is_refused_or_unknown(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

    monkeypatch.setattr(os, "posix_fadvise", refused)
    advise(pair.source, 0, 1, "POSIX_FADV_WILLNEED")
    monkeypatch.delattr(os, "posix_fadvise")
    advise(pair.source, 0, 1, "POSIX_FADV_WILLNEED")


def test_short_writes_go_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: real(descriptor, data[:100], at))
    write_at(pair.target, CONTENT[:1234], 6)
    assert pair.path.read_bytes() == b"\0" * 6 + CONTENT[:1234]


def test_a_step_is_small_enough_for_several_files_at_once() -> None:
    assert 4 * ways.WINDOW <= 8 << 20
